"""Any order: `o = tril(A Aᵀ)^p A^{n−2p} V`, p = n // 2 pairs and one A more where n is odd.

    x = V or LA_g(Q, K, V);  then p times  x ← LA_{g^order so far}(Q, K̃, x),  K̃ = LA_g(Q, K, K)

Orders 1, 2 and 3 are `linear_attention`, `hla2` and `hla3`; each pair more costs one state F more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx

from .arguments import SHARED, STEP, check_names
from .backend import sequence, step
from .checks import fail
from .hla2 import hla2, hla2_step
from .hla3 import hla3, hla3_step
from .linear import linear_attention, linear_attention_step
from .operator import MAX_ORDER, Operator, Slot, choices, find
from .places import Place

__all__ = ["HLAState", "hla", "hla_step"]


class HLAState(NamedTuple):
    """State of order n ≥ 4: S `[B, Hkv, D, D]`, F a tuple of n // 2 `[B, Hq, D, Dv]`; float32.

    P `[B, Hkv, D, Dv]` where n is odd; normalising also m `[B, Hkv, D]` (n odd) and eta, a tuple of
    `[B, Hq, D]` beside F.
    """

    S: mx.array
    F: tuple[mx.array, ...]
    P: mx.array | None = None
    m: mx.array | None = None
    eta: tuple[mx.array, ...] | None = None


@cache
def of_order(n: int) -> Operator:
    """The operator of order n, 1 to `MAX_ORDER`."""
    if n <= 3:
        return find(("first", "hla2", "hla3")[n - 1])
    pairs, odd = divmod(n, 2)

    def compose(p: Place) -> mx.array:
        kt = p.la("S", p.q, p.k, None)  # k̃_t = S_t q_t
        x = p.la("P", p.q, p.k, p.v) if odd else p.v
        for i in range(pairs):
            x = p.la(f"F{i}", p.q, kt, x, power=2 * (i + 1) + odd, last=i == pairs - 1)
        return x

    return Operator(
        "hla",
        order=n,
        state=HLAState,
        slots=(
            Slot("S", symmetric=True),
            *([Slot("P", normaliser="m")] if odd else []),
            *(Slot("F", "q", "eta", member=i) for i in range(pairs)),
        ),
        compose=compose,
        degree=n,
        variant=f"order{n}",
        selected={"order": n},
    )


def operator_of(name: str | int) -> Operator:
    """The operator that a layer or a configuration names: by its label, or an order."""
    if isinstance(name, int) and not isinstance(name, bool) and 1 <= name <= MAX_ORDER:
        return of_order(name)
    if isinstance(name, str):
        return find(name)
    raise ValueError(
        f"operator must be one of {', '.join(choices())} or an order from 1 to {MAX_ORDER}, got {name!r}"
    )


def _order(op: str, order: int) -> int:
    if isinstance(order, bool) or not isinstance(order, int) or not 1 <= order <= MAX_ORDER:
        fail(op, f"order must be an integer from 1 to {MAX_ORDER}", repr(order))
    return order


def _check_options(op: str, order: int, options: dict[str, Any], known: Iterable[str]) -> None:
    for name in ("masked", "ridge", "convention"):
        if name in options:
            fail(op, f"{name} must be left out: it is an argument of orders 2 and 3", f"order {order}")
    check_names(op, options, known)


def hla(q: mx.array, k: mx.array, v: mx.array, *, order: int, **options: Any) -> tuple[mx.array, Any]:
    """HLA of any order: 1 `linear_attention`, 2 `hla2`, 3 `hla3`, n ≥ 4 `tril(A Aᵀ)^p A^{n−2p} V`.

    The arguments, shapes and errors that all operators share are described in `mlx_hla.ops`; orders 2
    and 3 also take their operators' own options.
    """
    low: dict[int, Callable] = {1: linear_attention, 2: hla2, 3: hla3}
    if _order("hla", order) in low:
        return low[order](q, k, v, **options)
    _check_options("hla", order, options, SHARED)
    return sequence(of_order(order), q, k, v, **options)


def hla_step(
    q: mx.array, k: mx.array, v: mx.array, state: Any, *, order: int, **options: Any
) -> tuple[mx.array, Any]:
    """One token of `hla`: the step of the same order."""
    low: dict[int, Callable] = {1: linear_attention_step, 2: hla2_step, 3: hla3_step}
    if _order("hla_step", order) in low:
        return low[order](q, k, v, state, **options)
    _check_options("hla_step", order, options, STEP)
    return step(of_order(order), q, k, v, state, **options)
