"""The paper's second-order algorithms and monoids exactly as printed, one head, float64: right or wrong.

q, k [T, d], v [T, dv] -> o [T, dv]. Each statement stands on the line that the paper gives it. What
does not hold is kept as it is; `mlx_hla.monoid` and the `serial_*` functions are the mended forms, and
the errata table of this folder's README measures the difference.
"""

from functools import partial
from typing import NamedTuple

import numpy as np

from ..monoid import associative_scan

Array = np.ndarray


class MaskedSegment(NamedTuple):
    """The state of §4.2: S [d, d], C [d, dv], m [d], G [d, dv], h [d] and ρ = γ^length."""

    S: Array
    C: Array
    m: Array
    G: Array
    h: Array
    rho: float


class AHLASegment(NamedTuple):
    """The augmented state of §6.2: R [d, d], P [d, dv], m [d], E [d, dv], n [d] and ρ = γ^length."""

    R: Array
    P: Array
    m: Array
    E: Array
    n: Array
    rho: float


def masked_token(q, k, v, gamma=1.0) -> MaskedSegment:
    """Algorithm 1, line 1: ΔS = k k^T, ΔC = q v^T, Δm = q, G = h = 0."""
    d, dv = len(k), len(v)
    return MaskedSegment(np.outer(k, k), np.outer(q, v), q, np.zeros((d, dv)), np.zeros(d), gamma)


def masked_identity(d, dv) -> MaskedSegment:
    """The zero-length segment: all-zero summaries, ρ = 1 (Thm 4.1's proof)."""
    return MaskedSegment(
        np.zeros((d, d)), np.zeros((d, dv)), np.zeros(d), np.zeros((d, dv)), np.zeros(d), 1.0
    )


def combine_masked(a, b, attenuation=1) -> MaskedSegment:
    """⊕_γ of §4.2 as printed; Eq. 4.1 where every ρ is 1.

    With decay it is not associative.  `attenuation=2` is the mended one: G and h attenuate by ρ_B².
    """
    rho = b.rho
    return MaskedSegment(
        S=rho * a.S + b.S,
        C=rho * a.C + b.C,
        m=rho * a.m + b.m,
        G=rho**attenuation * a.G + b.G + b.S @ (rho * a.C),
        h=rho**attenuation * a.h + b.h + b.S @ (rho * a.m),
        rho=a.rho * rho,
    )


def ahla_token(q, k, v, gamma=1.0) -> AHLASegment:
    """A token under §6.2: R = k q^T, P = k v^T, m = k, E = k (q^T P), n = k (q^T m)."""
    P = np.outer(k, v)
    return AHLASegment(np.outer(k, q), P, k, np.outer(k, q @ P), k * (q @ k), gamma)


def combine_ahla(a, b, decay_r=True) -> AHLASegment:
    """The decay-aware concatenation of §6.2 as printed; Eq. 6.2 where every ρ is 1.

    With decay it is not associative.  `decay_r=False` is the mended one: R does not attenuate.
    """
    rho = b.rho
    return AHLASegment(
        R=(rho if decay_r else 1.0) * a.R + b.R,
        P=rho * a.P + b.P,
        m=rho * a.m + b.m,
        E=rho * a.E + b.E + b.R @ (rho * a.P),
        n=rho * a.n + b.n + b.R @ (rho * a.m),
        rho=a.rho * rho,
    )


def algorithm_1(q, k, v, *, gamma=1.0, normalize=False, eps=1e-6, ridge=0.0):
    """Algorithm 1: masked second-order HLA with the within-chunk scan; the sequence is one chunk."""
    q, k, v = _float64(q, k, v)
    d, dv, o = k.shape[1], v.shape[1], np.zeros(v.shape)
    tokens = [masked_token(*x, gamma) for x in zip(q, k, v, strict=True)]  # line 1
    prefixes = associative_scan(tokens, combine_masked, masked_identity(d, dv), inclusive=False)  # line 2
    for t, (prev, delta) in enumerate(zip(prefixes, tokens, strict=True)):  # line 3
        S = gamma * prev.S + delta.S  # line 5
        C = gamma * prev.C + delta.C
        m = gamma * prev.m + delta.m
        G = gamma * prev.G + delta.S @ prev.C  # line 6
        h = gamma * prev.h + delta.S @ prev.m
        o[t] = _read_masked(q[t], S, C, m, G, h, normalize, eps, ridge)
    return o


def serial_section_4_3(q, k, v, *, gamma=1.0, normalize=False, eps=1e-6, ridge=0.0):
    """The serial decayed updates of §4.3 (at γ = 1, the online updates of §3.1), read by Thm 3.1."""
    q, k, v = _float64(q, k, v)
    o = np.zeros(v.shape)
    S, C, m, G, h, _ = masked_identity(k.shape[1], v.shape[1])
    for t in range(len(q)):
        G, h = gamma * G + np.outer(k[t], k[t] @ C), gamma * h + k[t] * (k[t] @ m)
        S = gamma * S + np.outer(k[t], k[t])
        C, m = gamma * C + np.outer(q[t], v[t]), gamma * m + q[t]
        o[t] = _read_masked(q[t], S, C, m, G, h, normalize, eps, ridge)
    return o


def read_masked(q, s, *, normalize=False, eps=1e-6, ridge=0.0):
    """Theorem 3.1 on a segment that holds the whole prefix: q^T (S C − G), normalised by Eq. 3.4."""
    return _read_masked(q, s.S, s.C, s.m, s.G, s.h, normalize, eps, ridge)


def _read_masked(q, S, C, m, G, h, normalize, eps, ridge):
    """Algorithm 1, lines 7-16."""
    u = q @ (S + ridge * np.eye(len(q)))  # lines 7, 9
    o = u @ C - q @ G  # line 10
    return o / (u @ m - q @ h + eps) if normalize else o  # lines 14, 15


def algorithm_2(q, k, v, *, gamma=1.0, normalize=False, eps=1e-6):
    """Algorithm 2: AHLA streaming with causal mask and decay."""
    q, k, v = _float64(q, k, v)
    d, o = k.shape[1], np.zeros(v.shape)
    P, m, E, n = np.zeros((d, v.shape[1])), np.zeros(d), np.zeros((d, v.shape[1])), np.zeros(d)
    for t in range(len(q)):
        P, m = gamma * P + np.outer(k[t], v[t]), gamma * m + k[t]  # line 3
        r, s = q[t] @ P, q[t] @ m  # lines 4, 5
        E, n = gamma * E + np.outer(k[t], r), gamma * n + s * k[t]  # line 6
        o[t] = q[t] @ E  # line 7
        if normalize:
            o[t] /= q[t] @ n + eps  # line 9
    return o


def figure_1c(q, k, v, chunk, *, cross_term=False):
    """Fig. 1 C as printed: q_t^T (S C − G) of the carry, plus the chunk's own masked operator (γ = 1).

    `cross_term=True` adds what is missing: q_t^T S_carry C_t with C_t of the chunk's tokens up to t.
    """
    q, k, v = _float64(q, k, v)
    carry, out = masked_identity(k.shape[1], v.shape[1]), []
    for a in range(0, len(q), chunk):
        qc, kc, vc = (x[a : a + chunk] for x in (q, k, v))
        A = np.tril(qc @ kc.T)
        o = qc @ (carry.S @ carry.C - carry.G) + np.tril(A @ A.T) @ vc
        if cross_term:
            o = o + np.tril(qc @ carry.S @ qc.T) @ vc
        out.append(o)
        carry = _fold(combine_masked, masked_token, carry, qc, kc, vc)
    return np.concatenate(out)


def figure_2c(q, k, v, chunk, *, include_token=False):
    """Fig. 2 C as printed: q_t^T (E_carry + R_{<t} P_carry) + the chunk's own A A V (γ = 1).

    `include_token=True` is R_{≤t}: the token's own k_t q_t^T routes the carry too, as E sums over i ≤ t.
    """
    q, k, v = _float64(q, k, v)
    d, dv = k.shape[1], v.shape[1]
    carry = AHLASegment(np.zeros((d, d)), np.zeros((d, dv)), np.zeros(d), np.zeros((d, dv)), np.zeros(d), 1.0)
    out = []
    for a in range(0, len(q), chunk):
        qc, kc, vc = (x[a : a + chunk] for x in (q, k, v))
        A = np.tril(qc @ kc.T)
        routed = np.tril(qc @ kc.T, 0 if include_token else -1) @ (qc @ carry.P)
        out.append(qc @ carry.E + routed + A @ A @ vc)
        carry = _fold(partial(combine_ahla, decay_r=False), ahla_token, carry, qc, kc, vc)
    return np.concatenate(out)


def _fold(combine, token, carry, q, k, v):
    for x in zip(q, k, v, strict=True):
        carry = combine(carry, token(*x))
    return carry


def _float64(*arrays):
    return tuple(np.asarray(x, np.float64) for x in arrays)
