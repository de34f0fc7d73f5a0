"""Two operators that only the study has, made of the library's passes.

mesa        several Chebyshev steps towards the least-squares readout P (S/n + a I)⁻¹ q:

    n_t = g_t n_{t-1} + 1 ,  S_t = g_t S_{t-1} + k_t k_tᵀ ,  P_t = g_t P_{t-1} + k_t v_tᵀ
    q̃_t ≈ a (S_t / n_t + a I)⁻¹ q_t ,   o_t = scale P_tᵀ q̃_t

            With unit keys S/n has trace 1, so the eigenvalues of S/n + a I lie in [a, 1 + a] whatever the
            data: the ridge is tied to S's size and the steps' coefficients are constants.
first_ahla  first order and AHLA in one: o = A (V + β A V), with the states of AHLA.

The records are not left in the library's table: `registered` puts them there for as long as a layer is built.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import mlx.core as mx

from mlx_hla.ops.ahla import AHLAState
from mlx_hla.ops.checks import Option
from mlx_hla.ops.operator import OPERATORS, Operator, Slot
from mlx_hla.ops.places import Place, mixture, number
from mlx_hla.ops.readout import ReadoutState

RIDGE, STEPS = 0.1, 4


def chebyshev(low: float, high: float, steps: int) -> list[tuple[float, float]]:
    """(a, b) of every step d ← a d + b r, x ← x + d, r ← r − M d towards M x = r.

    x and d start at 0; M's eigenvalues lie in [low, high]. The error of n steps is at most
    1 / T_n((high + low) / (high − low)).
    """
    centre, radius = (high + low) / 2, (high - low) / 2
    ratio = radius / centre
    out = [(0.0, 1 / centre)]
    for _ in range(steps - 1):
        after = 1 / (2 * centre / radius - ratio)
        out.append((after * ratio, 2 * after / radius))
        ratio = after
    return out


def _mesa(steps: int, ridge: float) -> Callable[[Place], mx.array]:
    def compose(p: Place) -> mx.array:
        size = number(p.call, "size") / p.count("n")  # of S, so that its trace is 1
        rest = ridge * p.q.astype(mx.float32)
        x = d = mx.zeros_like(rest)
        for i, (a, b) in enumerate(chebyshev(ridge, 1 + ridge, steps)):
            if i:
                rest = rest - mixture(size, p.la("S", d.astype(p.q.dtype), p.k, None, scale=1.0), ridge, d)
            d = a * d + b * rest
            x = x + d
        if steps == 1:  # no pass has gone over S
            p.la("S", p.q, p.k, None, scale=1.0)
        return p.la("P", x.astype(p.q.dtype), p.k, p.v, last=True)

    return compose


def mesa(steps: int = STEPS, ridge: float = RIDGE) -> Operator:
    """The operator with that many Chebyshev steps (`steps` − 1 passes over S) and that ridge a."""
    return Operator(
        "mesa",
        order=2,
        state=ReadoutState,
        slots=(Slot("S", symmetric=True), Slot("P", normaliser="m"), Slot("n", counts=True)),
        compose=_mesa(steps, ridge),
        degree=1,
        options=(Option("size", 1.0, key_degree=-2),),
    )


def _first_ahla(p: Place) -> mx.array:
    r = p.la("P", p.q, p.k, p.v)  # A V
    return p.la("E", p.q, p.k, mixture(1.0, p.v, number(p.call, "beta"), r), last=True)


FIRST_AHLA = Operator(
    "first_ahla",
    order=2,
    state=AHLAState,
    slots=(Slot("P", normaliser="m"), Slot("E", "q", "n")),
    compose=_first_ahla,
    degree=None,
    options=(Option("beta", 1.0),),
)


@contextlib.contextmanager
def registered(*operators: Operator) -> Iterator[None]:
    """In here `HLAttention` knows these operators by name; a layer keeps its own."""
    try:
        OPERATORS.update({o.key: o for o in operators})
        yield
    finally:
        for o in operators:
            del OPERATORS[o.key]
