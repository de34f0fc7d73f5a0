"""Higher-order attention in chosen layers of a model of mlx-lm's.

    from mlx_lm import load
    from mlx_hla.mlx_lm import freeze_rest, swap

    model, tokenizer = load(...)
    swap(model, layers="odd", operator="hla2")   # then train: what a layer computes is another function now
    freeze_rest(model)

It serves decoders whose layers have a `self_attn` with `q_proj`, `k_proj`, `v_proj`, `o_proj`, called with
`(x, mask, cache)`: Llama, Mistral, Qwen2, Qwen3, Gemma and more. Other layers are refused in one line.

What is kept: the four projections as they are, biases, quantisation and adapters included, under their
names; the number of heads and their groups; norms of queries and keys, where the layer has them; with
`rope=True` its rotary positions. What is fresh, and how it starts:

    q_norm, k_norm  where the layer has none: gains 1
    conv            the identity: the last tap 1, the others 0, no activation
    out_norm        the size of a value: the RMS of v_proj over random inputs that the layer's norm has seen
    decay_gate      memories of 8 to 512 tokens, as in `HLAttention`

What goes: softmax, its scale, soft caps of its logits, and a sliding window, whose place the decay takes.

Caches. `model.make_cache()` gives an `ArraysCache` for a swapped layer and the model's own for the others. An
mlx-lm model makes its mask from the cache of one layer, often the first; where that one is swapped, the mask
comes from a layer that still has softmax attention. A swapped layer needs no causal mask, and takes the
padding of a batch from its own cache. As a state cannot be unread, such a cache cannot be trimmed; and
`max_kv_size`, which mlx-lm heeds for models without a `make_cache` only, is not heeded.

Weights. `swap` a model that was built in the same way, then `load_weights`. The folder's config.json says
nothing of a swap: `mlx_lm.load` alone cannot build it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_hla import lm_caches
from mlx_hla.decoders import NORMS, PROJECTIONS, Sizes, blocks_of, chosen_of, sizes_of
from mlx_hla.errors import about_import
from mlx_hla.nn import HLAttention

try:
    from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache
except ImportError as e:
    raise ImportError(about_import(e), name=e.name) from e

# B batch, H heads, T time, D key dim

_SAMPLES = 256


class SwappedAttention(HLAttention):
    """`HLAttention` over the projections of an attention of mlx-lm's, with its call."""

    def __init__(self, attention: nn.Module, sizes: Sizes, value_size: float, rope: bool, **options: Any):
        super().__init__(**sizes._asdict(), **options)
        for name in ("qkv_proj", "out_proj"):
            del self[name]  # never computed: the projections below take their place
        for name in (*PROJECTIONS, *(NORMS if self.qk_norm == "rms" else ())):
            if name in attention:
                self[name] = attention[name]
        if rope:
            self.rope = attention["rope"]
        if "conv" in self:
            self.conv.activation = False
            self.conv.weight = mx.zeros(self.conv.weight.shape)
            self.conv.weight[:, -1] = 1
        if "out_norm" in self:
            self.out_norm.weight = mx.full((sizes.value_dim,), value_size)

    def __call__(  # type: ignore[override]
        self, x: mx.array, mask: mx.array | str | None = None, cache: ArraysCache | None = None
    ) -> mx.array:
        """x [B, T, dims] to [B, T, dims].

        mask: what softmax attention may see; this layer is causal by itself, and does not look at it.
        cache: of this layer, from the model's `make_cache`. It knows which tokens of a batch are padding.
        """
        if cache is None:
            return super().__call__(x)
        if not isinstance(cache, ArraysCache):
            raise ValueError(
                "[SwappedAttention] cache must be an ArraysCache, from the model's make_cache after the "
                f"swap, got {type(cache).__name__}"
            )
        T = x.shape[1]
        work = lm_caches.unpacked(cache, self._state)
        y = super().__call__(x, lm_caches.padding([cache], T), cache=work)
        lm_caches.pack(work, cache, T)
        return y

    def _project(self, x: mx.array) -> mx.array:
        return mx.concatenate([self.q_proj(x), self.k_proj(x), self.v_proj(x)], axis=-1)

    def _project_out(self, o: mx.array) -> mx.array:
        return self.o_proj(o)

    def lm_cache(self) -> ArraysCache:
        return lm_caches.empty(self._state)

    def _rotated(self, a: mx.array, offset: Any) -> mx.array:
        return self.rope(a, offset=offset)

    @functools.cached_property
    def _state(self) -> Any:
        return lm_caches.template(super().__call__, self.dims)


class _Caches(list):
    """The caches of a model. A loop over them gives each layer its own; an index asks for what makes a mask.

    mlx-lm's models do both, and index for nothing else: `create_attention_mask(h, cache[0])`.
    """

    def __init__(self, caches: Sequence[Any], source: Sequence[int | None]):
        super().__init__(caches)
        self._source = source

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, int):
            return super().__getitem__(index)
        source = self._source[index]
        # No layer of this kind is left, so nobody reads its mask.
        return None if source is None else super().__getitem__(source)


def swap(
    model: nn.Module,
    layers: Sequence[int] | slice | str | int = "odd",
    operator: str | int = "hla2",
    *,
    decay: str | None = "gate",
    qk_norm: str | None = "rms",
    conv_size: int | None = 4,
    rope: bool = False,
    output_norm: bool = True,
    normalize: bool = False,
    backend: str | None = None,
) -> list[int]:
    """Put `HLAttention` into layers of an mlx-lm model, in place; returns their indices.

    layers: indices, from the end where negative; a slice; "odd" (1, 3, ...) or "even" (0, 2, ...); or a
        number n, for the last layer of every n: n - 1, 2n - 1, ...
    rope: True keeps the rotary positions of the layer.
    qk_norm: "rms" takes the layer's own norms of queries and keys where it has them; others drop those.
    The rest is as in `HLAttention`. Nothing is changed unless all of the layers can be swapped.
    """
    blocks = blocks_of(model)
    chosen = chosen_of(layers, len(blocks))
    if not isinstance(rope, bool):
        raise ValueError(f"[swap] rope must be True or False, got {repr(rope)[:60]}")
    options: dict[str, Any] = {"operator": operator, "decay": decay, "qk_norm": qk_norm}
    options |= {
        "conv_size": conv_size,
        "output_norm": output_norm,
        "normalize": normalize,
        "backend": backend,
    }
    fresh: dict[int, SwappedAttention] = {}
    caches = _own_caches(model)
    if len(caches) != len(blocks):
        raise ValueError(
            f"[swap] the model has {len(caches)} caches for {len(blocks)} layers: it is not served"
        )
    for i in chosen:
        if not isinstance(caches[i], KVCache | RotatingKVCache):
            kind = type(caches[i]).__name__
            raise ValueError(f"[swap] layer {i} has a {kind}, more than keys and values: it is not served")
        attention = blocks[i].self_attn
        if isinstance(attention, SwappedAttention):
            raise ValueError(f"[swap] layer {i} is swapped already")
        sizes = sizes_of(attention, i, rope)
        size = _value_size(blocks[i], sizes.dims) if output_norm is True else 1.0
        fresh[i] = SwappedAttention(attention, sizes, size, rope, **options)
    for i, attention in fresh.items():
        blocks[i].self_attn = attention
    _mix(model)
    return chosen


def freeze_rest(model: nn.Module, *, projections: bool = True) -> None:
    """Let the swapped layers train and nothing else; without `projections`, what is fresh in them alone.

    A quantised projection has no gradient and stays frozen; so does one with an adapter, and that trains.
    """
    swapped = [b.self_attn for b in blocks_of(model) if isinstance(b.self_attn, SwappedAttention)]
    if not swapped:
        raise ValueError("[freeze_rest] the model has no swapped layer")
    model.freeze()
    for attention in swapped:
        attention.unfreeze()
        for name in PROJECTIONS:
            base = getattr(attention[name], "linear", None)  # of an adapter
            if base is not None:
                base.freeze()
            elif not projections or isinstance(attention[name], nn.QuantizedLinear):
                attention[name].freeze()


def _value_size(block: Any, dims: int) -> float:
    """The RMS of the values of random inputs: the output of a swapped layer starts at their size."""
    x = mx.random.normal((1, _SAMPLES, dims), key=mx.random.key(0))
    norm = getattr(block, "input_layernorm", None)
    v = block.self_attn.v_proj(x if norm is None else norm(x))
    return float(mx.sqrt(mx.square(v.astype(mx.float32)).mean()).item())  # type: ignore[arg-type]


def _stock(model: Any) -> Any:
    """mlx-lm's class of a model, swapped or not."""
    return getattr(type(model), "_stock", type(model))


def _own_caches(model: Any) -> list[Any]:
    """The caches that the model had without a swap."""
    stock = _stock(model)
    return stock.make_cache(model) if hasattr(stock, "make_cache") else [KVCache() for _ in model.layers]


def _mix(model: Any) -> None:
    """Give the model the caches of both kinds of layer, and masks from those that need them."""
    stock = _stock(model)

    def make_cache(self: Any) -> list[Any]:
        return [
            b.self_attn.lm_cache() if isinstance(b.self_attn, SwappedAttention) else c
            for b, c in zip(self.layers, _own_caches(self), strict=True)
        ]

    # Layers with caches of one class have one mask: all that see everything, all that see a window.
    kinds = [type(c) for c in _own_caches(model)]
    kept = [i for i, b in enumerate(model.layers) if not isinstance(b.self_attn, SwappedAttention)]
    source = [
        i if i in kept else next((j for j in kept if kinds[j] is kinds[i]), None) for i in range(len(kinds))
    ]

    @functools.wraps(stock.__call__)
    def call(self: Any, inputs: mx.array, cache: Any = None, *rest: Any, **options: Any) -> Any:
        return stock.__call__(
            self, inputs, None if cache is None else _Caches(cache, source), *rest, **options
        )

    def cast_predicate(self: Any) -> Callable[[str], bool]:
        own = stock.cast_predicate.fget(self) if hasattr(stock, "cast_predicate") else lambda path: True
        return lambda path: "_gate." not in path and own(path)

    # Python looks a call up in the class. A class of this model's own leaves other models alone.
    members = {name: getattr(stock, name) for name in ("__module__", "__qualname__", "__doc__")}
    members |= {"__call__": call, "make_cache": make_cache, "cast_predicate": property(cast_predicate)}
    members["_stock"] = stock
    model.__class__ = type(stock.__name__, (stock,), members)
