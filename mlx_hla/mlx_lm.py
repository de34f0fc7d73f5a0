"""The language model under mlx-lm: its commands, server, tuner and quantisation run folders of ours.

    mlx-hla lm generate --model runs/mine --prompt "def f(x):"
    mlx_lm.generate --model runs/mine --prompt "def f(x):" --trust-remote-code

Needs the extra `lm` (pip install 'mlx-hla[lm]'). Nothing else of this package imports mlx-lm.

Two ways in. A folder's config.json names `hla.py`, one import of this module. mlx-lm runs such a file only
with `--trust-remote-code`, and then runs whatever stands in it: look at a folder that you did not write. The
command `mlx-hla lm` needs no flag and runs nothing from the folder: `register` gives mlx-lm, in that process,
this module as the architecture "hla", and a folder with other code than ours is refused.

What mlx-lm then does is mlx-lm's. What to know of it:
- The cache is mlx-lm's own `ArraysCache`, a constant number of bytes. It can be saved, continued and batched,
  but not trimmed: speculative decoding refuses it, and a prompt that leaves what a server has read starts
  afresh. `generate --prompt-cache-file` begins its prompt with <s>, in the middle of a text too.
- `lora` wants 16 layers by default: `--num-layers -1` takes all. A learning rate of 2e-4 is a good start.
- `convert --dtype` spares the gates, whose small weights decide what is remembered; so does `-q`.
- A module whose input width is no multiple of the group size is left out of quantisation.
- The detokenizer writes a space for U+2581, as it does for any SentencePiece model.
- `convert` and `fuse` leave tokenizer.model behind; `load` makes it again from tokenizer.json.
- A model with full softmax attention in it is none of mlx-lm's.

The layer alone, in another model of mlx-lm's: `swap` and `freeze_rest`, see `mlx_hla.surgery`.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_hla import lm_caches
from mlx_hla.errors import InputError, about_import
from mlx_hla.lm_caches import padding as _mask
from mlx_hla.models.config import ModelConfig
from mlx_hla.models.lm import LanguageModel
from mlx_hla.models.portable import MODEL_TYPE, check_code, own_fields
from mlx_hla.surgery import freeze_rest as freeze_rest
from mlx_hla.surgery import swap as swap

try:
    from mlx_lm import utils
    from mlx_lm.models.cache import ArraysCache
    from transformers import AutoConfig, PretrainedConfig
except ImportError as e:
    raise ImportError(about_import(e), name=e.name) from e

# B batch, T time, V vocabulary


@dataclasses.dataclass
class ModelArgs:
    model_type: str
    config: ModelConfig

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelArgs:
        # `quantize_activations`, mlx-lm's flag, is in the dictionary and no key of a file.
        values = {key: value for key, value in values.items() if key != "quantize_activations"}
        fields, _ = own_fields(values, "config.json")
        return cls(values.get("model_type", MODEL_TYPE), ModelConfig.from_dict(fields, "config.json"))


class Model(LanguageModel):
    """`LanguageModel`, its weights under the same names, over mlx-lm's caches."""

    def __init__(self, args: ModelArgs):
        if not args.config.constant_state:
            raise InputError("full softmax attention does not run under mlx-lm: use mlx-hla's own commands")
        super().__init__(args.config)
        self.args, self.model_type = args, args.model_type

    def __call__(  # type: ignore[override]
        self, inputs: mx.array, cache: list[Any] | None = None, **options: Any
    ) -> mx.array:
        """Token ids [B, T] to logits [B, T, V]. mlx-lm vouches for the ids: to look would wait for them."""
        if cache is None:
            return self.logits(inputs, **options)
        mask = _mask(cache, inputs.shape[1])
        work = [lm_caches.unpacked(c, state) for c, state in zip(cache, self._states, strict=True)]
        logits = self.logits(inputs, work, mask, **options)
        for c, w in zip(cache, work, strict=True):
            lm_caches.pack(w, c, inputs.shape[1])
        return logits

    def make_cache(self) -> list[ArraysCache]:
        return [lm_caches.empty(state) for state in self._states]

    @functools.cached_property
    def _states(self) -> list[Any]:
        return [lm_caches.template(layer.mixer, self.config.dims) for layer in self.layers]

    @property
    def cast_predicate(self) -> Callable[[str], bool]:
        """Which parameters `convert --dtype` may cast."""
        return lambda path: "_gate." not in path

    @property
    def quant_predicate(self) -> Callable[[str, nn.Module], bool]:
        """Which modules may be quantised, of those that can be: the gates, if they ever can, may not."""
        return lambda path, module: not path.endswith("_gate")


class _Config(PretrainedConfig):
    model_type = MODEL_TYPE


def register() -> None:
    """Let mlx-lm, in this process, build folders of ours without running their `hla.py`."""
    sys.modules[f"mlx_lm.models.{MODEL_TYPE}"] = sys.modules[__name__]
    # Or its tokenizers would warn, of every folder, that they do not know the model.
    AutoConfig.register(MODEL_TYPE, _Config, exist_ok=True)
    stock = utils.load_model
    if getattr(stock, "_knows_hla", False):
        return

    @functools.wraps(stock)
    def load_model(
        model_path: Path,
        lazy: bool = False,
        strict: bool = True,
        model_config: dict[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        values = utils.load_config(Path(model_path))
        if values.get("model_type") != MODEL_TYPE:
            return stock(model_path, lazy, strict, model_config, **options)
        own_fields(values, f"{model_path}/config.json")
        check_code(Path(model_path))
        model_config = {**(model_config or {}), "model_file": None}
        model, config = stock(model_path, lazy, strict, model_config, **options)
        del config["model_file"]
        if "model_file" in values:
            config["model_file"] = values["model_file"]  # `convert` and `fuse` write what they were given
        return model, config

    load_model._knows_hla = True  # type: ignore[attr-defined]
    utils.load_model = load_model  # type: ignore[assignment]


def run(command: str, arguments: list[str]) -> int:
    """Run a command of mlx-lm's in this process, as `mlx_lm.COMMAND` would."""
    from mlx_lm import __version__, cli

    register()
    sys.stderr.write(
        f"mlx-hla: mlx-lm {__version__} {command}, with the architecture {MODEL_TYPE} registered\n"
    )
    before = sys.argv
    sys.argv = [f"mlx-hla lm {command}", command, *arguments]
    try:
        cli.main()
    except ValueError as e:
        if "requires a subcommand" not in str(e):
            raise
        raise InputError(f"mlx-lm has no command {command[:60]!r}; {e}") from None
    finally:
        sys.argv = before
    return 0
