"""What a decoder of mlx-lm's is made of: its layers, the attention of each, read and checked for `swap`."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import mlx.nn as nn

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS = ("q_norm", "k_norm")
_HEADS = ("n_heads", "num_heads", "num_attention_heads")
_KV_HEADS = ("n_kv_heads", "num_kv_heads", "num_key_value_heads")


class Sizes(NamedTuple):
    """What `HLAttention` is called with, under its names."""

    dims: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int


def blocks_of(model: Any) -> list[Any]:
    """The model's layers, each with an attention."""
    blocks = getattr(model, "layers", None) if isinstance(model, nn.Module) else None
    if not isinstance(blocks, list) or not blocks:
        raise ValueError(
            f"[swap] model must be a model of mlx-lm's with `layers`, got {type(model).__name__}"
        )
    for i, block in enumerate(blocks):
        if not isinstance(getattr(block, "self_attn", None), nn.Module):
            raise ValueError(f"[swap] layer {i} has no `self_attn`: {type(model).__module__} is not served")
    return blocks


def chosen_of(layers: Any, count: int) -> list[int]:
    """The indices, in order, that `swap`'s argument `layers` means in a model of so many layers."""
    every = list(range(count))
    named = {"odd": every[1::2], "even": every[::2]}
    if isinstance(layers, str) and layers in named:
        chosen = named[layers]
    elif isinstance(layers, int) and not isinstance(layers, bool) and layers > 0:
        chosen = every[layers - 1 :: layers]
    elif isinstance(layers, slice):
        try:
            chosen = every[layers]
        except (TypeError, ValueError) as e:
            raise ValueError(f"[swap] layers must be a slice of integers, got {layers!r}: {e}") from None
    elif isinstance(layers, list | tuple | range) and all(type(i) is int for i in layers):
        outside = [i for i in layers if not -count <= i < count]
        if outside:
            raise ValueError(f"[swap] layers must be from {-count} to {count - 1}, got {outside[0]}")
        chosen = sorted({i % count for i in layers})
    else:
        raise ValueError(
            '[swap] layers must be indices, a slice, "odd", "even" or a number n of at least 1, '
            f"got {repr(layers)[:60]}"
        )
    if not chosen:
        raise ValueError(f"[swap] layers={layers!r} chooses none of {count} layers")
    return chosen


def sizes_of(attention: Any, i: int, rope: bool) -> Sizes:
    """The sizes of a layer's attention, or a ValueError that says what cannot be read."""

    def refuse(what: str) -> ValueError:
        kind = f"{type(attention).__module__}.{type(attention).__name__}"
        return ValueError(f"[swap] layer {i}: {what}; {kind} is not served")

    names = list(inspect.signature(type(attention).__call__).parameters)[1:]
    if names != ["x", "mask", "cache"]:
        raise refuse(f"its attention must be called with (x, mask, cache), not ({', '.join(names)})")
    held = {name for name in attention if not name.startswith("_")}
    lacking = [name for name in PROJECTIONS if name not in held]
    if lacking:
        raise refuse(f"its attention has no {lacking[0]}")
    unknown = sorted(held - {*PROJECTIONS, *NORMS, "rope"})
    if unknown:
        raise refuse(f"its attention has {unknown[0]}, which would be lost")
    heads = next((n for name in _HEADS if type(n := getattr(attention, name, None)) is int), None)
    kv_heads = next((n for name in _KV_HEADS if type(n := getattr(attention, name, None)) is int), heads)
    if not heads or not kv_heads:
        raise refuse(f"its number of heads must be one of {', '.join(_HEADS)}")
    shapes = {}
    for name in PROJECTIONS:
        shape = _shape(attention[name])
        if shape is None:
            raise refuse(f"its {name} must be a linear layer, quantised or with an adapter, not a "
                         f"{type(attention[name]).__name__}")  # fmt: skip
        shapes[name] = shape
    dims = shapes["q_proj"][1]
    head_dim, value_dim = shapes["q_proj"][0] // heads, shapes["v_proj"][0] // kv_heads
    want = {
        "q_proj": (heads * head_dim, dims),
        "k_proj": (kv_heads * head_dim, dims),
        "v_proj": (kv_heads * value_dim, dims),
        "o_proj": (dims, heads * value_dim),
    }
    for name, shape in want.items():
        if shapes[name] != shape:
            raise refuse(f"its {name} must be {shape} for {heads} and {kv_heads} heads, got {shapes[name]}")
    for name in NORMS:
        weight = attention[name].get("weight") if name in held else None
        if weight is not None and weight.shape != (head_dim,):
            raise refuse(f"its {name} must be of one head, {head_dim} wide, got {weight.shape}")
    if rope and "rope" not in held:
        raise refuse("rope=True, and it has no `rope`")
    return Sizes(dims, heads, kv_heads, head_dim, value_dim)


def _shape(layer: Any) -> tuple[int, int] | None:
    """(outputs, inputs) of a linear layer; None if it is none."""
    layer = getattr(layer, "linear", layer)  # of an adapter
    if not isinstance(layer, nn.Linear | nn.QuantizedLinear):
        return None
    outputs, inputs = layer.weight.shape
    return outputs, inputs * 32 // layer.bits if isinstance(layer, nn.QuantizedLinear) else inputs
