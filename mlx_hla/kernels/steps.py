"""One token of every operator as a differentiable function: the launch of `one_token` and its gradient."""

# B batch, Hq query heads, Hkv key-value heads, D key dim, DV value dim

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx

from . import families, one_token
from .families import State
from .passes import floats

# Of each family's state: the normalisers, and the matrices that they are one more column of.
NORMALISERS = {"linear": ("P",), "hla2": ("F",), "ahla": ("P", "E"), "hla3": ("P", "F")}
MATRICES = {"linear": ("P",), "hla2": ("S", "F"), "ahla": ("P", "E"), "hla3": ("S", "P", "F")}


def _joined(family: str, state: State) -> State:
    """(matrices, normalisers) -> matrices, with the normalisers as their last columns."""
    vectors = dict(zip(NORMALISERS[family], state[len(MATRICES[family]) :], strict=True))
    matrices = zip(MATRICES[family], state, strict=False)
    return tuple(
        mx.concatenate([x, vectors[name][..., None]], axis=-1) if name in vectors else x
        for name, x in matrices
    )


def _parted(family: str, state: State) -> State:
    """The inverse of `_joined`."""
    valued = [name in NORMALISERS[family] for name in MATRICES[family]]
    vectors = [x[..., -1] for x, parts in zip(state, valued, strict=True) if parts]
    return *(x[..., :-1] if parts else x for x, parts in zip(state, valued, strict=True)), *vectors


def _as_sequence(family: str, decay: bool, packed: bool, eps: float | None, options: dict):
    """The same token as a sequence of one, whose gradient is the step's."""

    def run(q, k, v, g, *state):
        dtype = q.dtype
        if packed:
            state = (one_token.unpack(state[0]), *state[1:])
        if eps is not None:
            v = mx.concatenate([v, mx.ones((*v.shape[:2], 1), v.dtype)], axis=-1)
            if dtype == mx.float16:  # a sequence rounds its sums to float16, a step only their quotient
                q, k, v = (x.astype(mx.float32) for x in (q, k, v))
            state = _joined(family, state)
        g = g[:, None] if decay else None
        o, state = getattr(families, family)(q[:, None], k[:, None], v[:, None], g, state, **options)
        o = o[:, 0]
        if eps is not None:
            o = o.astype(mx.float32)
            o = (o[..., :-1] / (o[..., -1:] + eps)).astype(dtype)
            state = _parted(family, state)
        return o, *((one_token.pack(state[0]), *state[1:]) if packed else state)

    return run


@lru_cache(maxsize=256)
def _step(family: str, scale: float, ridge: float, decay: bool, packed: bool, eps: float | None):
    options = {"scale": scale} | ({"ridge": ridge} if family == "hla2" else {})
    whole = _as_sequence(family, decay, packed, eps, options)

    def run(q, k, v, g, *state):
        factors = floats(scale, ridge, eps or 0.0)
        o, state = one_token.step(family, q, k, v, g, state, factors, packed, eps is not None)
        return o, *state

    def run_vjp(primals, cotangents, outputs):
        return mx.vjp(whole, list(primals), list(cotangents))[1]

    return families.mapped(run, run_vjp)


def _shapes(family: str, q, k, v, packed: bool, normalize: bool) -> list[tuple[int, ...]]:
    """Shapes of the state that a step takes and returns."""
    shapes = families._shapes(family, q, k, v)
    vectors = [s[:3] for s, n in zip(shapes, MATRICES[family], strict=True) if n in NORMALISERS[family]]
    if packed:
        B, Hkv, D, _ = shapes[0]
        shapes[0] = (B, Hkv, D * (D + 1) // 2)
    return [*shapes, *(vectors if normalize else ())]


def step(
    family: str,
    q,
    k,
    v,
    g=None,
    state: State | None = None,
    *,
    scale=1.0,
    ridge=0.0,
    packed: bool = False,
    eps: float | None = None,
):
    """One token of `family` in one launch: q `[B, Hq, D]`, k and v `[B, Hkv, ..]`, g None or `[B, Hkv]`.

    packed (hla2 and hla3): the state holds `pack(S)`, the upper triangle of S, in and out.
    eps: normalise, o = num / (den + eps). The state then ends in a vector `[B, heads, D]` for each matrix but
    S, in the order of the operators' own states: (P, m), (S, F, eta), (P, E, m, n), (S, P, F, m, eta).
    """
    if packed and family not in one_token.SYMMETRIC:
        raise ValueError(
            f"[{family}] packed is for {' and '.join(one_token.SYMMETRIC)}: their S is symmetric"
        )
    shapes = _shapes(family, q, k, v, packed, eps is not None)
    if state is None:
        state = tuple(mx.zeros(shape) for shape in shapes)
    if len(state) != len(shapes):
        raise ValueError(f"[{family}] the state must be {len(shapes)} arrays, got {len(state)}")
    if packed and state[0].shape != shapes[0]:
        raise ValueError(f"[{family}] a packed S must be {list(shapes[0])}, got {state[0].shape}")
    eps = None if eps is None else float(eps)
    run = _step(family, float(scale), float(ridge), g is not None, packed, eps)
    o, *state = run(q, k, v, families._decay(g, k.shape[:1]), *state)
    return o, tuple(state)
