"""First and second order in one state: a learned mixture on the write side.

    S_t = g_t S_{t-1} + k_t k_tᵀ ,  k̃_t = α_t k_t + β_t scale S_t q_t
    F_t = g_t F_{t-1} + k̃_t v_tᵀ ,  o_t = scale F_tᵀ q_t

A value is written under its own key and, in the measure of β, under what the query makes of all keys so far:
β = 0 is first order, α = 0 masked second order with the decay g in the place of g². Not in the paper.

Names: S key metric S^K, F corrected state, η its normaliser.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx

from .arguments import SharedOptions, StepOptions, public
from .backend import sequence, step
from .checks import Option
from .operator import Operator, Slot, register
from .places import Place, mixture

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["MixedState", "mixed", "mixed_step"]


class MixedState(NamedTuple):
    """S `[B, Hkv, D, D]`, F `[B, Hq, D, Dv]` and, when normalising, eta `[B, Hq, D]`; float32."""

    S: mx.array
    F: mx.array
    eta: mx.array | None = None


def _compose(p: Place) -> mx.array:
    alpha, beta = p.coefficient("alpha"), p.coefficient("beta")
    second = p.la("S", p.q, p.k, None)  # scale S_t q_t
    kt = mixture(alpha, p.per_query(p.k), beta, second)
    return p.la("F", p.q, kt, p.v, last=True)


MIXED = register(
    Operator(
        "mixed",
        order=2,
        state=MixedState,
        slots=(Slot("S", symmetric=True), Slot("F", "q", "eta")),
        compose=_compose,
        degree=None,
        options=(Option("alpha", 1.0, per_token=True), Option("beta", 1.0, per_token=True, learned="sum")),
    )
)


@public
def mixed(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    alpha: float | mx.array | None = None,
    beta: float | mx.array | None = None,
    initial_state: MixedState | None = None,
    **shared: Unpack[SharedOptions],
) -> tuple[mx.array, MixedState]:
    """First and second order in one state: `k̃_t = α_t k_t + β_t scale S_t q_t`, `o = LA_g(Q, K̃, V)`.

    The arguments, shapes and errors that all operators share are described in `mlx_hla.ops`.

    alpha, beta: a finite number of any sign, `[Hq]` or `[B, T, Hq]`; arrays are differentiable. None: 1.
    With `normalize` o_t is divided by the same operator on v = 1, plus ε.
    """
    return sequence(MIXED, q, k, v, initial_state, {"alpha": alpha, "beta": beta}, **shared)


@public
def mixed_step(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    state: MixedState | None,
    *,
    alpha: float | mx.array | None = None,
    beta: float | mx.array | None = None,
    **shared: Unpack[StepOptions],
) -> tuple[mx.array, MixedState]:
    """One token of `mixed` (the recurrences at the top of this file); alpha, beta: also `[B, Hq]`."""
    return step(MIXED, q, k, v, state, {"alpha": alpha, "beta": beta}, **shared)
