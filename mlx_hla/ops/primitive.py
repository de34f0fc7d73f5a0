"""LA_g: chunk-parallel causal linear attention with decay, the one primitive under every operator.

    S_t = g_t S_{t-1} + k_t v_tᵀ ,   o_t = scale · S_tᵀ q_t

Inside a chunk of W tokens with carry-in S (b_t = Π_{s≤t} g_s, D_ij = b_i / b_j for j ≤ i):

    o  = scale · ((D ⊙ q kᵀ) v + diag(b) q S)        S' = b_W S + Σ_j (b_W / b_j) k_j v_jᵀ

The chunks' carry-ins come from one scan (`ChunkScan`), so nothing walks over tokens. The decay is
g = decay^power. The reverse mode is made of the same products; it keeps q, k, v, the decay and the
carry-in states, never a D×V matrix per token.

Everything here is in chunk layout: q `[B, H, N, G, W, D]`, k `[B, H, N, G or 1, W, D]`,
v `[B, H, N, G or 1, W, V]`, decay `[B, H, N, W]`, states `[B, H, G or 1, D, V]` float32.
"""

# B batch, T time, H kv heads, G query heads per kv head, D key dim, V value dim, N chunks, W chunk width

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import NamedTuple

import mlx.core as mx

from ..devices import on_gpu
from ..transforms import differentiable, once
from .scan import TINY, ChunkScan, Decay, fuse, make_decay, triangle

# ---- products over chunks, with the query heads that share a key-value head as extra rows


def _swap(x: mx.array) -> mx.array:
    return x.swapaxes(-1, -2)


def _rows(a: mx.array, b: mx.array) -> mx.array:
    """a @ b over `[.., G, W, X]` and `[.., G or 1, X, Y]`; a shared b meets all its heads' rows at once."""
    G, W = a.shape[-3:-1]
    if G == 1 or b.shape[-3] == G:
        return a @ b
    out = a.reshape(*a.shape[:-3], 1, G * W, a.shape[-1]) @ b
    return out.reshape(*a.shape[:-1], b.shape[-1])


def _outer(a: mx.array, b: mx.array, groups: int) -> mx.array:
    """Σ_t a_t b_tᵀ over `[.., G or 1, W, X]` and `[.., G or 1, W, Y]`, over heads too where groups is 1."""
    G = max(a.shape[-3], b.shape[-3])
    if groups == 1 and G > 1:
        a, b = (mx.broadcast_to(x, (*x.shape[:-3], G, *x.shape[-2:])) for x in (a, b))
        a, b = (x.reshape(*x.shape[:-3], 1, G * x.shape[-2], x.shape[-1]) for x in (a, b))
    return _swap(a) @ b


def _add_rows(c: mx.array, a: mx.array, b: mx.array) -> mx.array:
    """c + `_rows(a, b)` in one product."""
    G, W = a.shape[-3:-1]
    if G == 1 or b.shape[-3] == G:
        return mx.addmm(c, a, b)
    c, a = (x.reshape(*x.shape[:-3], 1, G * W, x.shape[-1]) for x in (c, a))
    return mx.addmm(c, a, b).reshape(*a.shape[:-3], G, W, b.shape[-1])


def _add_outer(c: mx.array, a: mx.array, b: mx.array) -> mx.array:
    """c + Σ_t a_t b_tᵀ, summed over the G heads of a and b where c has one for all of them."""
    G = a.shape[-3]
    if c.shape[-3] == 1 and G > 1:
        a, b = (x.reshape(*x.shape[:-3], 1, G * x.shape[-2], x.shape[-1]) for x in (a, b))
    return mx.addmm(c, _swap(a), b)


def _over_heads(x: mx.array, groups: int) -> mx.array:
    """Sum over the G axis where the tensor that x is a gradient of has one head for all of them."""
    return x.sum(axis=-3, keepdims=True) if x.shape[-3] > groups else x


# ---- element-wise pieces, one pass over memory each on a GPU


class _Elementwise(NamedTuple):
    causal: Callable  # scale · L ⊙ (q kᵀ)
    causal_decayed: Callable  # scale · D ⊙ (q kᵀ)
    causal_pair: Callable  # the same for dP, and its product with q kᵀ
    from_start: Callable  # b_t x_t with b_t = Π_{s≤t} g_s
    to_end: Callable  # (b_W / b_t) x_t


@cache
def _elementwise(dtype: mx.Dtype) -> _Elementwise:
    """The element-wise functions whose result has `dtype`, the dtype of the matrix products."""

    def decayed(scores, later, scale, power, row_hi, col_hi, row_lo, col_lo):
        d = mx.exp(power * ((row_hi - col_hi) + (row_lo - col_lo)))
        return mx.where(later, scores * scale * d, 0.0)

    @fuse
    def causal(scores, later, scale):
        return mx.where(later, scores * scale, 0.0).astype(dtype)

    @fuse
    def causal_decayed(*args):
        return decayed(*args).astype(dtype)

    @fuse
    def causal_pair(scores, *args):
        d = decayed(*args)
        return d.astype(dtype), (d * scores).astype(dtype)

    @fuse
    def from_start(x, power, hi, lo):
        return (x * mx.exp(power * (hi + lo))).astype(dtype)

    @fuse
    def to_end(x, power, end_hi, hi, end_lo, lo):
        return (x * mx.exp(power * ((end_hi - hi) + (end_lo - lo)))).astype(dtype)

    return _Elementwise(causal, causal_decayed, causal_pair, from_start, to_end)


class _Decayed:
    """Where one pass multiplies by the decay; without a decay every method returns what it was given."""

    def __init__(self, decay: Decay | None, power: int, dtype: mx.Dtype, width: int):
        self.decay, self.power = decay, power
        self.later = triangle(width, width, 0, mx.bool_)
        self.functions = _elementwise(dtype)
        self.edges = None
        if decay is not None:
            self.edges = decay.edges
            self.column = tuple(x[:, :, :, None, :, None] for x in (decay.hi, decay.lo))
            self.row = tuple(x[:, :, :, None, None, :] for x in (decay.hi, decay.lo))
            (hi, lo), (row_hi, row_lo) = self.column, self.row
            self.pair = (hi, row_hi, lo, row_lo)
            self.end = (hi[..., -1:, :], hi, lo[..., -1:, :], lo)

    def causal(self, scores, scale):
        if self.decay is None:
            return self.functions.causal(scores, self.later, scale)
        return self.functions.causal_decayed(scores, self.later, scale, self.power, *self.pair)

    def causal_pair(self, scores, d_scores, scale):
        return self.functions.causal_pair(scores, d_scores, self.later, scale, self.power, *self.pair)

    def from_start(self, x):
        return x if self.decay is None else self.functions.from_start(x, self.power, *self.column)

    def to_end(self, x):
        return x if self.decay is None else self.functions.to_end(x, self.power, *self.end)


# ---- the pass and its reverse


def _key_states(k, v, decay, first, scale, power) -> ChunkScan:
    """scale · (states of k vᵀ) that enter the chunks, and scale · the last one."""
    decayed = _Decayed(decay, power, k.dtype, k.shape[-2])
    first = None if first is None else scale * first
    return ChunkScan(_swap(decayed.to_end(k)) @ v, decayed.edges, power, first, scale)


def _forward(q, k, v, decay, first, scale, power):
    """(o, scale · carry-ins, the scan of the states) of one pass."""
    decayed = _Decayed(decay, power, q.dtype, q.shape[-2])
    p = decayed.causal(_rows(q, _swap(k)), scale)
    states = _key_states(k, v, decay, first, scale, power)
    inner = states.inner()
    if q.shape[2] == 1 and first is None:
        return _rows(p, v), inner, states
    return _add_rows(_rows(decayed.from_start(q), inner), p, v), inner, states


def _rectangles(m: mx.array) -> mx.array:
    """r_t = Σ_{i≥t>j} m_ij over the last two axes, without a subtraction."""
    W = m.shape[-1]
    if on_gpu():
        left = m @ triangle(W, W, -1, m.dtype).T  # [i, t]: Σ_{j<t}
    else:
        left = mx.cumsum(m, axis=-1, inclusive=False)
    return mx.where(triangle(W, W, 0, mx.bool_), left, 0.0).sum(axis=-2).astype(mx.float32)


def _dots(x: mx.array, y: mx.array) -> mx.array:
    """Σ x·y over the heads of a group and the last axis: `[B, H, N, W]` float32."""
    return (x * y).sum(axis=-1).astype(mx.float32).sum(axis=-2)


class Operands(NamedTuple):
    """Of a pass: q, k, v, the decay (None: 1) and the state before the first token (None: 0)."""

    q: mx.array
    k: mx.array
    v: mx.array
    decay: Decay | None
    first: mx.array | None


class Gradients(NamedTuple):
    """Of the operands; the decay's is that of its g alone, of which the sums are made."""

    q: mx.array
    k: mx.array
    v: mx.array
    decay: tuple[mx.array, None, None, None, None] | None
    first: mx.array | None


class Walked(NamedTuple):
    """What a pass gives: o, scale times the states that enter the chunks, the state after the last token."""

    o: mx.array
    inner: mx.array
    last: mx.array


class Read(NamedTuple):
    """The same without the last state."""

    o: mx.array
    inner: mx.array


class Last(NamedTuple):
    """The state after the last token alone."""

    last: mx.array


class Backward(NamedTuple):
    """What the reverse mode reads; a gradient is None where that output was not used."""

    operands: Operands
    inner: mx.array
    do: mx.array
    d_last: mx.array | None


def _backward(b: Backward, scale: float, power: int) -> Gradients:
    """Gradients of one pass; each line is tagged by what it adds."""
    # It reads the carry-ins as numbers: its own gradient in reverse would miss what depends on them.
    b = once(b)
    (q, k, v, decay, first), states, do = b.operands, b.inner, b.do
    if decay is not None:
        # A zero decay counts as TINY here, so that dg = (g dg) / g exists; float32 sums don't see it.
        decay = make_decay(mx.maximum(decay.g, TINY))
    decayed = _Decayed(decay, power, q.dtype, q.shape[-2])
    carried = q.shape[2] > 1 or first is not None

    scores = _rows(q, _swap(k))
    d_scores = _rows(do, _swap(v))
    p = decayed.causal(scores, scale)
    if decay is None:
        dp = decayed.causal(d_scores, scale)
    else:
        dp, terms = decayed.causal_pair(scores, d_scores, scale)
    # Adjoint of the state that leaves each chunk: x_n = ρ x_{n+1} + scale · Σ_t b_t q_t do_tᵀ
    dob = decayed.from_start(do)
    adjoint = ChunkScan(_outer(q, dob, states.shape[-3]), decayed.edges, power, b.d_last, scale, reverse=True)
    x = adjoint.inner()

    dk_out = _over_heads(decayed.to_end(v) @ _swap(x), k.shape[-3])  # dk += (b_W / b) ⊙ v Xᵀ
    dv_out = _over_heads(decayed.to_end(k) @ x, v.shape[-3])  # dv += (b_W / b) ⊙ k X
    dk = _add_outer(dk_out, dp, q)  # dk += dPᵀ q
    dv = _add_outer(dv_out, p, do)  # dv += Pᵀ do
    if carried:
        dq_in = _rows(dob, _swap(states))  # dq += b ⊙ do Sᵀ
        dq = _add_rows(dq_in, dp, k)  # dq += dP k
    else:
        dq = _rows(dp, k)
    d_decay = None
    if decay is not None:
        # g_t dL/dg_t = every term of the loss that holds g_t: pairs i ≥ t > j of this chunk, rows
        # i ≥ t that read the carry-in, tokens j < t that reach the carry-out, and carry-in to carry-out.
        total = _rectangles(terms.sum(axis=-3))
        total = total + mx.cumsum(_dots(k, dk_out), axis=-1, inclusive=False)
        if carried:
            total = total + mx.cumsum(_dots(q, dq_in), axis=-1, reverse=True)
            through = (x.astype(mx.float32) * states).sum(axis=(-3, -2, -1))[..., None] / scale
            total = total + through * mx.exp(power * (decay.hi[..., -1:] + decay.lo[..., -1:]))
        d_decay = power * total / decay.g, None, None, None, None
    return Gradients(dq, dk, dv, d_decay, None if first is None else adjoint.last())


class _Functions(NamedTuple):
    """One pass, differentiable: all that it gives, without the last state, and that alone."""

    both: Callable[[Operands], Walked]
    output: Callable[[Operands], Read]
    state: Callable[[Operands], Last]


@lru_cache(maxsize=256)
def _pass(scale: float, power: int) -> _Functions:
    back = partial(_backward, scale=scale, power=power)

    def both(a: Operands) -> Walked:
        o, inner, states = _forward(*a, scale, power)
        return Walked(o, inner, states.last() / scale)

    def output(a: Operands) -> Read:
        o, inner, _ = _forward(*a, scale, power)
        return Read(o, inner)

    def both_vjp(a: Operands, out: Walked, d: Walked) -> Gradients:
        return back(Backward(a, out.inner, d.o, d.last))

    def output_vjp(a: Operands, out: Read, d: Read) -> Gradients:
        return back(Backward(a, out.inner, d.o, None))

    def in_f32(a: Operands) -> Operands:
        q, k, v = (x.astype(mx.float32) for x in (a.q, a.k, a.v))
        return a._replace(q=q, k=k, v=v)

    def state(a: Operands) -> Last:
        _, k, v, decay, first = in_f32(a)
        return Last(_key_states(k, v, decay, first, scale, power).last() / scale)

    def state_vjp(a: Operands, _: Last, d: Last) -> Gradients:
        wide = in_f32(a)
        q, k, v, decay, first = wide
        inner = _key_states(k, v, decay, first, scale, power).inner()
        do = mx.zeros((*q.shape[:-1], v.shape[-1]))
        grads = back(Backward(wide, inner, do, d.last))
        q, k, v = (x.astype(y.dtype) for x, y in zip(grads[:3], a[:3], strict=True))
        return grads._replace(q=q, k=k, v=v)

    return _Functions(
        differentiable(both, both_vjp), differentiable(output, output_vjp), differentiable(state, state_vjp)
    )


def chunked_la(q, k, v, decay: Decay | None, first, scale: float, power: int) -> tuple[mx.array, mx.array]:
    """One pass LA_{g^power} in chunk layout: (o in q's dtype, last state in float32).

    In bfloat16 the products read each chunk's carry-in rounded to bfloat16, like q, k and v; the last
    state is then a sum of its own, in float32 throughout, and computed only if somebody asks for it.
    """
    a, run = Operands(q, k, v, decay, first), _pass(float(scale), power)
    if q.dtype == mx.float32:
        o, _, last = run.both(a)
        return o, last
    return run.output(a).o, run.state(a).last
