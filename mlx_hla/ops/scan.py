"""Decay factors and the scan over chunk states, both exact where a decay is 0.

A decay g enters as log g, with `LOG_ZERO` for log 0: its exponential is 0 in float32, so a product that
holds an exact zero is an exact zero, and nothing divides by it. How much of token j is left at token i
is a difference of two running sums of log g. So that it does not cancel, each log g is split into `hi`,
a multiple of a grid on which float32 adds up exactly, and a rest `lo`; the sums of both are kept.
"""

# B batch, T time, H kv heads, D key dim, V value dim, N chunks, W chunk width

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..devices import compiled, on_gpu
from ..kernels.plan import TINY as TINY  # stands for g = 0 where dg = (g dg) / g is formed

LOG_ZERO = -128.0  # exp(-128) underflows to 0 in float32


# An element-wise function becomes one kernel on a GPU.
fuse = partial(compiled, shapeless=True)


@lru_cache(maxsize=256)
def triangle(rows: int, cols: int, offset: int, dtype: mx.Dtype, value: float = 1.0) -> mx.array:
    """value where column ≤ row + offset, else 0; evaluated at once, so that every trace can share it."""
    x = mx.array(value * np.tri(rows, cols, offset, dtype=np.float32)).astype(dtype)
    mx.eval(x)
    return x


class Sums(NamedTuple):
    """Running sums of log decays along the last axis, in two float32 parts."""

    hi: mx.array
    lo: mx.array

    def at(self, index: Any) -> Sums:
        return Sums(self.hi[index], self.lo[index])


@fuse
def _split(l, grid):
    hi = mx.round(l * grid) / grid
    return hi, l - hi


def running_sums(l: mx.array) -> Sums:
    """Inclusive sums of l in [LOG_ZERO, 0] along the last axis.

    A span of n numbers sums to at most 128 n; on a grid of 2^-17 n that takes float32's 24 bits.
    """
    span = 1 << (l.shape[-1] - 1).bit_length()
    return Sums(*(mx.cumsum(part, axis=-1) for part in _split(l, 2.0**17 / span)))


@fuse
def log_decay(g):
    # NaN is neither: it goes on.
    return mx.where(g <= 0, LOG_ZERO, mx.maximum(mx.log(mx.maximum(g, 1e-38)), LOG_ZERO))


@fuse
def _clamped(hi, lo):
    return mx.maximum(hi + lo, LOG_ZERO)


class Decay(NamedTuple):
    """The decay g `[B, H, N, W]` of a call with its sums, shared by the call's passes.

    hi, lo: running sums of log g in each chunk, `[B, H, N, W]`; edge_hi, edge_lo: running sums of the
    chunks' totals at the chunk borders of each group of chunks, from 0, `[B, H, groups, span + 1]`.
    """

    g: mx.array
    hi: mx.array
    lo: mx.array
    edge_hi: mx.array
    edge_lo: mx.array

    @property
    def sums(self) -> Sums:
        return Sums(self.hi, self.lo)

    @property
    def edges(self) -> Sums:
        return Sums(self.edge_hi, self.edge_lo)


def make_decay(g: mx.array) -> Decay:
    hi, lo = running_sums(log_decay(g))
    return Decay(g, hi, lo, *_edges(_clamped(hi[..., -1], lo[..., -1])))


# Chunks that one product of the scan covers: the product does span² work, which a GPU has to spare.
GROUP_CPU, GROUP_GPU = 8, 512


def _groups(N: int) -> tuple[int, int]:
    groups = -(-N // (GROUP_GPU if on_gpu() else GROUP_CPU))
    return groups, -(-N // groups)


def _edges(total: mx.array) -> Sums:
    """Running sums from 0 of the log decays over chunks, total `[B, H, N]`, in groups of chunks."""
    B, H, N = total.shape
    groups, span = _groups(N)
    total = mx.pad(total, [(0, 0), (0, 0), (0, groups * span - N)]) if groups * span != N else total
    sums = running_sums(total.reshape(B, H, groups, span))
    return Sums(*(mx.pad(part, [(0, 0), (0, 0), (0, 0), (1, 0)]) for part in sums))


@fuse
def _weights(keep, factor, power, row_hi, col_hi, row_lo, col_lo):
    return mx.where(keep, factor * mx.exp(power * ((row_hi - col_hi) + (row_lo - col_lo))), 0.0)


@fuse
def _carried(y, carry, power, hi, lo):
    return y + mx.exp(power * (hi + lo)) * carry


class ChunkScan:
    """Linear recurrence over N chunks, by products with small triangular matrices of decays.

    x `[B, H, N, ..]`, times factor, is what each chunk adds, `edges` and `power` give the decay ρ_n over
    each chunk (None: no decay), first `[B, H, ..]` float32 is the state at the start (None: zero).

    - forward: s_{n+1} = ρ_n s_n + x_n with s_0 = first. `inner()` are the N states s_n that enter the
      chunks, in the dtype of x; `last()` is s_N in float32.
    - reverse (its adjoint): e_n = ρ_n e_{n+1} + x_n with e_N = first. `inner()` are the N values
      e_{n+1}; `last()` is e_0.

    More chunks than one group holds are cut into groups whose totals are scanned the same way, so there
    is no loop over chunks: the depth is the logarithm of N.
    """

    def __init__(
        self, x, edges: Sums | None, power: float, first, factor: float = 1.0, reverse: bool = False
    ):
        B, H, self.N, *self.tail = x.shape
        self.groups, self.span = _groups(self.N)
        if self.groups * self.span != self.N:
            x = x.reshape(B, H, self.N, -1)
            x = mx.pad(x, [(0, 0), (0, 0), (0, self.groups * self.span - self.N), (0, 0)])
        self.x = x.reshape(B, H, self.groups, self.span, -1)
        self.first = None if first is None else first.reshape(B, H, -1)
        self.edges, self.power, self.factor, self.reverse = edges, power, factor, reverse
        if edges is not None:
            self.border = edges.at(np.s_[..., 1:]) if reverse else edges.at(np.s_[..., :-1])
            self.chunk = edges.at(np.s_[..., :-1]) if reverse else edges.at(np.s_[..., 1:])
        self.upper = None
        if self.groups > 1:
            totals = None
            if edges is not None:
                totals = _edges(_clamped(edges.hi[..., -1], edges.lo[..., -1]))
            self.upper = ChunkScan(self._totals(), totals, power, self.first, reverse=reverse)

    # With borders r = 0..span and running sums c_r (c_0 = 0), a group's chunks add
    #   forward  s_r = Σ_{m<r} exp(c_r − c_{m+1}) x_m        reverse  e_r = Σ_{m≥r} exp(c_m − c_r) x_m

    def _totals(self) -> mx.array:
        """What each group adds up to at its far border, r = span (reverse: r = 0), in float32."""
        if self.edges is None:
            weights = triangle(1, self.span, self.span, mx.float32, self.factor)
        else:
            end, chunk = self.edges.at(np.s_[..., -1:]), self.chunk
            sums = (chunk.hi, 0.0, chunk.lo, 0.0) if self.reverse else (end.hi, chunk.hi, end.lo, chunk.lo)
            weights = _weights(True, self.factor, self.power, *sums)[..., None, :]
        return (weights @ self.x.astype(mx.float32))[..., 0, :]

    def inner(self) -> mx.array:
        x, edges, span = self.x, self.edges, self.span
        if edges is None:
            weights = triangle(span, span, -1, x.dtype, self.factor)
            weights = weights.T if self.reverse else weights
        else:
            keep = triangle(span, span, -1, mx.bool_)
            row, col = self.border.at(np.s_[..., :, None]), self.chunk.at(np.s_[..., None, :])
            if self.reverse:
                keep, row, col = keep.T, col, row
            sums = (row.hi, col.hi, row.lo, col.lo)
            weights = _weights(keep, self.factor, self.power, *sums).astype(x.dtype)
        y = weights @ x
        carry = None if self.first is None else self.first[:, :, None]
        if self.upper is not None:
            carry = self.upper.inner()
        if carry is not None:
            carry = carry[..., None, :]
            if edges is None:
                y = y + carry
            else:
                left = self.border
                if self.reverse:
                    left = Sums(edges.hi[..., -1:] - left.hi, edges.lo[..., -1:] - left.lo)
                y = _carried(y, carry, self.power, left.hi[..., None], left.lo[..., None])
            y = y.astype(x.dtype)
        y = y.reshape(*y.shape[:2], -1, *self.tail)
        return y if y.shape[2] == self.N else y[:, :, : self.N]

    def last(self) -> mx.array:
        return self._last().reshape(*self.x.shape[:2], *self.tail)

    def _last(self) -> mx.array:
        if self.upper is not None:
            return self.upper.last()
        total = self._totals()[:, :, 0]
        if self.first is None:
            return total
        if self.edges is None:
            return total + self.first
        end = self.edges.at(np.s_[:, :, 0, -1:])
        return _carried(total, self.first, self.power, end.hi, end.lo)
