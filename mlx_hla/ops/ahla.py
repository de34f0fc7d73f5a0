"""Asymmetric second-order HLA, `o = A A V` (paper §6, Thm 6.1, Alg. 2).

    P_t = g_t P_{t-1} + k_t v_tᵀ ,   E_t = g_t E_{t-1} + k_t (q_tᵀ P_t) ,   o_t = q_tᵀ E_t

Names: P key-value moment P^KV, m its normaliser m^K, E routed state, n its normaliser.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from .backend import on_metal
from .checks import Call, canonical, canonical_step, check_state
from .passes import Sequence, Token


class AHLAState(NamedTuple):
    """P `[B, Hkv, D, Dv]`, E `[B, Hq, D, Dv]`; normalising also m `[B, Hkv, D]`, n `[B, Hq, D]`; float32."""

    P: mx.array
    E: mx.array
    m: mx.array | None = None
    n: mx.array | None = None


def _check(call: Call, state: AHLAState | None) -> AHLAState | None:
    if state is None:
        return None
    B, Hq, Hkv, D, V = call.dims
    norm = call.ones is not None
    shapes = {
        "P": (B, Hkv, D, V),
        "E": (B, Hq, D, V),
        "m": (B, Hkv, D) if norm else None,
        "n": (B, Hq, D) if norm else None,
    }
    return check_state(call.op, state, AHLAState, shapes)


def _run(where: type, call: Call, state: AHLAState | None, backend: str | None):
    served = on_metal(call, "ahla", backend, state and [(state.P, state.m), (state.E, state.n)])
    if served:
        o, [(P, m), (E, n)] = served
        return o, AHLAState(P, E, m, n)
    p = where(call)
    r, P = p.la(p.q, p.k, p.v, 1, state and p.carry(state.P, state.m))  # Alg. 2, lines 3-5
    o, E = p.la(p.q, p.k, r, 1, state and p.carry(state.E, state.n))  # Alg. 2, lines 6-7
    (P, m), (E, n) = p.split(P), p.split(E)
    return p.result(o), AHLAState(P, E, m, n)


def ahla(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float = 1.0,
    decay: float | mx.array | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
    mask: mx.array | None = None,
    segment_ids: mx.array | None = None,
    initial_state: AHLAState | None = None,
    backend: str | None = None,
) -> tuple[mx.array, AHLAState]:
    """Asymmetric second order: `o = A A V` with `A = L ⊙ scale·QKᵀ` (Thm 6.1).

    The arguments, shapes and errors that all operators share are described in `mlx_hla.ops`.
    With `normalize` o_t is divided by q_tᵀ n_t + ε (Alg. 2, line 9).
    """
    call = canonical("ahla", q, k, v, scale, decay, normalize, eps, mask, segment_ids)
    state = _check(call, initial_state)
    return _run(Sequence, call, state, backend)


def ahla_step(
    q, k, v, state, *, scale=1.0, decay=None, normalize=False, eps=1e-6, backend=None
) -> tuple[mx.array, AHLAState]:
    """One token of `ahla` (the recurrences at the top of this file)."""
    call = canonical_step("ahla_step", q, k, v, scale, decay, normalize, eps)
    state = _check(call, state)
    return _run(Token, call, state, backend)
