"""The operators, differentiable, from the launches of `passes`, `second_order` and `one_token`."""

# B batch, T time, Hq query heads, Hkv key-value heads, D key dim, DV value dim

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx

from . import one_token, passes
from . import second_order as second
from .plan import fused, segments

State = tuple[mx.array, ...]


def _decay(g: mx.array | None, lead: tuple[int, ...]) -> mx.array:
    """g as `[*lead, Hg]`, broadcast without a copy; no decay is a decay of 1."""
    if g is None:
        return mx.broadcast_to(mx.ones((1,)), (*lead, 1))
    return mx.broadcast_to(g, (*lead, g.shape[-1]))


def _shapes(family: str, q, k, v) -> list[tuple[int, ...]]:
    """Shapes of a family's state."""
    B, Hq, Hkv, D, DV = q.shape[0], q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1]
    S, P, F = (B, Hkv, D, D), (B, Hkv, D, DV), (B, Hq, D, DV)
    return {"linear": [P], "hla2": [S, F], "ahla": [P, F], "hla3": [S, P, F]}[family]


def _state(family: str, q, k, v, state: State | None) -> State:
    if state is not None:
        return state
    return tuple(mx.zeros(shape, mx.float32) for shape in _shapes(family, q, k, v))


@lru_cache(maxsize=256)
def _pass(scale: float, power: int, decay: bool, dtype: mx.Dtype):
    """LA_{g^power} as a differentiable function of x, y, z, g and the first state."""

    @mx.custom_function
    def run(x, y, z, g, first):
        return passes.walk(x, y, z, g, first, power=power, read=scale, dtype=dtype)

    @run.vjp
    def run_vjp(primals, cotangents, outputs):
        x, y, z, g, first = primals
        do, d_last = cotangents
        *grads, dg, d_first = passes.gradients(
            x, y, z, g, first, do, d_last, power=power, scale=scale, decay=decay
        )
        return *grads, mx.zeros_like(g) if dg is None else dg, d_first

    return run


@lru_cache(maxsize=256)
def _second(scale: float, ridge: float, decay: bool):
    """HLA2 as a differentiable function of q, k, v, g, S and F."""

    @mx.custom_function
    def run(q, k, v, g, S, F):
        return second.forward(q, k, v, g, S, F, scale, ridge)

    @run.vjp
    def run_vjp(primals, cotangents, outputs):
        dq, dk, dv, dg, dS, dF = second.gradients(*primals, *cotangents, scale, ridge, decay)
        return dq, dk, dv, mx.zeros_like(primals[3]) if dg is None else dg, dS, dF

    return run


def _in_segments(function, q, k, v, g, state: State) -> tuple[mx.array, State]:
    """`function` over stretches of T that one launch may take, the state carried from one to the next."""
    parts = []
    for cut in segments(q.shape[0] * q.shape[2], q.shape[1], q.shape[3], v.shape[3]):
        o, *state = function(q[:, cut], k[:, cut], v[:, cut], g[:, cut], *state)
        parts.append(o)
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1), tuple(state)


def linear(q, k, v, g=None, state: State | None = None, *, scale=1.0, power=1, dtype=None):
    """LA_{g^power}: `o_t = scale · P_tᵀ q_t`; q, k, v may differ in dtype and head counts; o in `dtype`."""
    heads = max(k.shape[2], v.shape[2])
    first = state or (mx.zeros((k.shape[0], heads, k.shape[3], v.shape[3])),)
    run = _pass(float(scale), power, g is not None, dtype or q.dtype)
    return _in_segments(run, q, k, v, _decay(g, k.shape[:2]), first)


def hla2(q, k, v, g=None, state: State | None = None, *, scale=1.0, ridge=0.0):
    """Masked second order: `K̃ = LA_g(Q, K, K)`, `O = LA_{g²}(Q, K̃, V)`."""
    state = _state("hla2", q, k, v, state)
    if fused(max(q.shape[3], v.shape[3])):
        run = _second(float(scale), float(ridge), g is not None)
        return _in_segments(run, q, k, v, _decay(g, k.shape[:2]), state)
    kt, S = linear(q, k, k, g, state[:1], scale=scale, dtype=second.between(q.dtype))
    if ridge:
        kt = kt + scale * ridge * q.astype(kt.dtype)
    o, F = linear(q, kt, v, g, state[1:], scale=scale, power=2)
    return o, (*S, *F)


def ahla(q, k, v, g=None, state: State | None = None, *, scale=1.0):
    """Asymmetric second order: `O = LA_g(Q, K, LA_g(Q, K, V))`."""
    P, E = _state("ahla", q, k, v, state)
    r, P = linear(q, k, v, g, (P,), scale=scale, dtype=second.between(q.dtype))
    o, E = linear(q, k, r, g, (E,), scale=scale)
    return o, (*P, *E)


def hla3(q, k, v, g=None, state: State | None = None, *, scale=1.0):
    """Masked third order: `O = LA_{g³}(Q, LA_g(Q, K, K), LA_g(Q, K, V))`."""
    S, P, F = _state("hla3", q, k, v, state)
    middle = second.between(q.dtype)
    kt, S = linear(q, k, k, g, (S,), scale=scale, dtype=middle)
    r, P = linear(q, k, v, g, (P,), scale=scale, dtype=middle)
    o, F = linear(q, kt, r, g, (F,), scale=scale, power=3)
    return o, (*S, *P, *F)


@lru_cache(maxsize=256)
def _step(family: str, scale: float, ridge: float, decay: bool, packed: bool):
    """One token; its gradient is the sequence's at T = 1."""

    @mx.custom_function
    def run(q, k, v, g, *state):
        o, state = one_token.step(family, q, k, v, g, state, passes.floats(scale, ridge), packed)
        return o, *state

    @run.vjp
    def run_vjp(primals, cotangents, outputs):
        options = {"scale": scale} | ({"ridge": ridge} if family == "hla2" else {})
        sequence = {"linear": linear, "hla2": hla2, "ahla": ahla, "hla3": hla3}[family]

        def whole(q, k, v, g, *state):
            if packed:
                state = (one_token.unpack(state[0]), *state[1:])
            o, state = sequence(
                q[:, None], k[:, None], v[:, None], g[:, None] if decay else None, state, **options
            )
            return o[:, 0], *((one_token.pack(state[0]), *state[1:]) if packed else state)

        return mx.vjp(whole, list(primals), list(cotangents))[1]

    return run


def step(
    family: str, q, k, v, g=None, state: State | None = None, *, scale=1.0, ridge=0.0, packed: bool = False
):
    """One token of `family` in one launch: q `[B, Hq, D]`, k and v `[B, Hkv, ..]`, g None or `[B, Hkv]`.

    packed (hla2 and hla3): the state holds `pack(S)`, the upper triangle of S, in and out.
    """
    if packed and family not in one_token.SYMMETRIC:
        raise ValueError(
            f"[{family}] packed is for {' and '.join(one_token.SYMMETRIC)}: their S is symmetric"
        )
    given = state is not None
    state = _state(family, q, k, v, state)
    if packed:
        B, Hkv, D = *k.shape[:2], q.shape[2]
        shape = (B, Hkv, D * (D + 1) // 2)
        state = (state[0] if given else mx.zeros(shape), *state[1:])
        if state[0].shape != shape:
            raise ValueError(f"[{family}] a packed S must be {list(shape)}, got {state[0].shape}")
    run = _step(family, float(scale), float(ridge), g is not None, packed)
    o, *state = run(q, k, v, _decay(g, k.shape[:1]), *state)
    return o, tuple(state)
