"""Where an operator's passes run: over a whole sequence in chunks, or over one token.

An operator is a short composition of `la` calls (`Sequence.la`, `Token.la`); both classes give it the
same view, so each composition is written once and serves prefill, training and decode.
"""

# B batch, T time, H kv heads, G query heads per kv head, D key dim, V value dim, N chunks, W chunk width

from __future__ import annotations

import mlx.core as mx

from ..devices import on_gpu
from .backend import divide
from .checks import Call
from .primitive import chunked_la
from .scan import make_decay

# Chunk width. Narrow chunks do less work inside the triangle, wide ones keep fewer states: at W = D
# both cost the same arithmetic; a GPU runs short of bandwidth first and prefers fewer states.
WIDTH_CPU, WIDTH_GPU = 64, 128


def chunk_width(T: int) -> int:
    return min(T, WIDTH_GPU if on_gpu() else WIDTH_CPU)


class _Passes:
    """What sequence and token have in common: states in and out, normalisation, scale."""

    call: Call
    q: mx.array
    k: mx.array
    v: mx.array

    @property
    def scaled_q(self) -> mx.array:
        """scale · q, for passes in which a query is a key or a value."""
        return self.q if self.call.scale == 1 else (self.q * self.call.scale).astype(self.q.dtype)

    def carry(self, matrix: mx.array | None, vector: mx.array | None = None) -> mx.array | None:
        """A state `[B, heads, D, V]` (with its normaliser as one more column) as a pass takes it."""
        if matrix is None:
            return None
        if vector is not None:
            matrix = mx.concatenate([matrix, vector[..., None]], axis=-1)
        B, heads, *rest = matrix.shape
        Hkv = self.call.dims[2]
        return matrix.reshape(B, Hkv, heads // Hkv, *rest)

    def split(self, carried: mx.array) -> tuple[mx.array, mx.array | None]:
        """The inverse of `carry` for a state that holds values: (matrix, normaliser or None)."""
        x = self.plain(carried)
        return (x, None) if self.call.ones is None else (x[..., :-1], x[..., -1])

    def plain(self, carried: mx.array) -> mx.array:
        """The inverse of `carry` for a state without a normaliser."""
        B, H, G = carried.shape[:3]
        return carried.reshape(B, H * G, *carried.shape[3:])


class Sequence(_Passes):
    """All tokens at once. q, k, v in chunk layout, see `primitive`; wide: in float32 whatever they are."""

    def __init__(self, call: Call, wide: bool = False):
        self.call = call
        _, self.Hq, self.Hkv, _, _ = call.dims
        self.T = call.q.shape[1]
        self.width = chunk_width(self.T)
        # float16 has too little range for sums of products; the CPU's half-precision products are slow.
        native = on_gpu() and call.q.dtype != mx.float16 and not wide
        self.dtype = call.q.dtype if native else mx.float32
        v = call.v if call.ones is None else mx.concatenate([call.v, call.ones], axis=-1)
        self.q, self.k, self.v = (self._chunks(x) for x in (call.q, call.k, v))
        g = call.g
        if g is not None:  # [B, T, H] -> [B, H, N, W]
            g = mx.pad(g, [(0, 0), (0, self._padding), (0, 0)], constant_values=1.0)
            g = g.reshape(g.shape[0], -1, self.width, self.Hkv).transpose(0, 3, 1, 2)
        self.g = g
        self.decay = None if g is None else make_decay(g)

    @property
    def _padding(self) -> int:
        return -self.T % self.width

    def _chunks(self, x: mx.array) -> mx.array:
        """[B, T, H·G, D] -> [B, H, N, G, W, D]."""
        if self._padding:
            x = mx.pad(x, [(0, 0), (0, self._padding), (0, 0), (0, 0)])
        B, _, heads, D = x.shape
        x = x.reshape(B, -1, self.width, self.Hkv, heads // self.Hkv, D).transpose(0, 3, 1, 4, 2, 5)
        return mx.contiguous(x.astype(self.dtype))

    def la(self, q, k, v, power: int = 1, first: mx.array | None = None, scale: float | None = None):
        """LA_{g^power}(q, k, v) with the state before the first token: (o, state after the last)."""
        scale = self.call.scale if scale is None else scale
        return chunked_la(q, k, v, self.decay, first, scale, power)

    def la_before(self, q, k, v, first: mx.array | None = None):
        """o_t = S_{t-1}ᵀ q_t: the pass that reads the state before token t is added, at scale 1."""
        decay = None
        if self.g is not None:
            decay = make_decay(self._shift(self.g[..., None, :, None], 1.0)[..., 0, :, 0])
        o = chunked_la(q, self._shift(k), self._shift(v), decay, first, 1.0, 1)[0]
        if self.call.starts is None:
            return o
        # Before the first token of a segment there is nothing, whatever its own decay.
        starts = mx.pad(self.call.starts, [(0, 0), (0, self._padding)])
        starts = starts.reshape(starts.shape[0], 1, -1, 1, self.width, 1)
        return mx.where(starts, mx.zeros((), o.dtype), o)

    def _shift(self, x: mx.array, fill: float = 0.0) -> mx.array:
        """The same tokens one step later."""
        flat = x.transpose(0, 1, 3, 2, 4, 5)
        shape = flat.shape
        flat = flat.reshape(*shape[:3], -1, shape[-1])
        flat = mx.pad(flat[..., :-1, :], [(0, 0)] * 3 + [(1, 0), (0, 0)], constant_values=fill)
        return flat.reshape(shape).transpose(0, 1, 3, 2, 4, 5)

    def result(self, o: mx.array) -> mx.array:
        """[B, H, N, G, W, V] -> o [B, T, Hq, V] in the dtype of q, normalised where asked."""
        B, V = o.shape[0], o.shape[-1]
        o = o.transpose(0, 2, 4, 1, 3, 5).reshape(B, -1, self.Hq, V)
        return divide(self.call, o[:, : self.T])


class Token(_Passes):
    """One token in float32. q `[B, H, G, 1, D]`, k and v `[B, H, 1, 1, D]`, states `[B, H, G or 1, D, V]`."""

    def __init__(self, call: Call):
        self.call = call
        B, self.Hq, Hkv, _, _ = call.dims
        v = call.v if call.ones is None else mx.concatenate([call.v, call.ones], axis=-1)
        self.q, self.k, self.v = (
            x.astype(mx.float32).reshape(B, Hkv, -1, 1, x.shape[-1]) for x in (call.q, call.k, v)
        )
        self.g = None if call.g is None else call.g[..., None, None, None]

    def la(self, q, k, v, power: int = 1, first: mx.array | None = None, scale: float | None = None):
        state = k.swapaxes(-1, -2) * v
        if first is not None:
            state = state + (first if self.g is None else self.g**power * first)
        scale = self.call.scale if scale is None else scale
        return scale * (q @ state), state

    def la_before(self, q, k, v, first: mx.array | None = None):
        if first is None:
            return mx.zeros((*q.shape[:-1], v.shape[-1]))
        return q @ first

    def result(self, o: mx.array) -> mx.array:
        o = o.reshape(o.shape[0], self.Hq, o.shape[-1])
        return divide(self.call, o)
