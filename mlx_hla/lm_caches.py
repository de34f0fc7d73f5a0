"""The state of a layer of ours in mlx-lm's `ArraysCache`.

mlx-lm merges, splits, copies and saves caches by their classes, and knows none but its own. So a layer's
state lies in an `ArraysCache`, array by array, and is put together again for the length of a call.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from mlx_hla.errors import about_import
from mlx_hla.nn import HLACache
from mlx_hla.nn.cache import arrays, fill

try:
    from mlx_lm.models.cache import ArraysCache
except ImportError as e:
    raise ImportError(about_import(e), name=e.name) from e

# B batch, T time


def template(layer: Callable[..., mx.array], dims: int) -> Any:
    """A tree like that of the layer's state; its arrays stand for others and hold nothing."""
    cache = HLACache()
    layer(mx.zeros((1, 1, dims)), cache=cache)
    return fill(cache.state, itertools.repeat(mx.array(0)))


def empty(state: Any) -> ArraysCache:
    """A cache with room for a state like this one."""
    return ArraysCache(size=len(arrays(state)))


def unpacked(cache: ArraysCache, state: Any) -> HLACache:
    return HLACache() if cache.empty() else HLACache.from_state(fill(state, cache.cache))


def pack(work: HLACache, cache: ArraysCache, T: int) -> None:
    """Put the state after T tokens into mlx-lm's cache."""
    for i, a in enumerate(arrays(work.state)):
        cache[i] = a
    cache.advance(T)


def padding(cache: Sequence[Any], T: int) -> mx.array | None:
    """The mask of mlx-lm's caches for the next T tokens, [B, T]; None where it masks none of them.

    With a mask a call costs twice as much, and a batch that is not padded carries zeros for its padding.
    """
    first = cache[0]
    if first.left_padding is not None and not mx.any(first.left_padding > 0).item():
        for c in cache:
            c.left_padding = None  # one look, or every later token would count it down
    if first.left_padding is None and (first.lengths is None or not mx.any(first.lengths < T).item()):
        return None
    return first.make_mask(T)
