"""Segment states: what a parallel scan combines so that any bracketing of the tokens gives the serial states.

A segment is a run of neighbouring tokens. Its state holds what it would leave in the streaming state if
it came first, and what it needs to extend a carry from before it. `combine(a, b)` is "a, then b": Eqs.
4.1, 6.2 and 7.7 in decayed forms (the paper's decayed forms are not associative: see the errata in
`reference/README.md`).

Everything here uses `*`, `+`, `@` and indexing only, so it runs on NumPy and MLX arrays alike, with any
leading axes: matrices are [.., D, V] or [.., D, D], vectors are columns [.., D, 1], ρ = Π g is a number
or [.., 1, 1]. The columns m, η, n, r are the denominators' and None unless `normalize` was asked for.

# D key dim, V value dim.
# S = Σ k k^T, C = Σ q v^T, P = Σ k v^T, S^Q = Σ q q^T, every term decayed up to the segment's end.
"""

from functools import reduce
from typing import Any, NamedTuple

import numpy as np


class LinearSegment(NamedTuple):
    """First order (§2.2): P [D, V], m = Σ k."""

    P: Any
    m: Any
    rho: Any


class HLA2Segment(NamedTuple):
    """Second order (Eq. 4.1): S [D, D], C [D, V], F = S C − G [D, V] (masked); m = Σ q, η = S m − h.

    The masked operator reads F, the unmasked one S and C: one segment serves both.
    """

    S: Any
    C: Any
    F: Any
    m: Any
    eta: Any
    rho: Any


class AHLASegment(NamedTuple):
    """AHLA (Eq. 6.2): R = Σ k q^T [D, D], *undecayed*, P [D, V], E [D, V]; m = Σ k, n."""

    R: Any
    P: Any
    m: Any
    E: Any
    n: Any
    rho: Any


class HLA3Segment(NamedTuple):
    """Third order, exact: S, SQ [D, D], P, F [D, V] and the cross moments of a segment with its carry,

    R = Σ_u ρ_u² q_u q_u^T P_u [D, V] and U = Σ_u ρ_u² S_u q_u q_u^T [D, D] (ρ_u = decay from u to the end).
    m = Σ k, η and r stand to P, F and R as their columns for v = 1.  Unmasked, S S^Q P is read.
    """

    S: Any
    SQ: Any
    P: Any
    F: Any
    R: Any
    U: Any
    m: Any
    eta: Any
    r: Any
    rho: Any


KINDS = {"first": LinearSegment, "hla2": HLA2Segment, "ahla": AHLASegment, "hla3": HLA3Segment}
_COLUMNS = {"m", "eta", "n", "r"}
_SQUARE = {"first": (), "hla2": ("S",), "ahla": ("R",), "hla3": ("S", "SQ", "U")}  # the D x D fields


def from_token(kind, q, k, v, g=1.0, normalize=False):
    """One token: q, k [.., D], v [.., V]; g, a number or [.., 1, 1], decays what came before it."""
    _check_kind(kind)
    q, k, v = q[..., None], k[..., None], v[..., None, :]
    q_row, k_row = q.swapaxes(-1, -2), k.swapaxes(-1, -2)
    P, m = k @ v, k if normalize else None
    if kind == "first":
        return LinearSegment(P, m, g)
    if kind == "hla2":
        kt = k @ (k_row @ q)  # k̃ = S q; F = S C, because G starts at 0 (§4.2)
        return HLA2Segment(k @ k_row, q @ v, kt @ v, q if normalize else None, kt if normalize else None, g)
    if kind == "ahla":
        return AHLASegment(k @ q_row, P, m, k @ (q_row @ P), k @ (q_row @ m) if normalize else None, g)
    Q = q @ q_row
    U = k @ (k_row @ Q)
    eta, r = (U @ m, Q @ m) if normalize else (None, None)
    return HLA3Segment(k @ k_row, Q, P, U @ P, Q @ P, U, m, eta, r, g)


def identity(kind, D, V, normalize=False, zeros=np.zeros):
    """The empty segment: all zero, ρ = 1. `zeros(shape)` makes the arrays: `mx.zeros` to work in MLX."""
    _check_kind(kind)
    fields = {"rho": 1.0}
    for name in KINDS[kind]._fields[:-1]:
        if name in _COLUMNS:
            fields[name] = zeros((D, 1)) if normalize else None
        else:
            fields[name] = zeros((D, D if name in _SQUARE[kind] else V))
    return KINDS[kind](**fields)


def _check_kind(kind):
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"[monoid] kind must be one of {', '.join(KINDS)}, got {kind!r}")


def combine(a, b):
    """Segment a, then segment b: associative, and exact for any decay, zeros included."""
    if type(a) is not type(b):
        raise ValueError(f"[monoid] cannot combine {type(a).__name__} with {type(b).__name__}")
    if type(a) not in _COMBINE:
        raise ValueError(f"[monoid] combine takes two segments of one kind, got {type(a).__name__}")
    return _COMBINE[type(a)](a, b)


def _combine_linear(a, b):
    return LinearSegment(b.rho * a.P + b.P, _add(b.rho, a.m, b.m), a.rho * b.rho)


def _combine_hla2(a, b):
    """Eq. 4.1 in terms of F = S C − G:  F_AB = ρ_B² F_A + F_B + (ρ_B S_A) C_B."""
    S = b.rho * a.S
    return HLA2Segment(
        S=S + b.S,
        C=b.rho * a.C + b.C,
        F=b.rho**2 * a.F + b.F + S @ b.C,
        m=_add(b.rho, a.m, b.m),
        eta=_add(b.rho**2, a.eta, b.eta, (S, b.m)),
        rho=a.rho * b.rho,
    )


def _combine_ahla(a, b):
    """Eq. 6.2 with decay:  E_AB = ρ_B E_A + E_B + R_B (ρ_B P_A), and R_AB = R_A + R_B.

    R must not decay: from P_A to the end of B the attenuation is ρ_B, whichever token of B routes the path.
    """
    P, m = b.rho * a.P, _scale(b.rho, a.m)
    return AHLASegment(
        R=a.R + b.R,
        P=P + b.P,
        m=_add(1.0, m, b.m),
        E=b.rho * a.E + b.E + b.R @ P,
        n=_add(b.rho, a.n, b.n, (b.R, m)),
        rho=a.rho * b.rho,
    )


def _combine_hla3(a, b):
    """F = Σ_u ρ_u³ S_u q_u q_u^T P_u, u's two inner sums split at the border between A and B:

    F_AB = ρ³ F_A + F_B + ρ² S_A S^Q_B P_A + ρ S_A R_B + ρ U_B P_A,
    R_AB = ρ² R_A + R_B + ρ S^Q_B P_A,   U_AB = ρ² U_A + U_B + ρ S_A S^Q_B,   ρ = ρ_B.
    """
    rho = b.rho
    S, P, m = rho * a.S, rho * a.P, _scale(rho, a.m)
    SSQ = S @ b.SQ
    return HLA3Segment(
        S=S + b.S,
        SQ=rho * a.SQ + b.SQ,
        P=P + b.P,
        F=rho**3 * a.F + b.F + SSQ @ P + S @ b.R + b.U @ P,
        R=rho**2 * a.R + b.R + b.SQ @ P,
        U=rho**2 * a.U + b.U + SSQ,
        m=_add(1.0, m, b.m),
        eta=_add(rho**3, a.eta, b.eta, (SSQ, m), (S, b.r), (b.U, m)),
        r=_add(rho**2, a.r, b.r, (b.SQ, m)),
        rho=a.rho * rho,
    )


_COMBINE = {
    LinearSegment: _combine_linear,
    HLA2Segment: _combine_hla2,
    AHLASegment: _combine_ahla,
    HLA3Segment: _combine_hla3,
}


def output(segment, q, masked=True, normalize=False, eps=1e-6):
    """What token t reads from the inclusive prefix that ends at t: q [.., D] -> o [.., V]."""
    row = q[..., None, :]
    num, den = _read(segment, row, masked)
    if normalize:
        if den is None:
            raise ValueError("[monoid] normalize=True needs segments made with normalize=True")
        num = num / (den + eps)
    return num[..., 0, :]


def _read(s, row, masked):
    if isinstance(s, LinearSegment):
        pairs = row, s.P, s.m
    elif isinstance(s, HLA2Segment):
        pairs = (row, s.F, s.eta) if masked else (row @ s.S, s.C, s.m)
    elif isinstance(s, AHLASegment):
        pairs = row, s.E, s.n
    else:
        pairs = (row, s.F, s.eta) if masked else (row @ s.S @ s.SQ, s.P, s.m)
    row, matrix, column = pairs
    return row @ matrix, None if column is None else row @ column


def associative_scan(items, combine, identity, *, inclusive=True):
    """Blelloch's work-efficient scan of a list of any length: prefixes of `items` under `combine`.

    exclusive: [e, x₁, x₁x₂, ..]; inclusive (Remark 4.2): each exclusive prefix combined with its own item.
    At most 2n combines for the exclusive scan and 3n for the inclusive one, in O(log n) levels of
    combines that do not depend on one another.
    """
    items = list(items)
    prefixes = _exclusive(items, combine, identity)
    return [combine(p, x) for p, x in zip(prefixes, items, strict=True)] if inclusive else prefixes


def _exclusive(items, combine, start):
    if not items:
        return []
    if len(items) == 1:
        return [start]
    # Up-sweep: neighbours become one item; an odd last item goes up alone. Down-sweep: even places take
    # their
    # pair's prefix, odd ones that prefix and their left neighbour.
    pairs = [combine(a, b) for a, b in zip(items[::2], items[1::2], strict=False)]
    above = _exclusive(pairs + items[2 * len(pairs) :], combine, start)
    out = []
    for i, _ in enumerate(items):
        out.append(combine(above[i // 2], items[i - 1]) if i % 2 else above[i // 2])
    return out


def _scale(rho, x):
    return None if x is None else rho * x


def _add(rho, a, b, *products):
    """rho a + b + Σ M x, or None where the columns are not kept."""
    if a is None or b is None:
        return None
    return reduce(lambda total, pair: total + pair[0] @ pair[1], products, rho * a + b)
