"""Masked tokens: moved behind the real ones, so that everything after that sees right padding only.

A masked token does not exist. Left padding, right padding and holes all mean the same: the real tokens of a
row are neighbours in the convolution, in the rotation's positions and in the recurrence, and what the row
leaves in a cache is what the real tokens alone would leave. And the borders of packed documents, `runs_of`.
"""

# B batch, T time

from typing import NamedTuple

import mlx.core as mx


class Packing(NamedTuple):
    mask: mx.array  # [B, T] before packing, True = real token
    order: mx.array  # [B, T] packed position -> original position, real tokens first and in their order
    rank: mx.array  # [B, T] original position -> packed position
    lengths: mx.array  # [B] number of real tokens

    def pack(self, x: mx.array) -> mx.array:
        """Real tokens first; masked positions are zero, whatever they held (NaN included)."""
        if x.ndim == 3:
            x = mx.where(self.mask[..., None], x, 0)
            return mx.take_along_axis(x, self.order[..., None], axis=1)
        return mx.take_along_axis(x, self.order, axis=1)

    def unpack(self, y: mx.array) -> mx.array:
        """Inverse of `pack` on [B, T, C]; masked positions are zero."""
        y = mx.take_along_axis(y, self.rank[..., None], axis=1)
        return mx.where(self.mask[..., None], y, 0)


def packing(mask: mx.array) -> Packing:
    T = mask.shape[1]
    position = mx.arange(T, dtype=mx.int32)
    lengths = mask.astype(mx.int32).sum(axis=1)
    # Distinct keys: the order does not lean on a stable sort.
    order = mx.argsort(mx.where(mask, position, position + T), axis=1)
    seen = mx.cumsum(mask.astype(mx.int32), axis=1)
    rank = mx.where(mask, seen - 1, lengths[:, None] + position - seen)
    return Packing(mask, order, rank, lengths)


def runs_of(segment_ids: mx.array, carry: int) -> mx.array:
    """Number the runs of equal ids along T, [B, carry + T]: what is carried belongs to run 0, as the first
    token does."""
    first = mx.zeros((segment_ids.shape[0], carry + 1), mx.int32)
    change = (segment_ids[:, 1:] != segment_ids[:, :-1]).astype(mx.int32)
    return mx.cumsum(mx.concatenate([first, change], axis=1), axis=1)
