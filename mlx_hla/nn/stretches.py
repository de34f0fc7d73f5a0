"""What a layer needs of the tokens before its own, where a sequence is split over the ranks of a group.

The convolution looks at its last inputs and the window at the last W keys and values, which may be another
rank's, or several others' where stretches are short. Each rank sends the last W of its real tokens; what
stands before a rank is put together from those before it, up to the last border of a segment.
"""

# B batch, T time, W tokens looked back at, C numbers a token, R ranks

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlx_hla.ops.parallel import Turns

from .padding import runs_of


class Stretches:
    """One call's view of a split sequence: real tokens `lengths` [B] (None: all T) and segments `[B, T]`."""

    def __init__(self, group: Any, x: mx.array, lengths: mx.array | None, segment_ids: mx.array | None):
        B, T = x.shape[:2]
        self.turns, self.group = Turns(group, x), group
        self.lengths = mx.full((B,), T) if lengths is None else lengths
        self.T, self.segment_ids = T, segment_ids
        self.border = mx.zeros((B,), mx.bool_)
        if segment_ids is not None:
            real = None if lengths is None else mx.arange(T) < lengths[:, None]
            ids, there = self.turns.last_ids(segment_ids, real)
            self.border = there & (self.lengths > 0) & (segment_ids[:, 0] != ids)

    def tokens(self) -> tuple[mx.array, mx.array]:
        """(real tokens of the ranks before this one, of all), int32 [B]."""
        every = self.turns.counted(self.lengths.astype(mx.int32))
        before = mx.concatenate([mx.zeros_like(every[:1]), mx.cumsum(every, axis=0)])
        return before[self.group.rank()], before[-1]

    def look_back(
        self, x: mx.array, W: int, held: tuple[mx.array, mx.array] | None
    ) -> tuple[tuple[mx.array, mx.array], tuple[mx.array, mx.array]]:
        """(what stands before this rank, what stands after all): each the last tokens [B, W, C] of the
        stream, the newest at the end, zeros where there are none, and how many there are, int32 [B].

        x [B, T, C]: this rank's; held: the same before the whole sequence.
        """
        B, _, C = x.shape
        own, dtype = self._last(x, W).astype(mx.float32), x.dtype
        n, whole = self._run(W)
        kept = mx.minimum(self.lengths, W)
        about = mx.stack([a.astype(mx.float32) for a in (n, whole, kept, self.border)])
        sums = self.turns.gathered(mx.concatenate([own.reshape(-1), about.reshape(-1)]))
        state, count = mx.zeros((B, W, C)), mx.zeros((B,), mx.int32)
        if held is not None:
            state, count = self.turns.shared(held[0].astype(mx.float32)), held[1]
        states, counts = [], []
        for each in sums:
            own_j, about_j = each[: own.size].reshape(own.shape), each[own.size :].reshape(4, B)
            n_j, whole_j, kept_j, border_j = mx.stop_gradient(about_j).astype(mx.int32)
            count = mx.where(border_j > 0, 0, count)
            states.append(state)
            counts.append(count)
            # Its last ones come after the last of what was there before.
            place, shift = mx.arange(W)[None, :, None], kept_j[:, None, None]
            index = mx.where(place < W - shift, place + shift, place + W)
            state = mx.take_along_axis(mx.concatenate([state, own_j], axis=1), index, axis=1)
            count = mx.where(whole_j > 0, mx.minimum(W, count + n_j), n_j)
        rank = self.group.rank()
        before = mx.stack(states)[rank], mx.stack(counts)[rank]
        return self._cut(*before, dtype), self._cut(state, count, dtype)

    def _last(self, x: mx.array, W: int) -> mx.array:
        padded = mx.pad(x, [(0, 0), (W, 0), (0, 0)])
        index = self.lengths[:, None, None] + mx.arange(W)[None, :, None]
        return mx.take_along_axis(padded, index, axis=1)

    def _run(self, W: int) -> tuple[mx.array, mx.array]:
        """(tokens of the last segment among the last W, whether it has no border within), [B]."""
        if self.segment_ids is None:
            return mx.minimum(self.lengths, W), mx.ones(self.lengths.shape, mx.bool_)
        runs = runs_of(self.segment_ids, 0)
        last = mx.take_along_axis(runs, mx.maximum(self.lengths - 1, 0)[:, None], axis=1)
        inside = (runs == last) & (mx.arange(self.T) < self.lengths[:, None])
        n = mx.minimum(inside.sum(axis=1), W)
        return n, (last[:, 0] == 0) | (self.lengths == 0)

    def _cut(self, state: mx.array, count: mx.array, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        W = state.shape[1]
        there = mx.arange(W) >= W - count[:, None]
        return mx.where(there[..., None], state, 0).astype(dtype), count.astype(mx.int32)
