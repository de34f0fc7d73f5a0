"""LA_g: chunk-parallel causal linear attention with decay, the one primitive under every operator.

    S_t = g_t S_{t-1} + k_t v_tᵀ ,   o_t = scale · S_tᵀ q_t

Inside a chunk of W tokens with carry-in S (b_t = Π_{s≤t} g_s, D_ij = b_i / b_j for j ≤ i):

    o  = scale · ((D ⊙ q kᵀ) v + diag(b) q S)        S' = b_W S + Σ_j (b_W / b_j) k_j v_jᵀ

The chunks' carry-ins come from one scan (`scan_states`), so nothing walks over tokens. The decay is
g = decay^power. The reverse mode is made of the same products; it keeps q, k, v, the decay and the
carry-in states, never a D×V matrix per token.

Everything here is in chunk layout: q `[B, H, N, G, W, D]`, k `[B, H, N, G or 1, W, D]`,
v `[B, H, N, G or 1, W, V]`, decay `[B, H, N, W]`, states `[B, H, G or 1, D, V]` float32.
"""

# B batch, T time, H kv heads, G query heads per kv head, D key dim, V value dim, N chunks, W chunk width

from __future__ import annotations

from functools import cache, lru_cache

import mlx.core as mx

from .scan import TINY, Cumulative, cumulative, from_start, log_decay, scan_states, to_end


def on_gpu() -> bool:
    return mx.default_device() == mx.gpu


def _fuse(f):
    """Compile an element-wise function on a GPU; a CPU may have no C++ compiler at run time."""
    compiled = mx.compile(f, shapeless=True)
    return lambda *args: (compiled if on_gpu() else f)(*args)


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


def _over_heads(x: mx.array, groups: int) -> mx.array:
    """Sum over the G axis where the tensor that x is a gradient of has one head for all of them."""
    return x.sum(axis=-3, keepdims=True) if x.shape[-3] > groups else x


# ---- element-wise pieces, one pass over memory each on a GPU


@cache
def _elementwise(dtype: mx.Dtype):
    """The fused element-wise functions that end in `dtype`, the dtype of the matrix products."""

    def decay(row_hi, col_hi, row_lo, col_lo):
        return mx.exp((row_hi - col_hi) + (row_lo - col_lo))

    @_fuse
    def causal(scores, later, scale, *sums):  # scale · D ⊙ (q kᵀ)
        scores = scores * scale
        return mx.where(later, scores * decay(*sums) if sums else scores, 0.0).astype(dtype)

    @_fuse
    def causal_pair(d_scores, scores, later, scale, *sums):  # the same for dP, and its product with q kᵀ
        d = mx.where(later, d_scores * scale * decay(*sums), 0.0)
        return d.astype(dtype), d * scores

    @_fuse
    def add_scaled(x, y, factor):
        return (x + y * factor).astype(dtype)

    return causal, causal_pair, add_scaled


@_fuse
def _scaled_f32(x, factor):
    return x.astype(mx.float32) * factor


@_fuse
def _dot_terms(x, y):
    return x.astype(mx.float32) * y.astype(mx.float32)


class _Decays:
    """What one pass needs of the decay: running sums, b, b_W / b_j and the chunk totals, or nothing."""

    def __init__(self, g: mx.array | None, power: int):
        self.sums: Cumulative | None = None
        self.pair: tuple[mx.array, ...] = ()
        self.b = self.tail = mx.array(1.0)
        self.total = None
        if g is not None:
            c = self.sums = cumulative(log_decay(g, power))
            column, row = (..., None, slice(None), None), (..., None, None, slice(None))
            self.pair = (c.hi[column], c.hi[row], c.lo[column], c.lo[row])
            self.b, self.tail = from_start(c)[column], to_end(c)[column]
            self.total = c.total()


def _chunk_states(x, decays, first, reverse=False):
    """Scan of what each chunk adds, x `[B, H, N, G, D, V]`: (states entering the chunks, last state)."""
    shape = x.shape
    first = None if first is None else first.reshape(*shape[:2], -1)
    inner, last = scan_states(x.reshape(*shape[:3], -1), decays.total, first, reverse)
    return inner.reshape(shape), last.reshape(*shape[:2], *shape[3:])


def _forward(q, k, v, g, first, scale, power):
    """(o, last state, carry-in states) of one pass; the carry-ins in the products' dtype."""
    causal, _, add_scaled = _elementwise(q.dtype)
    decays = _Decays(g, power)
    W = q.shape[-2]
    later = mx.tri(W, W, 0, dtype=mx.bool_)
    o = _rows(causal(_rows(q, _swap(k)), later, scale, *decays.pair), v)
    kw = _scaled_f32(k, decays.tail)
    states, last = _chunk_states(_swap(kw) @ v.astype(mx.float32), decays, first)
    states = states.astype(q.dtype)
    if q.shape[2] > 1 or first is not None:
        o = add_scaled(o, _rows(q, states), scale * decays.b)
    return o, last, states


def _rectangles(m: mx.array) -> mx.array:
    """r_t = Σ_{i≥t>j} m_ij over the last two axes, without a subtraction."""
    W = m.shape[-1]
    left = mx.cumsum(m, axis=-1, inclusive=False)  # [i, t]: Σ_{j<t}
    return mx.where(mx.tri(W, W, 0, dtype=mx.bool_), left, 0.0).sum(axis=-2)


def _backward(q, k, v, g, first, states, do, d_last, scale, power):
    """Gradients of one pass, tagged by the product they come from."""
    causal, causal_pair, add_scaled = _elementwise(q.dtype)
    # A zero decay counts as TINY here, so that dg = (g dg) / g exists; float32 sums don't see it.
    decays = _Decays(None if g is None else mx.maximum(g, TINY), power)
    W = q.shape[-2]
    later = mx.tri(W, W, 0, dtype=mx.bool_)
    carried = q.shape[2] > 1 or first is not None
    groups = states.shape[-3]

    scores = _rows(q, _swap(k))
    d_scores = _rows(do, _swap(v))
    p = causal(scores, later, scale, *decays.pair)
    if g is None:
        dp = causal(d_scores, later, scale)
    else:
        dp, terms = causal_pair(d_scores, scores, later, scale, *decays.pair)
    qb = _scaled_f32(q, scale * decays.b)
    x, d_first = _chunk_states(_outer(qb, do.astype(mx.float32), groups), decays, d_last, reverse=True)
    xc = x.astype(q.dtype)

    dq = _rows(dp, k)  # dq += dP k
    if carried:
        dq_in = _rows(do, _swap(states))  # dq += b ⊙ do Sᵀ
        dq = add_scaled(dq, dq_in, scale * decays.b)
    dk_out = _over_heads(v @ _swap(xc), k.shape[-3])  # dk += (b_W / b) ⊙ v Xᵀ
    dv_out = _over_heads(k @ xc, v.shape[-3])  # dv += (b_W / b) ⊙ k X
    dk = add_scaled(_outer(dp, q, k.shape[-3]), dk_out, decays.tail)  # dk += dPᵀ q
    dv = add_scaled(_outer(p, do, v.shape[-3]), dv_out, decays.tail)  # dv += Pᵀ do
    grads = [dq, dk, dv]
    if g is not None:
        # g_t dL/dg_t = every term of the loss that holds g_t: pairs i ≥ t > j of this chunk, rows
        # i ≥ t that read the carry-in, tokens j < t that reach the carry-out, and carry-in to carry-out.
        total = _rectangles(terms.sum(axis=-3))
        out = (_dot_terms(k, dk_out).sum(axis=-1, keepdims=True) * decays.tail).sum(axis=(-3, -1))
        total = total + mx.cumsum(out, axis=-1, inclusive=False)
        if carried:
            read = (_dot_terms(q, dq_in).sum(axis=-1, keepdims=True) * (scale * decays.b)).sum(axis=(-3, -1))
            total = total + mx.cumsum(read, axis=-1, reverse=True)
            through = _dot_terms(x, states).sum(axis=(-3, -2, -1)) * mx.exp(decays.total)
            total = total + through[..., None]
        grads.append(power * total / mx.maximum(g, TINY))
    if first is not None:
        grads.append(d_first)
    return grads


@lru_cache(maxsize=256)
def _function(scale: float, power: int, decayed: bool, started: bool):
    """The differentiable pass for one choice of static options; arrays are its only arguments."""
    factor = mx.array(scale, mx.float32)

    def unpack(arrays):
        q, k, v, *rest = arrays
        return q, k, v, rest[0] if decayed else None, rest[-1] if started else None

    @mx.custom_function
    def run(*arrays):
        return _forward(*unpack(arrays), factor, power)

    @run.vjp
    def run_vjp(arrays, cotangents, outputs):
        return _backward(*unpack(arrays), outputs[2], cotangents[0], cotangents[1], factor, power)

    @run.vmap
    def run_vmap(arrays, axes):
        # The mapped axis joins B, so the function itself is called and keeps its own reverse mode.
        size = next(x.shape[a] for x, a in zip(arrays, axes, strict=True) if a is not None and a >= 0)

        def fold(x, axis):
            mapped = axis is not None and axis >= 0
            x = mx.moveaxis(x, axis, 0) if mapped else mx.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        out = run(*(fold(x, a) for x, a in zip(arrays, axes, strict=True)))
        return [x.reshape(size, -1, *x.shape[1:]) for x in out], [0] * len(out)

    return run


def chunked_la(q, k, v, g, first, scale: float, power: int):
    """One pass LA_{g^power} in chunk layout: (o in q's dtype, last state in float32)."""
    arrays = [q, k, v, *([] if g is None else [g]), *([] if first is None else [first])]
    return _function(float(scale), power, g is not None, first is not None)(*arrays)[:2]
