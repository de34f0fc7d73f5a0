"""First-order linear attention, o_t = q_tᵀ P_t with P_t = Σ_{j≤t} k_j v_jᵀ (paper §2.2).

Names: P the key-value moment P^KV, m the key moment m^K, g the decay γ.
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

__all__ = ["LinearState", "linear_attention", "linear_attention_step"]


class LinearState(NamedTuple):
    """P `[B, Hkv, D, Dv]` and, when normalising, m `[B, Hkv, D]`; float32."""

    P: mx.array
    m: mx.array | None = None


def _compose(p: Place) -> mx.array:
    return p.la("P", p.q, p.k, p.v, last=True)


LINEAR = register(
    Operator(
        "linear_attention",
        order=1,
        state=LinearState,
        slots=(Slot("P", normaliser="m"),),
        compose=_compose,
        degree=1,
        alias="first",
        family="linear",
    )
)


@public
def linear_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    initial_state: LinearState | None = None,
    **shared: Unpack[SharedOptions],
) -> tuple[mx.array, LinearState]:
    """First order: `o = (L ⊙ scale·QKᵀ) V`, decayed by D_tj = Π_{j<s≤t} g_s (paper §2.2).

    The arguments, shapes and errors that all operators share are described in `mlx_hla.ops`.
    With `normalize` o_t is divided by q_tᵀ m_t + ε.
    """
    return sequence(LINEAR, q, k, v, initial_state, **shared)


@public
def linear_attention_step(
    q: mx.array, k: mx.array, v: mx.array, state: LinearState | None, **shared: Unpack[StepOptions]
) -> tuple[mx.array, LinearState]:
    """One token of `linear_attention`: `P_t = g_t P_{t-1} + k_t v_tᵀ`, `o_t = scale · q_tᵀ P_t`."""
    return step(LINEAR, q, k, v, state, **shared)
