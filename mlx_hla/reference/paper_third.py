"""The paper's third-order algorithms exactly as printed, one head, float64: right or wrong.

q, k [T, d], v [T, dv] -> o [T, dv]. Algorithms 3 and 4 agree with each other (γ = 1), but not with the
masked operator (A A^T A) V that Theorem 7.1 states; `repaired=True` changes one increment and they do.
"""

from functools import reduce
from typing import NamedTuple

import numpy as np

from ..monoid import associative_scan

Array = np.ndarray


class ThirdSegment(NamedTuple):
    """The scan state of §7.3.  M_p [d, dv, d, d] and M_m [d, d, d] are the segment maps, materialised:

    M^KQP[Z]_ae = Σ_bc M_p[a, e, b, c] Z_bc,  M^KQm[Z]_a = Σ_bc M_m[a, b, c] Z_bc.  ρ = γ^length.
    """

    SK: Array
    SQ: Array
    P: Array
    m: Array
    F: Array
    eta: Array
    R: Array
    r: Array
    U: Array
    M_p: Array
    M_m: Array
    rho: float = 1.0


def algorithm_3(q, k, v, *, gamma=1.0, normalize=False, eps=1e-6, repaired=False):
    """Algorithm 3: masked third-order HLA streaming kernel.

    `repaired` replaces G⁽²⁾'s increment S_{t-1} q q^T P_{t-1} by k k^T S^Q_{t-1} k v^T (and h⁽²⁾'s likewise).
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    d, dv, o = k.shape[1], v.shape[1], np.zeros(v.shape)
    SK, SQ, P, m = np.zeros((d, d)), np.zeros((d, d)), np.zeros((d, dv)), np.zeros(d)  # line 1
    G1, G2, G3 = (np.zeros((d, dv)) for _ in range(3))  # line 2
    h1, h2, h3 = (np.zeros(d) for _ in range(3))
    for t in range(len(q)):
        SK_prev, SQ_prev, P_prev, m_prev = SK, SQ, P, m  # line 4
        SK, SQ = gamma * SK_prev + np.outer(k[t], k[t]), gamma * SQ_prev + np.outer(q[t], q[t])  # line 6
        P, m = gamma * P_prev + np.outer(k[t], v[t]), gamma * m_prev + k[t]  # line 7
        u1 = SQ_prev @ k[t]  # line 9
        G1, h1 = gamma * G1 + np.outer(k[t], u1 @ P_prev), gamma * h1 + k[t] * (u1 @ m_prev)
        if repaired:
            beta = k[t] @ SQ_prev @ k[t]
            G2, h2 = gamma * G2 + beta * np.outer(k[t], v[t]), gamma * h2 + beta * k[t]
        else:
            a2 = SK_prev @ q[t]  # line 10
            G2, h2 = gamma * G2 + np.outer(a2, q[t] @ P_prev), gamma * h2 + a2 * (q[t] @ m_prev)
        u3 = SQ_prev @ k[t]  # line 11
        a3 = SK_prev @ u3
        G3, h3 = gamma * G3 + np.outer(a3, v[t]), gamma * h3 + a3
        y = SK @ q[t]  # line 13
        z = SQ @ y
        o[t] = z @ P - q[t] @ G1 - q[t] @ G2 - q[t] @ G3  # line 14
        if normalize:
            o[t] /= q[t] @ (SK @ (SQ @ m) - h1 - h2 - h3) + eps  # lines 16, 17
    return o


def serial_equation_7_5(q, k, v, *, normalize=False, eps=1e-6):
    """The corrected-state recurrence of Eq. 7.5, read by Eq. 7.4's F and η (γ = 1)."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    d, dv, o = k.shape[1], v.shape[1], np.zeros(v.shape)
    S, SQ, P, m, F, eta = (np.zeros(s) for s in ((d, d), (d, d), (d, dv), d, (d, dv), d))
    for t in range(len(q)):
        DK, DQ, DP, dm = np.outer(k[t], k[t]), np.outer(q[t], q[t]), np.outer(k[t], v[t]), k[t]
        F = F + S @ DQ @ DP + DK @ SQ @ DP + DK @ DQ @ P + DK @ DQ @ DP
        eta = eta + S @ DQ @ dm + DK @ SQ @ dm + DK @ DQ @ m + DK @ DQ @ dm
        S, SQ, P, m = S + DK, SQ + DQ, P + DP, m + dm
        o[t] = _read(q[t], F, eta, normalize, eps)
    return o


def third_token(q, k, v, gamma=1.0) -> ThirdSegment:
    """Algorithm 4, lines 1 and 2: the single-token segment."""
    DK, DQ, DP, dm = np.outer(k, k), np.outer(q, q), np.outer(k, v), k
    return ThirdSegment(
        SK=DK,
        SQ=DQ,
        P=DP,
        m=dm,
        F=DK @ DQ @ DP,
        eta=DK @ DQ @ dm,
        R=DQ @ DP,
        r=DQ @ dm,
        U=DK @ DQ,
        M_p=np.einsum("ab,ce->aebc", DK, DP),
        M_m=np.einsum("ab,c->abc", DK, dm),
        rho=gamma,
    )


def third_identity(d, dv) -> ThirdSegment:
    """The all-zero segment, with both maps zero."""
    shapes = ((d, d), (d, d), (d, dv), d, (d, dv), d, (d, dv), d, (d, d), (d, dv, d, d), (d, d, d))
    return ThirdSegment._make([*(np.zeros(s) for s in shapes), 1.0])


def combine_third(a, b) -> ThirdSegment:
    """⊗₃, Eqs. 7.6 and 7.7, with the maps applied as tensors.

    With decay, as §7.3's closing remark has it: "the same carry-scaling convention as in the second-
    order decayed scan", every summary of a scaled by ρ_b. That is not associative.
    """
    if b.rho != 1.0:
        a = ThirdSegment._make([*(b.rho * x for x in a[:-1]), a.rho])
    sums = {name: getattr(a, name) + getattr(b, name) for name in ThirdSegment._fields}
    sums["rho"] = a.rho * b.rho
    sums["F"] = sums["F"] + a.SK @ b.R + np.einsum("aebc,bc->ae", b.M_p, a.SQ) + b.U @ a.P
    sums["eta"] = sums["eta"] + a.SK @ b.r + np.einsum("abc,bc->a", b.M_m, a.SQ) + b.U @ a.m
    return ThirdSegment(**sums)


def algorithm_4(q, k, v, *, chunk=8, normalize=False, eps=1e-6):
    """Algorithm 4: two levels of exclusive Blelloch scans under ⊗₃ (γ = 1, as the paper states it).

    The maps hold d³ dv numbers per segment: for small d only.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    empty, o = third_identity(k.shape[1], v.shape[1]), np.zeros(v.shape)
    tokens = [third_token(*x) for x in zip(q, k, v, strict=True)]  # lines 1, 2
    chunks = [tokens[a : a + chunk] for a in range(0, len(tokens), chunk)]
    local = [associative_scan(c, combine_third, empty, inclusive=False) for c in chunks]  # line 3
    summaries = [combine_third(p[-1], c[-1]) for p, c in zip(local, chunks, strict=True)]
    carries = associative_scan(summaries, combine_third, empty, inclusive=False)  # line 4
    for b, members in enumerate(chunks):
        for i, token in enumerate(members):  # line 5
            state = reduce(combine_third, (carries[b], local[b][i], token))  # line 6
            t = b * chunk + i
            o[t] = _read(q[t], state.F, state.eta, normalize, eps)  # lines 7-10
    return o


def algorithm_3_composed(q, k, v):
    """Algorithm 3 at γ = 1 as first-order passes with d x d and d x dv states: no segment map (§7.3).

    With a_t = S_{t-1} q_t, β_t = k_t^T S^Q_{t-1} k_t, r_t = P_{t-1}^T q_t and α_t = q_t·k_t,
    o = LA(Q, α a + β K + α² K, V) + LA(Q, α K, r): Eq. 7.5 term by term.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    strict = np.tril(q @ k.T, -1)
    a, r = strict @ k, strict @ v
    alpha = (q * k).sum(1, keepdims=True)
    beta = (np.tril(k @ q.T, -1) ** 2).sum(1, keepdims=True)
    return np.tril(q @ (alpha * a + (beta + alpha**2) * k).T) @ v + np.tril(q @ (alpha * k).T) @ r


def _read(q, F, eta, normalize, eps):
    o = q @ F
    return o / (q @ eta + eps) if normalize else o
