"""Third-order HLA: exact masked, unmasked, and Algorithm 3 as the paper prints it.

    k̃_t = S_t q_t ,  S_t = g_t S_{t-1} + k_t k_tᵀ ,  P_t = g_t P_{t-1} + k_t v_tᵀ
    exact      F_t = g_t³ F_{t-1} + k̃_t (q_tᵀ P_t) ,   o_t = q_tᵀ F_t    =  tril(A Aᵀ) A V
    unmasked   o_t = q_tᵀ S^K_t S^Q_t P_t                                  (§7.1)
    paper      o_t = q_tᵀ (S^K_t S^Q_t P_t − G¹_t − G²_t − G³_t)           (Alg. 3; not the masked
                                                                           product, see the errata)

Names: S or SK key metric S^K, SQ query metric S^Q, P key-value moment P^KV, m its normaliser m^K,
F corrected state, η its normaliser, G1..G3 and h1..h3 the cross-summaries of Eq. 7.2 and 7.3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx

from .arguments import SharedOptions, StepOptions, public
from .backend import sequence, step
from .checks import boolean, choice, fail
from .operator import Operator, Slot, register
from .places import Place

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "HLA3PaperState",
    "HLA3State",
    "HLA3UnmaskedState",
    "hla3",
    "hla3_step",
]


class HLA3State(NamedTuple):
    """S `[B, Hkv, D, D]`, P `[B, Hkv, D, Dv]`, F `[B, Hq, D, Dv]`; normalising also m, eta; float32."""

    S: mx.array
    P: mx.array
    F: mx.array
    m: mx.array | None = None
    eta: mx.array | None = None


class HLA3UnmaskedState(NamedTuple):
    """SK `[B, Hkv, D, D]`, SQ `[B, Hq, D, D]`, P `[B, Hkv, D, Dv]`; normalising also m; float32."""

    SK: mx.array
    SQ: mx.array
    P: mx.array
    m: mx.array | None = None


class HLA3PaperState(NamedTuple):
    """What Alg. 3 keeps: SK, SQ, P, G1..G3 and, when normalising, m, h1..h3; float32.

    SK and P have one head per key-value head, the others one per query head.
    """

    SK: mx.array
    SQ: mx.array
    P: mx.array
    G1: mx.array
    G2: mx.array
    G3: mx.array
    m: mx.array | None = None
    h1: mx.array | None = None
    h2: mx.array | None = None
    h3: mx.array | None = None


def _exact(p: Place) -> mx.array:
    kt = p.la("S", p.q, p.k, None)  # k̃_t = S_t q_t
    r = p.la("P", p.q, p.k, p.v)  # r_t = q_tᵀ P_t
    return p.la("F", p.q, kt, r, power=3, last=True)  # o_t = q_tᵀ F_t


def _unmasked(p: Place) -> mx.array:
    q = p.scaled_q()
    y = p.la("SK", q, p.k, None, scale=1.0)
    z = p.la("SQ", y, q, None, scale=1.0)
    return p.la("P", z, p.k, p.v, scale=1.0, last=True)


def _paper(p: Place) -> mx.array:
    q, k, v = p.scaled_q(), p.k, p.v
    # Alg. 3, lines 9-11, with the summaries before token t
    u = p.la_before("SQ", p.per_query(k), q, None)  # u1 = u3 = S^Q k
    w = p.la_before("P", u, k, v)  # u1ᵀ P
    a2 = p.la_before("SK", q, k, None)  # S^K q
    r2 = p.la_before("P", q, k, v)  # qᵀ P
    a3 = p.la_before("SK", u, k, None)  # S^K u3
    # line 13: z = S^Q S^K q, termA = zᵀ P
    y = p.la("SK", q, k, None, scale=1.0)
    z = p.la("SQ", y, q, None, scale=1.0)
    o = p.la("P", z, k, v, scale=1.0, last=True)
    b = p.la("G1", q, k, w, scale=1.0, last=True)
    c = p.la("G2", q, a2, r2, scale=1.0, last=True)
    d = p.la("G3", q, a3, v, scale=1.0, last=True)
    return o - b - c - d  # line 14


_P, _SK, _SQ = Slot("P", normaliser="m"), Slot("SK", symmetric=True), Slot("SQ", "q", symmetric=True)

HLA3 = register(
    Operator(
        "hla3",
        order=3,
        state=HLA3State,
        slots=(Slot("S", symmetric=True), _P, Slot("F", "q", "eta")),
        compose=_exact,
        degree=3,
        family="hla3",
    )
)
HLA3_UNMASKED = register(
    Operator(
        "hla3",
        order=3,
        state=HLA3UnmaskedState,
        slots=(_SK, _SQ, _P),
        compose=_unmasked,
        degree=3,
        variant="unmasked",
        selected={"masked": False},
    )
)
HLA3_PAPER = register(
    Operator(
        "hla3",
        order=3,
        state=HLA3PaperState,
        slots=(_SK, _SQ, _P, *(Slot(f"G{i}", "q", f"h{i}") for i in (1, 2, 3))),
        compose=_paper,
        degree=3,
        variant="paper",
        selected={"convention": "paper"},
        wide=True,
    )
)


def _chosen(op: str, masked: bool, convention: str) -> Operator:
    choice(op, "convention", convention, ("exact", "paper"))
    if boolean(op, "masked", masked):
        return HLA3 if convention == "exact" else HLA3_PAPER
    if convention == "paper":
        fail(op, "convention 'paper' is Algorithm 3, which needs masked=True", "masked=False")
    return HLA3_UNMASKED


@public
def hla3(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    masked: bool = True,
    convention: str = "exact",
    initial_state: HLA3State | HLA3UnmaskedState | HLA3PaperState | None = None,
    **shared: Unpack[SharedOptions],
) -> tuple[mx.array, HLA3State | HLA3UnmaskedState | HLA3PaperState]:
    """Third order: `o = tril(A Aᵀ) A V` with `A = L ⊙ scale·QKᵀ` (Thm 7.1's definition).

    The arguments, shapes and errors that all operators share are described in `mlx_hla.ops`.

    masked: False gives o_t = q_tᵀ S^K_t S^Q_t P_t (§7.1).
    convention: "exact", the masked product of Thm 7.1's proof, or "paper", Algorithm 3 as printed (with
        its decay on every summary), which differs from it and is masked.
    With `normalize` o_t is divided by the same operator on v = 1, plus ε (Alg. 3, line 17).
    """
    return sequence(_chosen("hla3", masked, convention), q, k, v, initial_state, **shared)


@public
def hla3_step(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    state: HLA3State | HLA3UnmaskedState | HLA3PaperState | None,
    *,
    masked: bool = True,
    convention: str = "exact",
    **shared: Unpack[StepOptions],
) -> tuple[mx.array, HLA3State | HLA3UnmaskedState | HLA3PaperState]:
    """One token of `hla3` (the recurrences at the top of this file)."""
    return step(_chosen("hla3_step", masked, convention), q, k, v, state, **shared)
