"""Caches of a whole model: one per layer, `HLACache` of constant size or `KVCache` that grows."""

from __future__ import annotations

import mlx.core as mx
from mlx.utils import tree_flatten

BUFFER_STEP = 256


class KVCache:
    """Keys and values of everything read so far, for softmax attention, and the convolution's last inputs.

    The buffers grow by `BUFFER_STEP` tokens at a time; only the first `offset` of them are real.
    """

    def __init__(self):
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.conv: mx.array | None = None
        self.offset = 0

    def append(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Add keys and values [B, H, T, D]; returns all of them."""
        end = self.offset + keys.shape[2]
        if self.keys is None or end > self.keys.shape[2]:
            self.keys = _grown(self.keys, keys, self.offset, end)
            self.values = _grown(self.values, values, self.offset, end)
        self.keys[:, :, self.offset : end] = keys
        self.values[:, :, self.offset : end] = values
        self.offset = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    @property
    def state(self):
        if self.keys is None:
            return None, None, self.conv
        return self.keys[:, :, : self.offset], self.values[:, :, : self.offset], self.conv

    @state.setter
    def state(self, value):
        self.keys, self.values, self.conv = value
        self.offset = 0 if self.keys is None else self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in arrays(self.state))

    def empty(self) -> bool:
        return self.keys is None

    def is_trimmable(self) -> bool:
        return False  # the convolution's inputs are not kept


def _grown(buffer: mx.array | None, like: mx.array, used: int, needed: int) -> mx.array:
    B, H, _, D = like.shape
    room = -(-needed // BUFFER_STEP) * BUFFER_STEP
    if buffer is None:
        return mx.zeros((B, H, room, D), like.dtype)
    return mx.concatenate([buffer[:, :, :used], mx.zeros((B, H, room - used, D), like.dtype)], axis=2)


def arrays(tree) -> list[mx.array]:
    """The arrays of a state, in order, without the Nones."""
    return [a for _, a in tree_flatten(tree) if isinstance(a, mx.array)]


def fill(tree, leaves):
    """The tree with its arrays replaced, in order, by `leaves`; named tuples become plain ones."""
    leaves = iter(leaves)

    def walk(node):
        if isinstance(node, mx.array):
            return next(leaves)
        if isinstance(node, list | tuple):
            return list(map(walk, node)) if isinstance(node, list) else tuple(map(walk, node))
        return node

    return walk(tree)


def cache_bytes(cache: list) -> int:
    return sum(c.nbytes for c in cache)


def eval_cache(cache: list) -> None:
    mx.eval([arrays(c.state) for c in cache])
