"""Trees of arrays: parameters, optimizer states, caches."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map


def flat(tree: Any) -> dict[str, mx.array]:
    """The arrays of a tree by their dotted names, in order."""
    return {name: a for name, a in tree_flatten(tree) if isinstance(a, mx.array)}  # type: ignore[str-unpack]


def is_float(a: mx.array) -> bool:
    return mx.issubdtype(a.dtype, mx.floating)


def cast(tree: Any, dtype: mx.Dtype) -> Any:
    """The tree with its floats in `dtype`; integers (packed weights, a step's number) stay."""
    return tree_map(lambda a: a.astype(dtype) if is_float(a) else a, tree)


def finite(tree: Any) -> bool:
    """Whether every number in a tree of arrays is finite."""
    parts = [mx.isfinite(a).all() for a in flat(tree).values() if is_float(a)]
    return not parts or bool(mx.stack(parts).all().item())
