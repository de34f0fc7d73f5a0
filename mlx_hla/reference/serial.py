"""Serial recurrences, one token at a time in float64: the oracle of outputs *and* states.

Every function takes the public layout and options and returns `(o, state)`:
q [B, T, Hq, D], k [B, T, Hkv, D], v [B, T, Hkv, V] -> o [B, T, Hq, V], Hq a multiple of Hkv.
g_t (`decay`) multiplies the state before token t is added.  Inside the loops, queries are [B, Hkv, G, D] with
G = Hq / Hkv and per-query-head states [B, Hkv, G, D, V]; with `normalize` every value carries a last column
of ones, so the denominators' vectors (m, η, n) are the last columns of the matrices.
"""

import numpy as np

from .prepare import carried, finish, part, prepare
from .states import (
    AHLAState,
    HLA2State,
    HLA2UnmaskedState,
    HLA3PaperState,
    HLA3State,
    HLA3UnmaskedState,
    HLAState,
    LinearState,
)


def serial_linear_attention(
    q,
    k,
    v,
    *,
    scale=1.0,
    decay=None,
    normalize=False,
    eps=1e-6,
    mask=None,
    segment_ids=None,
    initial_state=None,
):
    """First order (§2.2): P_t = g_t P_{t-1} + k_t v_t^T, o_t = P_t^T q_t."""
    run = Run(q, k, v, scale, decay, normalize, eps, mask, segment_ids, initial_state)
    P = run.state("P", "m", per_query=False)
    for t, q_t, k_t, v_t, g in run.tokens():
        P = g * P + outer(k_t, v_t)
        run.o[:, t] = q_t @ P
    return run.output(), LinearState(*part(P, normalize))


def serial_hla2(
    q,
    k,
    v,
    *,
    scale=1.0,
    decay=None,
    normalize=False,
    eps=1e-6,
    mask=None,
    segment_ids=None,
    initial_state=None,
    masked=True,
    ridge=0.0,
):
    """Second order.  S_t = g S_{t-1} + k k^T, k̃_t = (S_t^T + λI) q_t, and then

    masked (Thm 3.1):   F_t = g² F_{t-1} + k̃_t v_t^T,  o_t = F_t^T q_t      (F = S C − G)
    unmasked (Eq. 3.1): C_t = g C_{t-1} + q_t v_t^T,    o_t = C_t^T k̃_t

    S is symmetric.  S^T is written because that is what a carried S that is not symmetric means here.
    """
    run = Run(q, k, v, scale, decay, normalize, eps, mask, segment_ids, initial_state)
    S = run.state("S", None, per_query=False)
    if masked:
        F = run.state("F", "eta")
        for t, q_t, k_t, v_t, g in run.tokens():
            S = g * S + outer(k_t, k_t)
            kt_t = q_t @ S + ridge * q_t
            F = per_head(g**2) * F + outer(kt_t, v_t[:, :, None])
            run.o[:, t] = read(q_t, F)
        return run.output(), HLA2State(S, *run.public(F))
    C = run.state("C", "m")
    for t, q_t, k_t, v_t, g in run.tokens():
        S = g * S + outer(k_t, k_t)
        kt_t = q_t @ S + ridge * q_t
        C = per_head(g) * C + outer(q_t, v_t[:, :, None])
        run.o[:, t] = read(kt_t, C)
    return run.output(), HLA2UnmaskedState(S, *run.public(C))


def serial_ahla(
    q,
    k,
    v,
    *,
    scale=1.0,
    decay=None,
    normalize=False,
    eps=1e-6,
    mask=None,
    segment_ids=None,
    initial_state=None,
):
    """AHLA (Thm 6.1, Alg. 2): P_t = g P + k v^T, E_t = g E + k (q^T P_t), o_t = E_t^T q_t."""
    run = Run(q, k, v, scale, decay, normalize, eps, mask, segment_ids, initial_state)
    P = run.state("P", "m", per_query=False)
    E = run.state("E", "n")
    for t, q_t, k_t, v_t, g in run.tokens():
        P = g * P + outer(k_t, v_t)
        E = per_head(g) * E + outer(k_t[:, :, None], q_t @ P)
        run.o[:, t] = read(q_t, E)
    P, m = part(P, normalize)
    E, n = run.public(E)
    return run.output(), AHLAState(P, E, m, n)


def serial_hla3(
    q,
    k,
    v,
    *,
    scale=1.0,
    decay=None,
    normalize=False,
    eps=1e-6,
    mask=None,
    segment_ids=None,
    initial_state=None,
    masked=True,
    convention="exact",
):
    """Third order.  S_t = g S + k k^T, P_t = g P + k v^T, and then

    masked, exact:   F_t = g³ F_{t-1} + (S_t^T q_t)(q_t^T P_t),  o_t = F_t^T q_t   (tril(A A^T) A V at g = 1)
    masked, paper:   Algorithm 3 as printed, with g_t where γ stands
    unmasked (§7.1): S^Q_t = g S^Q + q q^T,  o_t^T = q_t^T S_t S^Q_t P_t

    A segment border clears the whole state.  (A printed g_t = 0 would not: Algorithm 3's cross-summaries read
    the undecayed S_{t-1}, S^Q_{t-1} and P_{t-1}.)
    """
    if convention not in ("exact", "paper"):
        raise ValueError(f"[reference] convention must be 'exact' or 'paper', got {convention!r}")
    run = Run(q, k, v, scale, decay, normalize, eps, mask, segment_ids, initial_state)
    if masked and convention == "paper":
        return _algorithm_3_batched(run)
    S = run.state("S" if masked else "SK", None, per_query=False)
    P = run.state("P", "m", per_query=False)
    if masked:
        F = run.state("F", "eta")
        for t, q_t, k_t, v_t, g in run.tokens():
            S = g * S + outer(k_t, k_t)
            P = g * P + outer(k_t, v_t)
            F = per_head(g**3) * F + outer(q_t @ S, q_t @ P)
            run.o[:, t] = read(q_t, F)
        P, m = part(P, normalize)
        F, eta = run.public(F)
        return run.output(), HLA3State(S, P, F, m, eta)
    SQ = run.state("SQ", None)
    for t, q_t, k_t, v_t, g in run.tokens():
        S = g * S + outer(k_t, k_t)
        P = g * P + outer(k_t, v_t)
        SQ = per_head(g) * SQ + outer(q_t, q_t)
        run.o[:, t] = read(q_t @ S, SQ) @ P
    return run.output(), HLA3UnmaskedState(S, run.public_matrix(SQ), *part(P, normalize))


def _algorithm_3_batched(run):
    """Algorithm 3's lines 4-14 for [B, H] at once."""
    SK = run.state("SK", None, per_query=False)
    SQ = run.state("SQ", None)
    P = run.state("P", "m", per_query=False)
    G1, G2, G3 = (run.state(f"G{i}", f"h{i}") for i in (1, 2, 3))
    keep = ~run.inputs.reset
    for t, q_t, k_t, v_t, g in run.tokens():
        if not keep[:, t].all():
            here = keep[:, t, None, None, None]
            SK, P = SK * here, P * here
            SQ, G1, G2, G3 = (x * here[..., None] for x in (SQ, G1, G2, G3))
        SK_prev, SQ_prev, P_prev = SK, SQ, P
        gh = per_head(g)
        k_h = k_t[:, :, None] + np.zeros_like(q_t)
        SK, P = g * SK_prev + outer(k_t, k_t), g * P_prev + outer(k_t, v_t)
        SQ = gh * SQ_prev + outer(q_t, q_t)
        u1 = read(k_h, SQ_prev)
        G1 = gh * G1 + outer(k_h, u1 @ P_prev)
        a2 = q_t @ SK_prev
        G2 = gh * G2 + outer(a2, q_t @ P_prev)
        a3 = u1 @ SK_prev  # u3 = u1
        G3 = gh * G3 + outer(a3, v_t[:, :, None])
        term_a = read(q_t @ SK, SQ) @ P
        run.o[:, t] = term_a - read(q_t, G1) - read(q_t, G2) - read(q_t, G3)
    P, m = part(P, run.normalize)
    (G1, h1), (G2, h2), (G3, h3) = (run.public(x) for x in (G1, G2, G3))
    return run.output(), HLA3PaperState(SK, run.public_matrix(SQ), P, G1, G2, G3, m, h1, h2, h3)


def serial_hla(
    q,
    k,
    v,
    *,
    order,
    scale=1.0,
    decay=None,
    normalize=False,
    eps=1e-6,
    mask=None,
    segment_ids=None,
    initial_state=None,
):
    """Order n = 2p + r, r in {0, 1}: tril(A A^T)^p A^r V.

    With u = V, or u_t = P_t^T q_t after P_t = g P_{t-1} + k v^T when n is odd, each of the p pairs does
    F_t = g^i F_{t-1} + (S_t^T q_t) u_t^T, u_t = F_t^T q_t, where i is the order reached by that pair:

    n = 2: LA_{g²}(Q, K̃, V)                     n = 3: LA_{g³}(Q, K̃, LA_g(Q, K, V))
    n = 4: LA_{g⁴}(Q, K̃, LA_{g²}(Q, K̃, V))      n = 5: LA_{g⁵}(Q, K̃, LA_{g³}(Q, K̃, LA_g(Q, K, V)))   ..

    Every token s that is summed over is thereby weighted by Π_{s<r≤t} g_r, its attenuation up to the output's
    t; `dense_hla` is the matrix.  Orders 1, 2, 3 are `linear_attention`, `hla2`, `hla3`, with their states.
    """
    if not isinstance(order, int) or order < 1:
        raise ValueError(f"[reference] order must be an integer of at least 1, got {order!r}")
    if order <= 3:
        options = {"scale": scale, "decay": decay, "normalize": normalize, "eps": eps, "mask": mask}
        op = (serial_linear_attention, serial_hla2, serial_hla3)[order - 1]
        return op(q, k, v, segment_ids=segment_ids, initial_state=initial_state, **options)
    run = Run(q, k, v, scale, decay, normalize, eps, mask, segment_ids, initial_state)
    pairs, odd = divmod(order, 2)
    S = run.state("S", None, per_query=False)
    P = run.state("P", "m", per_query=False) if odd else None
    Fs = [run.state("F", "eta", index=i) for i in range(pairs)]
    for t, q_t, k_t, v_t, g in run.tokens():
        S = g * S + outer(k_t, k_t)
        kt_t = q_t @ S
        u = v_t[:, :, None]
        if odd:
            P = g * P + outer(k_t, v_t)
            u = q_t @ P
        for i in range(pairs):
            Fs[i] = per_head(g ** (2 * i + 2 + odd)) * Fs[i] + outer(kt_t, u)
            u = read(q_t, Fs[i])
        run.o[:, t] = u
    Fs, etas = zip(*(run.public(F) for F in Fs), strict=True)
    P, m = part(P, normalize) if odd else (None, None)
    return run.output(), HLAState(S, Fs, P, m, etas if normalize else None)


class Run:
    """The shapes, prepared inputs and output buffer that the loops above share."""

    def __init__(self, q, k, v, scale, decay, normalize, eps, mask, segment_ids, initial_state):
        self.inputs = prepare(
            q, k, v, scale=scale, decay=decay, mask=mask, segment_ids=segment_ids, normalize=normalize
        )
        self.normalize, self.eps, self.initial = normalize, eps, initial_state
        self.B, self.T, self.Hq, self.D = self.inputs.q.shape
        self.Hkv, self.V = self.inputs.v.shape[2:]
        self.G = self.Hq // self.Hkv
        self.o = np.zeros((self.B, self.T, self.Hkv, self.G, self.V))

    def tokens(self):
        """Yield t, q_t [B, Hkv, G, D], k_t [B, Hkv, D], v_t [B, Hkv, V], g_t [B, Hkv, 1, 1]."""
        q = self.inputs.q.reshape(self.B, self.T, self.Hkv, self.G, self.D)
        for t in range(self.T):
            yield t, q[:, t], self.inputs.k[:, t], self.inputs.v[:, t], self.inputs.g[:, t, :, None, None]

    def state(self, matrix, vector, per_query=True, index=None):
        """A state to start from.  `vector` None says that the matrix is D x D and has no column of ones."""
        H = self.Hq if per_query else self.Hkv
        shape = (self.B, H, self.D, self.V if vector else self.D)
        initial = self.initial
        if index is not None and initial is not None:
            initial = HLA2State(None, initial.F[index], initial.eta[index] if initial.eta else None)
        x = carried(initial, matrix, vector, shape, self.normalize)
        return x.reshape(self.B, self.Hkv, self.G, *shape[2:]) if per_query else x

    def public_matrix(self, x):
        """[B, Hkv, G, ..] -> [B, Hq, ..]."""
        return x.reshape(self.B, self.Hq, *x.shape[3:])

    def public(self, x):
        """A per-query-head state as its public fields (matrix, vector | None)."""
        return part(self.public_matrix(x), self.normalize)

    def output(self):
        o = self.o.reshape(self.B, self.T, self.Hq, self.V)
        return finish(o, self.inputs.real, self.normalize, self.eps)


def outer(a, b):
    return a[..., :, None] * b[..., None, :]


def per_head(g):
    """[B, Hkv, 1, 1] -> [B, Hkv, 1, 1, 1], to decay a per-query-head state."""
    return g[..., None]


def read(a, F):
    """F^T a for each query head: a [.., D], F [.., D, V] -> [.., V]."""
    return (a[..., None, :] @ F)[..., 0, :]
