"""Second-order HLA, masked (Thm 3.1) and unmasked (Eq. 3.1).

    k̃_t = (S_t + λI) q_t ,  S_t = g_t S_{t-1} + k_t k_tᵀ
    masked     F_t = g_t² F_{t-1} + k̃_t v_tᵀ ,   o_t = q_tᵀ F_t = q_tᵀ (S_t C_t − G_t)   (Eq. 3.3)
    unmasked   C_t = g_t C_{t-1} + q_t v_tᵀ ,     o_t = k̃_tᵀ C_t                          (Eq. 3.1)

The masked operator carries the corrected state F_t = S_t C_t − G_t itself (the paper's name for it,
Eq. 7.4) instead of C and G: one matrix less, and no difference of two growing numbers. Its decay is
g² because F holds S C; the paper's §4.3 prints g, see the errata.

Names: S key metric S^K, F corrected state, η its normaliser, C query-value moment C^QV, m m^Q, λ ridge.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from .backend import on_metal
from .checks import Call, canonical, canonical_step, check_state, number
from .passes import Sequence, Token


class HLA2State(NamedTuple):
    """S `[B, Hkv, D, D]`, F `[B, Hq, D, Dv]` and, when normalising, eta `[B, Hq, D]`; float32."""

    S: mx.array
    F: mx.array
    eta: mx.array | None = None


class HLA2UnmaskedState(NamedTuple):
    """S `[B, Hkv, D, D]`, C `[B, Hq, D, Dv]` and, when normalising, m `[B, Hq, D]`; float32."""

    S: mx.array
    C: mx.array
    m: mx.array | None = None


def _check(call: Call, state, masked: bool):
    if state is None:
        return None
    B, Hq, Hkv, D, V = call.dims
    kind = HLA2State if masked else HLA2UnmaskedState
    shapes = ((B, Hkv, D, D), (B, Hq, D, V), (B, Hq, D) if call.ones is not None else None)
    return check_state(call.op, state, kind, dict(zip(kind._fields, shapes, strict=True)))


def _run(where: type, call: Call, state, masked: bool, ridge: float, backend: str | None):
    pairs = [(state[0], None), tuple(state[1:])] if state else None
    served = on_metal(call, "hla2" if masked else None, backend, pairs, ridge=ridge)
    if served:
        o, [(S, _), F] = served
        return o, HLA2State(S, *F)
    p = where(call)
    S0, *rest = state or (None,)
    kt, S = p.la(p.q, p.k, p.k, 1, p.carry(S0))  # k̃_t = S_t q_t
    if ridge:
        kt = (kt + ridge * p.scaled_q).astype(kt.dtype)  # Alg. 1, line 7: S^eff = S + λI
    if masked:  # Eq. 3.3: o_t = q_tᵀ F_t
        o, F = p.la(p.q, kt, p.v, 2, p.carry(*rest) if rest else None)
        return p.result(o), HLA2State(p.plain(S), *p.split(F))
    # Eq. 3.1: o_t = k̃_tᵀ C_t
    o, C = p.la(kt, p.scaled_q, p.v, 1, p.carry(*rest) if rest else None, scale=1.0)
    return p.result(o), HLA2UnmaskedState(p.plain(S), *p.split(C))


def hla2(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float = 1.0,
    decay: float | mx.array | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
    masked: bool = True,
    ridge: float = 0.0,
    mask: mx.array | None = None,
    segment_ids: mx.array | None = None,
    initial_state: HLA2State | HLA2UnmaskedState | None = None,
    backend: str | None = None,
) -> tuple[mx.array, HLA2State | HLA2UnmaskedState]:
    """Second order: `o = tril(A Aᵀ) V` with `A = L ⊙ scale·QKᵀ` (Thm 3.1), or Eq. 3.1 unmasked.

    The arguments, shapes and errors that all operators share are described in `mlx_hla.ops`.

    masked: True gives Eq. 3.3, the strictly causal operator; False gives o_t = q_tᵀ S_t C_t (Eq. 3.1).
    ridge: λ ≥ 0 in k̃_t = scale·(S_t + λI) q_t (Alg. 1, line 7).
    With `normalize` o_t is divided by q_tᵀ η_t + ε (Eq. 3.4; Eq. 3.2 unmasked).
    """
    call = canonical("hla2", q, k, v, scale, decay, normalize, eps, mask, segment_ids)
    state = _check(call, initial_state, masked)
    ridge = number("hla2", "ridge", ridge, 0.0)
    return _run(Sequence, call, state, masked, ridge, backend)


def hla2_step(
    q,
    k,
    v,
    state,
    *,
    scale=1.0,
    decay=None,
    normalize=False,
    eps=1e-6,
    masked=True,
    ridge=0.0,
    backend=None,
) -> tuple[mx.array, HLA2State | HLA2UnmaskedState]:
    """One token of `hla2` (the recurrences at the top of this file)."""
    call = canonical_step("hla2_step", q, k, v, scale, decay, normalize, eps)
    state = _check(call, state, masked)
    ridge = number("hla2_step", "ridge", ridge, 0.0)
    return _run(Token, call, state, masked, ridge, backend)
