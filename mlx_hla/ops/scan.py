"""Decay factors and the scan over chunk states, both exact where a decay is 0.

A decay g enters as l = log g, clamped at `LOG_ZERO`, whose exponential is 0 in float32: a product
that holds an exact zero is an exact zero, and nothing ever divides by it. Differences of running
sums of l decide how much of token j is left at token i, so they must not cancel: each l is split in
`hi`, a multiple of 2^-10 whose sums float32 holds exactly, and a rest `lo` below 2^-11 [1].

[1] 128 tokens * 128 = 2^14, and 14 + 10 bits = float32's 24.
"""

# B batch, T time, H kv heads, G query heads per kv head, D key dim, V value dim, N chunks, W chunk width

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

LOG_ZERO = -128.0  # exp(-128) underflows to 0 in float32
GRID = 1024.0
MAX_SPAN = 128  # terms in one running sum, see [1]
GROUP = 32  # chunks that one matrix product of the scan covers
TINY = 1e-30  # stands for g where d(g^p)/dg divides by g; float32 keeps 1e-30 apart from 0


def log_decay(g: mx.array, power: int) -> mx.array:
    """log(g^power) in [LOG_ZERO, 0], LOG_ZERO where g is 0."""
    safe = mx.where(g > 0, g, 1.0)
    return mx.where(g > 0, mx.maximum(power * mx.log(safe), LOG_ZERO), LOG_ZERO)


class Cumulative(NamedTuple):
    """Running sums of log decays along the last axis, in two float32 parts."""

    hi: mx.array
    lo: mx.array

    def __getitem__(self, index) -> Cumulative:
        return Cumulative(self.hi[index], self.lo[index])

    def minus(self, other: Cumulative) -> mx.array:
        return (self.hi - other.hi) + (self.lo - other.lo)

    def total(self) -> mx.array:
        """The whole sum, clamped so that sums of sums stay on the grid."""
        return mx.maximum(self.hi[..., -1] + self.lo[..., -1], LOG_ZERO)


def cumulative(l: mx.array) -> Cumulative:
    """Inclusive running sums of l along its last axis (at most `MAX_SPAN` long)."""
    hi = mx.round(l * GRID) / GRID
    return Cumulative(mx.cumsum(hi, axis=-1), mx.cumsum(l - hi, axis=-1))


def from_start(c: Cumulative) -> mx.array:
    """b_t = Π_{s≤t} g_s."""
    return mx.exp(c.hi + c.lo)


def to_end(c: Cumulative) -> mx.array:
    """b_W / b_j = Π_{s>j} g_s."""
    return mx.exp(c[..., -1:].minus(c))


def scan_states(x: mx.array, total: mx.array | None, first: mx.array | None, reverse: bool = False):
    """Linear recurrence over N chunks, by products with small triangular matrices of decays.

    x `[B, H, N, F]` float32 is what each chunk adds, total `[B, H, N]` the log decay over each chunk
    (None: no decay) and first `[B, H, F]` the state before the first chunk (None: zero). With
    ρ = exp(total):

    - forward: s_{n+1} = ρ_n s_n + x_n with s_0 = first; returns the N states s_n before each
      chunk and the last one, s_N.
    - reverse (its adjoint): e_n = ρ_n e_{n+1} + x_n with e_N = first; returns the N values
      e_{n+1} and e_0.

    More than `GROUP` chunks are cut into groups and the group totals scanned the same way, so there
    is no loop over chunks: the depth is log_GROUP N.
    """
    B, H, N, F = x.shape
    groups = -(-N // GROUP)
    span = -(-N // groups)
    if groups * span != N:
        extra = groups * span - N
        x = mx.pad(x, [(0, 0), (0, 0), (0, extra), (0, 0)])
        total = None if total is None else mx.pad(total, [(0, 0), (0, 0), (0, extra)])
    x = x.reshape(B, H, groups, span, F)
    # Row r of `weights` makes the state at boundary r = 0..span from what the group's chunks add.
    if total is None:
        weights = mx.tri(span + 1, span, -1)
        weights, carried = (1.0 - weights if reverse else weights), None
    else:
        sums = cumulative(total.reshape(B, H, groups, span))
        edge = Cumulative(*(mx.pad(part, [(0, 0)] * 3 + [(1, 0)]) for part in sums))
        row, col = edge[..., :, None], edge[..., None, :]
        before = mx.tri(span + 1, span, -1, dtype=mx.bool_)
        if reverse:  # e_r = Σ_{m≥r} exp(c_m − c_r) x_m
            weights = mx.exp(mx.minimum(col[..., :-1].minus(row), 0.0))
            weights = mx.where(before, 0.0, weights)
            carried = mx.exp(edge[..., -1:].minus(edge))
        else:  # s_r = Σ_{m<r} exp(c_r − c_{m+1}) x_m
            weights = mx.exp(mx.minimum(row.minus(col[..., 1:]), 0.0))
            weights = mx.where(before, weights, 0.0)
            carried = mx.exp(edge.hi + edge.lo)
    y = weights @ x  # [B, H, groups, span + 1, F]
    if groups == 1:
        carry, last = None if first is None else first[:, :, None], None
    else:
        whole = None if total is None else mx.maximum(sums.total(), LOG_ZERO)
        ends = y[..., 0, :] if reverse else y[..., -1, :]
        carry, last = scan_states(ends, whole, first, reverse)
    if carry is not None:
        carry = carry[..., None, :]
        y = y + (carry if carried is None else carried[..., None] * carry)
    inner = y[..., 1:, :] if reverse else y[..., :-1, :]
    if last is None:
        last = y[:, :, 0, 0 if reverse else span]
    return inner.reshape(B, H, groups * span, F)[:, :, :N], last
