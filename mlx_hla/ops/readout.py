"""First order read by a second-order query: a learned step on the query side.

    n_t = g_t n_{t-1} + 1 ,  S_t = g_t S_{t-1} + k_t k_tᵀ ,  q̃_t = α_t q_t + (β_t / n_t) S_t q_t
    P_t = g_t P_{t-1} + k_t v_tᵀ ,  o_t = scale P_tᵀ q̃_t

With unit keys S/n has trace 1, and β < 0 is one step of gradient descent from P towards the least-squares
readout P S⁻¹ (Mesa): what many keys have in common is read less. Not in the paper.

Names: S key metric S^K, P key-value moment P^KV, m its normaliser, n the decayed number of tokens.
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

__all__ = ["ReadoutState", "readout", "readout_step"]


class ReadoutState(NamedTuple):
    """S `[B, Hkv, D, D]`, P `[B, Hkv, D, Dv]`, n `[B, Hkv]`; normalising also m `[B, Hkv, D]`; float32."""

    S: mx.array
    P: mx.array
    n: mx.array
    m: mx.array | None = None


def _compose(p: Place) -> mx.array:
    alpha, beta = p.coefficient("alpha"), p.coefficient("beta")
    second = p.la("S", p.q, p.k, None, scale=1.0)  # S_t q_t
    query = mixture(alpha, p.q, beta / p.count("n"), second)
    return p.la("P", query, p.k, p.v, last=True)


READOUT = register(
    Operator(
        "readout",
        order=2,
        state=ReadoutState,
        slots=(Slot("S", symmetric=True), Slot("P", normaliser="m"), Slot("n", counts=True)),
        compose=_compose,
        degree=1,
        options=(
            Option("alpha", 1.0, per_token=True),
            Option("beta", -1.0, per_token=True, key_degree=-2, learned="mean"),
        ),
    )
)


@public
def readout(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    alpha: float | mx.array | None = None,
    beta: float | mx.array | None = None,
    initial_state: ReadoutState | None = None,
    **shared: Unpack[SharedOptions],
) -> tuple[mx.array, ReadoutState]:
    """First order read by `q̃_t = α_t q_t + (β_t / n_t) S_t q_t`: `o = LA_g(Q̃, K, V)`.

    The arguments, shapes and errors that all operators share are described in `mlx_hla.ops`; scale multiplies
    q̃·k and not the product inside q̃. Keys should be unit vectors, or β small beside the inverse of |k|².

    alpha, beta: a finite number of any sign, `[Hq]` or `[B, T, Hq]`; arrays are differentiable. None: 1, −1.
    With `normalize` o_t is divided by scale q̃_tᵀ m_t + ε.
    """
    return sequence(READOUT, q, k, v, initial_state, {"alpha": alpha, "beta": beta}, **shared)


@public
def readout_step(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    state: ReadoutState | None,
    *,
    alpha: float | mx.array | None = None,
    beta: float | mx.array | None = None,
    **shared: Unpack[StepOptions],
) -> tuple[mx.array, ReadoutState]:
    """One token of `readout` (the recurrences at the top of this file); alpha, beta: also `[B, Hq]`."""
    return step(READOUT, q, k, v, state, {"alpha": alpha, "beta": beta}, **shared)
