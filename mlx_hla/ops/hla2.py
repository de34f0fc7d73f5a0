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

from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx

from .arguments import SharedOptions, StepOptions, public
from .backend import sequence, step
from .checks import Option, boolean
from .operator import Operator, Slot, register
from .places import Place, number

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["HLA2State", "HLA2UnmaskedState", "hla2", "hla2_step"]


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


def _key(p: Place) -> mx.array:
    """k̃_t = (S_t + λI) q_t."""
    kt, ridge = p.la("S", p.q, p.k, None), number(p.call, "ridge")
    if not ridge:
        return kt
    return (kt + p.scaled_q(ridge)).astype(kt.dtype)  # Alg. 1, line 7: S^eff = S + λI


def _masked(p: Place) -> mx.array:
    return p.la("F", p.q, _key(p), p.v, power=2, last=True)  # Eq. 3.3: o_t = q_tᵀ F_t


def _unmasked(p: Place) -> mx.array:
    return p.la("C", _key(p), p.scaled_q(), p.v, scale=1.0, last=True)  # Eq. 3.1: o_t = k̃_tᵀ C_t


_S, _RIDGE = Slot("S", symmetric=True), Option("ridge", 0.0, least=0.0)

HLA2 = register(
    Operator(
        "hla2",
        order=2,
        state=HLA2State,
        slots=(_S, Slot("F", "q", "eta")),
        compose=_masked,
        degree=2,
        family="hla2",
        options=(_RIDGE,),
    )
)
HLA2_UNMASKED = register(
    Operator(
        "hla2",
        order=2,
        state=HLA2UnmaskedState,
        slots=(_S, Slot("C", "q", "m")),
        compose=_unmasked,
        degree=2,
        options=(_RIDGE,),
        variant="unmasked",
        selected={"masked": False},
    )
)


def _chosen(op: str, masked: bool) -> Operator:
    return HLA2 if boolean(op, "masked", masked) else HLA2_UNMASKED


@public
def hla2(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    masked: bool = True,
    ridge: float = 0.0,
    initial_state: HLA2State | HLA2UnmaskedState | None = None,
    **shared: Unpack[SharedOptions],
) -> tuple[mx.array, HLA2State | HLA2UnmaskedState]:
    """Second order: `o = tril(A Aᵀ) V` with `A = L ⊙ scale·QKᵀ` (Thm 3.1), or Eq. 3.1 unmasked.

    The arguments, shapes and errors that all operators share are described in `mlx_hla.ops`.

    masked: True gives Eq. 3.3, the strictly causal operator; False gives o_t = q_tᵀ S_t C_t (Eq. 3.1).
    ridge: λ ≥ 0 in k̃_t = scale·(S_t + λI) q_t (Alg. 1, line 7).
    With `normalize` o_t is divided by q_tᵀ η_t + ε (Eq. 3.4; Eq. 3.2 unmasked).
    """
    return sequence(_chosen("hla2", masked), q, k, v, initial_state, {"ridge": ridge}, **shared)


@public
def hla2_step(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    state: HLA2State | HLA2UnmaskedState | None,
    *,
    masked: bool = True,
    ridge: float = 0.0,
    **shared: Unpack[StepOptions],
) -> tuple[mx.array, HLA2State | HLA2UnmaskedState]:
    """One token of `hla2` (the recurrences at the top of this file)."""
    return step(_chosen("hla2_step", masked), q, k, v, state, {"ridge": ridge}, **shared)
