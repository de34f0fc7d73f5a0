"""First-order linear attention, o_t = q_tᵀ P_t with P_t = Σ_{j≤t} k_j v_jᵀ (paper §2.2).

Names: P the key-value moment P^KV, m the key moment m^K, g the decay γ.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from .backend import on_metal
from .checks import Call, canonical, canonical_step, check_state
from .passes import Sequence, Token


class LinearState(NamedTuple):
    """P `[B, Hkv, D, Dv]` and, when normalising, m `[B, Hkv, D]`; float32."""

    P: mx.array
    m: mx.array | None = None


def _check(call: Call, state: LinearState | None) -> LinearState | None:
    if state is None:
        return None
    B, _, Hkv, D, V = call.dims
    shapes = {"P": (B, Hkv, D, V), "m": (B, Hkv, D) if call.ones is not None else None}
    return check_state(call.op, state, LinearState, shapes)


def _run(where: type, call: Call, state: LinearState | None, backend: str | None):
    served = on_metal(call, "linear", backend, state and [tuple(state)])
    if served:
        o, [P] = served
        return o, LinearState(*P)
    p = where(call)
    o, P = p.la(p.q, p.k, p.v, 1, state and p.carry(*state))
    return p.result(o), LinearState(*p.split(P))


def linear_attention(
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
    initial_state: LinearState | None = None,
    backend: str | None = None,
) -> tuple[mx.array, LinearState]:
    """First order: `o = (L ⊙ scale·QKᵀ) V`, decayed by D_tj = Π_{j<s≤t} g_s (paper §2.2).

    The arguments, shapes and errors that all operators share are described in `mlx_hla.ops`.
    With `normalize` o_t is divided by q_tᵀ m_t + ε.
    """
    call = canonical("linear_attention", q, k, v, scale, decay, normalize, eps, mask, segment_ids)
    state = _check(call, initial_state)
    return _run(Sequence, call, state, backend)


def linear_attention_step(
    q, k, v, state, *, scale=1.0, decay=None, normalize=False, eps=1e-6, backend=None
) -> tuple[mx.array, LinearState]:
    """One token of `linear_attention`: `P_t = g_t P_{t-1} + k_t v_tᵀ`, `o_t = scale · q_tᵀ P_t`."""
    call = canonical_step("linear_attention_step", q, k, v, scale, decay, normalize, eps)
    state = _check(call, state)
    return _run(Token, call, state, backend)
