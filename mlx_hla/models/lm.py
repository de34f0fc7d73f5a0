"""The language model: pre-norm blocks of a mixer and SwiGLU between tied embeddings.

x = x + mixer(norm(x))        HLAttention, WindowAttention or SoftmaxAttention, by depth
x = x + W_down(silu(W_gate norm(x)) ⊙ W_up norm(x))
logits = norm(x) Eᵀ
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_hla.errors import InputError
from mlx_hla.losses import lent
from mlx_hla.models.config import ModelConfig, learns
from mlx_hla.models.quantization import parameter_counts
from mlx_hla.nn import HLAttention, SoftmaxAttention, WindowAttention
from mlx_hla.nn.mixer import Mixer
from mlx_hla.settings import check_number, check_whole
from mlx_hla.trees import flat

# B batch, T time, V vocabulary, C channels


def make_mixer(config: ModelConfig, kind: str | int) -> Mixer:
    shared: dict[str, Any] = {
        "num_kv_heads": config.kv_heads,
        "head_dim": config.key_dim,
        "qk_norm": config.qk_norm,
        "conv_size": config.conv_size,
        "output_gate": config.output_gate,
    }
    rope = config.rope_theta or 10000.0
    if kind == "softmax":
        return SoftmaxAttention(config.dims, config.num_heads, rope=rope, **shared)
    if kind == "window":
        return WindowAttention(config.dims, config.num_heads, rope=rope, window=config.window, **shared)
    return HLAttention(
        config.dims,
        config.num_heads,
        operator=kind,
        coefficients=config.coefficients if learns(kind) else None,
        decay=config.decay,
        rope=config.rope_theta,
        output_norm=config.output_norm,
        normalize=config.normalize,
        **shared,
    )


class SwiGLU(nn.Module):
    def __init__(self, dims: int, hidden_dims: int):
        super().__init__()
        self.gate_proj = nn.Linear(dims, hidden_dims, bias=False)
        self.up_proj = nn.Linear(dims, hidden_dims, bias=False)
        self.down_proj = nn.Linear(hidden_dims, dims, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, kind: str | int):
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.dims, eps=config.norm_eps)
        self.mixer = make_mixer(config, kind)
        self.mlp_norm = nn.RMSNorm(config.dims, eps=config.norm_eps)
        self.mlp = SwiGLU(config.dims, config.hidden_dims)

    def __call__(self, x, mask=None, segment_ids=None, cache=None, drops=None, group=None):
        y = self.mixer(self.mixer_norm(x), mask, segment_ids, cache, group)
        x = x + (y if drops is None else drops[0](y))
        y = self.mlp(self.mlp_norm(x))
        return x + (y if drops is None else drops[1](y))


def _checkpointed(layer: nn.Module, run: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
    """run(x), computed again in the backward pass.

    `nn.utils.checkpoint` would leave traced arrays in the layer. Only the weights and x are arguments:
    `mx.checkpoint` differentiates by all of them, and dropout's keys have no gradient.
    """

    def pure(params, x):
        with lent(layer, params):
            return run(x)

    return mx.checkpoint(pure)(layer.trainable_parameters(), x)


class Place(NamedTuple):
    """Where a rank's tokens are in the whole batch: one of equal columns, rows from `row` on."""

    row: int
    rows: int  # of the batch; a rank may have more, of padding
    column: int
    columns: int


def _dropout(x: mx.array, rate: float, key: mx.array, place: Place | None) -> mx.array:
    """Drawn for the whole batch, so that what is dropped does not depend on who has which part of it."""
    B, T, C = x.shape
    row, rows, column, columns = place or (0, B, 0, 1)
    keep = mx.random.bernoulli(1 - rate, (rows, T * columns, C), key=key)
    if place is not None:
        keep = keep[row : row + B, column * T : (column + 1) * T]
        keep = mx.pad(keep, [(0, B - len(keep)), (0, 0), (0, 0)])
    return mx.where(keep, x * (1 / (1 - rate)), 0).astype(x.dtype)


def check_tokens(name: str, tokens: mx.array, vocab_size: int) -> None:
    """Refuse ids without a row in the embedding: to read beyond it can end the process."""
    if not isinstance(tokens, mx.array) or not mx.issubdtype(tokens.dtype, mx.integer):
        got = tokens.dtype if isinstance(tokens, mx.array) else type(tokens).__name__
        raise InputError(f"{name} must be an array of integers, got {got}")
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise InputError(f"{name} must be [B, T] with B, T >= 1, got {tokens.shape}")
    try:
        ends: list[Any] = [tokens.min().item(), tokens.max().item()]
    except ValueError:  # traced: there is nothing to see
        return
    outside = [i for i in ends if not 0 <= i < vocab_size]
    if outside:
        raise InputError(f"{name} must be from 0 to {vocab_size - 1}, got {outside[0]}")


class LanguageModel(nn.Module):
    """Tokens to logits of the next token. Fresh weights depend on the config and `seed` alone."""

    def __init__(self, config: ModelConfig, seed: int = 0):
        super().__init__()
        if not isinstance(config, ModelConfig):
            raise InputError(f"[LanguageModel] config must be a ModelConfig, got {repr(config)[:60]}")
        check_whole("seed", seed, 0, 2**64 - 1)
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dims)
        self.layers = [Block(config, kind) for kind in config.mixers]
        self.norm = nn.RMSNorm(config.dims, eps=config.norm_eps)
        init_weights(self, seed)

    def __call__(
        self,
        tokens: mx.array,
        cache: list | None = None,
        mask: mx.array | None = None,
        segment_ids: mx.array | None = None,
        *,
        dropout: float = 0.0,
        key: mx.array | None = None,
        checkpoint: bool = False,
        group: Any = None,
        place: Place | None = None,
    ) -> mx.array:
        """tokens [B, T], from 0 to V - 1, to logits [B, T, V].

        Other ids are refused, for which the tokens must have been computed: a loop that wants to draw one
        token while it computes the next calls `logits`, and vouches for them. In a compiled or mapped
        function ids cannot be looked at, and are the caller's to check.

        cache: from `make_cache`, updated in place. mask, segment_ids: [B, T], as the mixer takes them.
        For training: `dropout` after every mixer and MLP, drawn from `key` and from nothing else; with
        `checkpoint` a block keeps its input only and is computed again in the backward pass. `group`: over
        whose ranks the tokens are split, as the mixers take it; then a rank may have none. `place`: where
        these tokens are in a batch that ranks have parts of; dropout is then that of the batch.
        """
        if group is None or not isinstance(tokens, mx.array) or tokens.ndim != 2 or tokens.shape[1]:
            check_tokens("[LanguageModel] tokens", tokens, self.config.vocab_size)
        options: Any = {
            "dropout": dropout,
            "key": key,
            "checkpoint": checkpoint,
            "group": group,
            "place": place,
        }
        return self.logits(tokens, cache, mask, segment_ids, **options)

    def logits(self, tokens: mx.array, *arguments, **options) -> mx.array:
        """As the call, of ids that are known to be in range."""
        return self.embedding.as_linear(self.features(tokens, *arguments, **options))

    def features(
        self,
        tokens,
        cache=None,
        mask=None,
        segment_ids=None,
        *,
        dropout=0.0,
        key=None,
        checkpoint=False,
        group=None,
        place=None,
    ) -> mx.array:
        """What the logits are a linear map of, [B, T, dims]; of ids that are known to be in range."""
        if group is not None and checkpoint:
            raise InputError("[LanguageModel] checkpoint does not go with a group")
        if not 0 <= check_number("[LanguageModel] dropout", dropout) < 1:
            raise InputError(f"[LanguageModel] dropout must be from 0 to below 1, got {dropout}")
        if dropout and not (isinstance(key, mx.array) and key.dtype == mx.uint32 and key.shape == (2,)):
            got = f"{key.dtype} {key.shape}" if isinstance(key, mx.array) else repr(key)[:60]
            raise InputError(f"[LanguageModel] dropout needs a key of mlx.core.random, got {got}")
        whole = isinstance(cache, list) and len(cache) == len(self.layers) and None not in cache
        if cache is not None and not whole:
            got = f"{len(cache)} entries" if isinstance(cache, list) else repr(cache)[:60]
            raise InputError(f"[LanguageModel] cache must be what make_cache gives, got {got}")
        x = self.embedding(tokens)
        drops: Any = [None] * len(self.layers)
        if dropout:
            # Drawn outside the blocks: a checkpointed block must see the same key when it is computed again.
            keys = mx.random.split(key, 2 * len(self.layers)).reshape(len(self.layers), 2, -1)
            drops = [[partial(_dropout, rate=dropout, key=k, place=place) for k in pair] for pair in keys]
        for i, layer in enumerate(self.layers):

            def run(x, layer=layer, cache=None if cache is None else cache[i], drops=drops[i]):
                return layer(x, mask, segment_ids, cache, drops, group)

            x = _checkpointed(layer, run, x) if checkpoint else run(x)
        return self.norm(x)

    def make_cache(self) -> list:
        return [layer.mixer.make_cache() for layer in self.layers]

    @property
    def num_parameters(self) -> int:
        return sum(parameter_counts(self).values())


# name -> how it starts; the first that matches counts. `fan_in` is a matrix's number of columns.
Rule = Callable[[mx.array, mx.array, ModelConfig], mx.array]


def _normal(scale: Callable[[mx.array, ModelConfig], float]) -> Rule:
    return lambda old, key, config: scale(old, config) * mx.random.normal(old.shape, key=key)


def _uniform(old: mx.array, key: mx.array, config: ModelConfig) -> mx.array:
    bound = old.shape[-1] ** -0.5
    return mx.random.uniform(-bound, bound, old.shape, key=key)


INIT_TABLE: list[tuple[str, str, Rule]] = [
    (r"embedding\.weight", "normal, 0.02", _normal(lambda w, c: 0.02)),
    (
        r".*\.(out_proj|down_proj)\.weight",  # these add to the residual stream, 2 per layer
        "normal, 1/√(fan_in · 2 layers)",
        _normal(lambda w, c: (w.shape[-1] * 2 * c.num_layers) ** -0.5),
    ),
    (r".*_proj\.weight", "normal, 1/√fan_in", _normal(lambda w, c: w.shape[-1] ** -0.5)),
    (r".*\.conv\.weight", "uniform in ±1/√width", _uniform),
    (
        r".*(decay|step)_gate\.(weight|bias)",
        "as the layer has it: 0; decay's bias: memories of 8 to 512",
        lambda w, k, c: w,
    ),
    (r"(.*\.)?\w*norm\.weight", "1", lambda w, k, c: mx.ones(w.shape)),
]


def init_weights(model: LanguageModel, seed: int) -> None:
    """Set every parameter by `INIT_TABLE`; a parameter that no row names is an error."""
    named = sorted(flat(model.parameters()).items(), key=lambda item: item[0])
    keys = mx.random.split(mx.random.key(seed), len(named))
    fresh = []
    for (name, old), key in zip(named, keys, strict=True):
        rule = next((rule for pattern, _, rule in INIT_TABLE if re.fullmatch(pattern, name)), None)
        if rule is None:
            raise ValueError(f"[init_weights] no row of INIT_TABLE names {name}")
        fresh.append((name, rule(old, key, model.config)))
    model.update(tree_unflatten(fresh))
