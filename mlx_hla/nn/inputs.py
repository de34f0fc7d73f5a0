"""Checks of what a layer is given: who, what was expected, what came."""

# B batch, T time

from __future__ import annotations

from typing import Any

import mlx.core as mx


def check_input(who: str, x: Any, dims: int) -> None:
    """x must be [B, T, dims] with at least one token, of a float type."""
    if not isinstance(x, mx.array):
        raise ValueError(f"[{who}] x must be an mlx array, got {type(x).__name__}")
    if x.ndim != 3 or x.shape[2] != dims or 0 in x.shape:
        raise ValueError(f"[{who}] x must be [B, T, {dims}] with B, T >= 1, got {x.shape}")
    if not mx.issubdtype(x.dtype, mx.floating):
        raise ValueError(f"[{who}] x must be floating point, got {x.dtype}")


def check_array(who: str, name: str, what: str, x: Any, shape: tuple[int, ...], kind: Any) -> None:
    """x must be None, or an array of this shape and kind of dtype; what: the kind in words."""
    if x is None:
        return
    is_array = isinstance(x, mx.array)
    if not is_array or x.shape != shape or not mx.issubdtype(x.dtype, kind):
        got = f"{x.dtype} {x.shape}" if is_array else " ".join(repr(x).split())[:60]
        raise ValueError(f"[{who}] {name} must be {what} {shape}, got {got}")
