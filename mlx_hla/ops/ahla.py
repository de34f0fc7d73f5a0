"""Asymmetric second-order HLA, `o = A A V` (paper §6, Thm 6.1, Alg. 2).

    P_t = g_t P_{t-1} + k_t v_tᵀ ,   E_t = g_t E_{t-1} + k_t (q_tᵀ P_t) ,   o_t = q_tᵀ E_t

Names: P key-value moment P^KV, m its normaliser m^K, E routed state, n its normaliser.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx

from .arguments import SharedOptions, StepOptions, public
from .backend import sequence, step
from .operator import Operator, Slot, register
from .places import Place

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["AHLAState", "ahla", "ahla_step"]


class AHLAState(NamedTuple):
    """P `[B, Hkv, D, Dv]`, E `[B, Hq, D, Dv]`; normalising also m `[B, Hkv, D]`, n `[B, Hq, D]`; float32."""

    P: mx.array
    E: mx.array
    m: mx.array | None = None
    n: mx.array | None = None


def _compose(p: Place) -> mx.array:
    r = p.la("P", p.q, p.k, p.v)  # Alg. 2, lines 3-5
    return p.la("E", p.q, p.k, r, last=True)  # Alg. 2, lines 6-7


AHLA = register(
    Operator(
        "ahla",
        order=2,
        state=AHLAState,
        slots=(Slot("P", normaliser="m"), Slot("E", "q", "n")),
        compose=_compose,
        degree=2,
        family="ahla",
    )
)


@public
def ahla(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    initial_state: AHLAState | None = None,
    **shared: Unpack[SharedOptions],
) -> tuple[mx.array, AHLAState]:
    """Asymmetric second order: `o = A A V` with `A = L ⊙ scale·QKᵀ` (Thm 6.1).

    The arguments, shapes and errors that all operators share are described in `mlx_hla.ops`.
    With `normalize` o_t is divided by q_tᵀ n_t + ε (Alg. 2, line 9).
    """
    return sequence(AHLA, q, k, v, initial_state, **shared)


@public
def ahla_step(
    q: mx.array, k: mx.array, v: mx.array, state: AHLAState | None, **shared: Unpack[StepOptions]
) -> tuple[mx.array, AHLAState]:
    """One token of `ahla` (the recurrences at the top of this file)."""
    return step(AHLA, q, k, v, state, **shared)
