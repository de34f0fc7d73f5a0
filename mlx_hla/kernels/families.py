"""The operators over sequences, differentiable, from the launches of `passes` and `second_order`."""

# B batch, T time, Hq query heads, Hkv key-value heads, D key dim, DV value dim

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx

from . import passes
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


# ---- differentiable functions of arrays that all begin with B


def _twice(*_):
    raise NotImplementedError("[mlx_hla] the kernels' gradients cannot be differentiated in reverse again")


def mapped(function, vjp=_twice):
    """`function` with its reverse mode, also under vmap: the mapped axis joins B."""
    run = mx.custom_function(function)
    run.vjp(vjp)

    @run.vmap
    def run_vmap(arrays, axes):
        size = next(x.shape[a] for x, a in zip(arrays, axes, strict=True) if a is not None and a >= 0)

        def fold(x, axis):
            mapped = axis is not None and axis >= 0
            x = mx.moveaxis(x, axis, 0) if mapped else mx.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        out = run(*(fold(x, a) for x, a in zip(arrays, axes, strict=True)))
        return [x.reshape(size, -1, *x.shape[1:]) for x in out], [0] * len(out)

    return run


@lru_cache(maxsize=256)
def _pass(scale: float, power: int, decay: bool, dtype: mx.Dtype, same: bool):
    """LA_{g^power} as a differentiable function of x, y, z (unless it is y), g and the first state."""

    def unpack(arrays):
        x, y, *z, g, first = arrays
        return x, y, (y if same else z[0]), g, first

    def run(*arrays):
        return passes.walk(*unpack(arrays), power=power, scale=scale, dtype=dtype)

    def back(*arrays):
        *operands, entry, do, d_last = arrays
        x, y, z, g = operands if not same else (*operands[:2], operands[1], operands[2])
        grads = passes.gradients(x, y, z, g, entry, do, d_last, power=power, scale=scale, decay=decay)
        return [d for d in grads if d is not None]

    back = mapped(back)

    def run_vjp(primals, cotangents, outputs):
        *operands, g, _ = primals
        *grads, d_first = back(*operands, g, outputs[2], *cotangents[:2])
        return [*grads, *([] if decay else [mx.zeros_like(g)]), d_first]

    return mapped(run, run_vjp)


@lru_cache(maxsize=256)
def _second(scale: float, ridge: float, decay: bool):
    """HLA2 as a differentiable function of q, k, v, g, S and F."""

    def run(q, k, v, g, S, F):
        return second.forward(q, k, v, g, S, F, scale, ridge)

    def back(*arrays):
        grads = second.gradients(*arrays[:9], arrays[9:], scale, ridge, decay)
        return [d for d in grads if d is not None]

    back = mapped(back)

    def run_vjp(primals, cotangents, outputs):
        *grads, dS, dF = back(*primals, *cotangents[:3], *outputs[3:])
        return [*grads, *([] if decay else [mx.zeros_like(primals[3])]), dS, dF]

    return mapped(run, run_vjp)


def _in_segments(function, arrays, state: State, work: tuple[int, ...]) -> tuple[mx.array, State]:
    """`function` over stretches of T that one launch may take, the state carried from one to the next.

    work: heads (times B), T, D, DV and whether the decay has a gradient, as `plan.segments` takes them.
    """
    parts = []
    for cut in segments(*work):
        o, *rest = function(*(x[:, cut] for x in arrays), *state)
        state = tuple(rest[: len(state)])  # what is left is the backward's
        parts.append(o)
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1), state


def linear(
    q, k, v, g=None, state: State | None = None, *, scale=1.0, power=1, dtype=None, decay_gradient=True
):
    """LA_{g^power}: `o_t = scale · P_tᵀ q_t`; q, k, v may differ in dtype and head counts; o in `dtype`.

    Where v is k itself it is read once. decay_gradient=False: g is a constant, its gradient zero and free.
    """
    heads = max(k.shape[2], v.shape[2])
    first = state or (mx.zeros((k.shape[0], heads, k.shape[3], v.shape[3])),)
    same = v is k
    decay = decay_gradient and g is not None
    run = _pass(float(scale), power, decay, dtype or q.dtype, same)
    arrays = (q, k, *(() if same else (v,)), _decay(g, k.shape[:2]))
    work = (q.shape[0] * max(q.shape[2], heads), q.shape[1], q.shape[3], v.shape[3], decay)
    return _in_segments(run, arrays, first, work)


def hla2(q, k, v, g=None, state: State | None = None, *, scale=1.0, ridge=0.0, decay_gradient=True):
    """Masked second order: `K̃ = LA_g(Q, K, K)`, `O = LA_{g²}(Q, K̃, V)`."""
    state = _state("hla2", q, k, v, state)
    if fused(max(q.shape[3], v.shape[3])):
        decay = decay_gradient and g is not None
        run = _second(float(scale), float(ridge), decay)
        work = (q.shape[0] * q.shape[2], q.shape[1], q.shape[3], v.shape[3], decay)
        return _in_segments(run, (q, k, v, _decay(g, k.shape[:2])), state, work)
    options = {"scale": scale, "decay_gradient": decay_gradient}
    kt, S = linear(q, k, k, g, state[:1], dtype=second.between(q.dtype), **options)
    kt = second.add_ridge(kt, q, scale * ridge)
    o, F = linear(q, kt, v, g, state[1:], power=2, **options)
    return o, (*S, *F)


def ahla(q, k, v, g=None, state: State | None = None, *, scale=1.0, decay_gradient=True):
    """Asymmetric second order: `O = LA_g(Q, K, LA_g(Q, K, V))`."""
    P, E = _state("ahla", q, k, v, state)
    options = {"scale": scale, "decay_gradient": decay_gradient}
    r, P = linear(q, k, v, g, (P,), dtype=second.between(q.dtype), **options)
    o, E = linear(q, k, r, g, (E,), **options)
    return o, (*P, *E)


def hla3(q, k, v, g=None, state: State | None = None, *, scale=1.0, decay_gradient=True):
    """Masked third order: `O = LA_{g³}(Q, LA_g(Q, K, K), LA_g(Q, K, V))`."""
    S, P, F = _state("hla3", q, k, v, state)
    middle, options = second.between(q.dtype), {"scale": scale, "decay_gradient": decay_gradient}
    kt, S = linear(q, k, k, g, (S,), dtype=middle, **options)
    r, P = linear(q, k, v, g, (P,), dtype=middle, **options)
    o, F = linear(q, kt, r, g, (F,), power=3, **options)
    return o, (*S, *P, *F)
