"""What a run needs, told before it starts: memory from its sizes, time from its first steps."""

from __future__ import annotations

import math
import os

import mlx.core as mx

from mlx_hla.devices import compute_dtype, on_gpu
from mlx_hla.errors import InputError
from mlx_hla.models import ModelConfig
from mlx_hla.train.presets import TrainConfig
from mlx_hla.train.team import ONE, Share

# Float32 numbers a parameter: the weights and those before them, two moments, the gradient, a cast.
_A_PARAMETER = 6
# Numbers kept for the backward pass, by a token: per logit; per layer and channel of the residual stream and
# of the heads; per layer and channel of the MLP; per head and key that softmax or a window sees. Measured as
# peaks of steps on a CPU.
_A_LOGIT, _A_CHANNEL, _A_HIDDEN, _A_SCORE = 3.6, 22, 4.5, 3.0


def step_bytes(config: ModelConfig, settings: TrainConfig, share: Share = ONE) -> float:
    """About the peak of a step's memory on a rank with this share; within a factor of two."""
    width = 4 if compute_dtype(settings.dtype) == mx.float32 else 3  # what is summed is float32 in either
    channels = config.dims + config.num_heads * config.key_dim
    layer = width * (_A_CHANNEL * channels + _A_HIDDEN * config.hidden_dims)
    # A block of a window sees itself and the block before.
    seen = {"softmax": config.context, "window": min(config.context, 2 * config.window)}
    scores = sum(seen.get(str(mixer), 0) for mixer in config.mixers) * config.num_heads
    token = 4 * _A_LOGIT * config.vocab_size + config.num_layers * layer + width * _A_SCORE * scores
    tokens = -(-settings.batch_size // share.rows) * -(-config.context // share.columns)
    return 4 * _A_PARAMETER * config.matrix_parameters + tokens * (token + 8 * settings.accumulate)


def device_bytes() -> float:
    """Memory of the device that computes."""
    if on_gpu():
        info = mx.device_info()  # Metal and CUDA have a name each for it
        return float(info.get("memory_size") or info.get("total_memory") or math.inf)
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def memory(config: ModelConfig, settings: TrainConfig, share: Share = ONE) -> str:
    """The estimate in words; an error where twice the device's memory would not do, as far as that goes."""
    need, have = step_bytes(config, settings, share), device_bytes()
    if need > 2 * have:
        raise InputError(
            f"a step needs about {amount(need)} and this device has {amount(have)}: take a smaller "
            "batch_size with a larger accumulate, a smaller context, or a smaller model"
        )
    return f"about {amount(need)} of memory" + (f", of {amount(have)}" if need > have / 2 else "")


def amount(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{max(1, size / 1e6):.0f} MB"


def pace(seconds: float, steps: int, left: int) -> str:
    """How long the steps that are left will take, from those that were taken."""
    rest = seconds / steps * left
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if rest >= 2 * size:
            return f"{steps} steps took {seconds:.1f} s: about {rest / size:.0f} {unit} for the {left:,} left"
    return f"{steps} steps took {seconds:.1f} s: about {rest:.0f} seconds for the {left:,} left"
