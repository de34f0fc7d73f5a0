"""Dense T x T definitions of every operator: no state, no recurrence over tokens, no chunk.

With A₀ = scale · Q K^T, L the causal mask and D_ts = L_ts Π_{s<r≤t} g_r (direct products, so that exact zeros
cut exactly), each operator is a T x T matrix M per head and o = M V; normalised, o = (M V) / (M 1 + ε).
In the second and third order every summed-over token s has the weight D_ts of its attenuation up to t: the
product of the decayed prefix moments, restricted to the causal set.  AHLA differs: its weights are D_ti D_ij.

# B batch, T time, H heads, D key dim, V value dim.   Arguments and layouts as in `serial`.
"""

import numpy as np

from .prepare import expand_heads, finish, prepare


def dense_linear_attention(
    q, k, v, *, scale=1.0, decay=None, normalize=False, eps=1e-6, mask=None, segment_ids=None
):
    """(D ⊙ A₀) V   (§2.2)."""
    d = Dense(q, k, v, scale, decay, normalize, eps, mask, segment_ids)
    return d.apply(d.D * d.A0)


def dense_hla2(
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
    masked=True,
    ridge=0.0,
):
    """Second order: M_tj = D_tj Σ_i D_ti A₀_ti A₀_ji over i, j ≤ t; masked: also i ≤ j.   (Eq. 3.1, Thm 3.1.)

    At g = 1 the masked M is (A A^T) ⊙ L with A = L ⊙ A₀.  The ridge λ adds λ q_j to k̃_j = S_j q_j, so
    λ q_t·q_j with the weight of the pass that k̃ goes through: D² masked; unmasked, where k̃ is the query, D.
    """
    d = Dense(q, k, v, scale, decay, normalize, eps, mask, segment_ids)
    QQ = ridge * d.q @ _t(d.q)
    if masked:
        return d.apply(d.D * ((d.D * d.A0) @ _t(d.L * d.A0)) + d.D**2 * QQ)
    return d.apply(d.D * ((d.D * d.A0) @ _t(d.A0) + QQ))


def dense_ahla(q, k, v, *, scale=1.0, decay=None, normalize=False, eps=1e-6, mask=None, segment_ids=None):
    """M = A A with A = D ⊙ A₀: weights D_ti D_ij on j ≤ i ≤ t.   (Thm 6.1, Eq. 6.1.)"""
    d = Dense(q, k, v, scale, decay, normalize, eps, mask, segment_ids)
    A = d.D * d.A0
    return d.apply(A @ A)


def dense_hla3(
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
    masked=True,
    convention="exact",
):
    """Third order (§7.1).

    masked, exact:  M_tj = Σ_u D_tu D_tj (Σ_i D_ti A₀_ti A₀_ui) A₀_uj over i ≤ u ≤ t, j ≤ u;
                    tril(A A^T) A at g = 1.
    unmasked:       the same sum over i, u, j ≤ t: q_t^T S_t S^Q_t P_t.
    masked, paper:  S S^Q P − G⁽¹⁾ − G⁽²⁾ − G⁽³⁾ as Algorithm 3 updates them: the cross-summaries decay by g
                    once a step, and their increments read the undecayed moments of t − 1.
    """
    d = Dense(q, k, v, scale, decay, normalize, eps, mask, segment_ids)
    if not masked:
        return d.apply(d.D * ((d.D * ((d.D * d.A0) @ _t(d.A0))) @ d.A0))
    if convention == "exact":
        A = d.L * d.A0
        return d.apply(d.D * ((d.D * ((d.D * d.A0) @ _t(A))) @ A))
    if convention != "paper":
        raise ValueError(f"[reference] convention must be 'exact' or 'paper', got {convention!r}")
    full = d.D * ((d.D * ((d.D * d.A0) @ _t(d.A0))) @ d.A0)
    # Rows of an exclusive read: Dx_ij weights what S_{i-1} holds of token j < i.
    Dx = d.exclusive_decay()
    A, Ax = d.D * d.A0, Dx * d.A0
    u1 = (Dx * _t(d.A0)) @ d.q  # S^Q_{i-1} k_i
    a2 = Ax @ d.k  # S_{i-1} q_i
    uk = Dx * (u1 @ _t(d.k))  # weights of u1_i^T P_{i-1} and of u1_i^T S_{i-1}
    g1 = A @ uk
    g2 = (d.D * (d.q @ _t(a2))) @ Ax
    g3 = d.D * (d.q @ _t(uk @ d.k))
    return d.apply(full - g1 - g2 - g3)


def dense_hla(
    q, k, v, *, order, scale=1.0, decay=None, normalize=False, eps=1e-6, mask=None, segment_ids=None
):
    """Order n = 2p + r: M = B_n B_{n-2} .. B_{2+r} A^r with B_i = D^i ⊙ (A₀ (D ⊙ A₀)^T) and A = D ⊙ A₀.

    D^i is the element-wise power.  At g = 1 this is tril(A A^T)^p A^r.  In general, every token s that the
    product sums over is attenuated up to t: the powers multiply out to one factor D_ts per summed index s.
    """
    if not isinstance(order, int) or order < 1:
        raise ValueError(f"[reference] order must be an integer of at least 1, got {order!r}")
    d = Dense(q, k, v, scale, decay, normalize, eps, mask, segment_ids)
    A = d.D * d.A0
    pair = d.A0 @ _t(A)
    M = A if order % 2 else np.broadcast_to(np.eye(A.shape[-1]), A.shape)
    for i in range(2 + order % 2, order + 1, 2):
        M = (d.D**i * pair) @ M
    return d.apply(M)


def decay_matrix(g):
    """g [.., T] -> D [.., T, T], D_ts = Π_{s<r≤t} g_r on s ≤ t, else 0: products only, no ratio, no log."""
    T = g.shape[-1]
    D = np.zeros((*g.shape, T))
    for t in range(T):
        D[..., t, :t] = D[..., t - 1, :t] * g[..., t, None]
        D[..., t, t] = 1.0
    return D


class Dense:
    """q, k, v [B, Hq, T, ..], D and A₀ [B, Hq, T, T]: prepared inputs, heads expanded and moved first."""

    def __init__(self, q, k, v, scale, decay, normalize, eps, mask, segment_ids):
        self.inputs = prepare(
            q, k, v, scale=scale, decay=decay, mask=mask, segment_ids=segment_ids, normalize=normalize
        )
        self.normalize, self.eps = normalize, eps
        q, k, v, g, _, self.reset = self.inputs
        Hq, T = q.shape[2], q.shape[1]
        self.q = q.swapaxes(1, 2)
        self.k, self.v = (expand_heads(x, Hq).swapaxes(1, 2) for x in (k, v))
        self.D = decay_matrix(expand_heads(g, Hq).swapaxes(1, 2))
        self.L = np.tril(np.ones((T, T)))
        self.A0 = self.q @ _t(self.k)

    def exclusive_decay(self):
        """Dx_ij = Π_{j<r<i} g_r on j < i: D one row later.  A reset at i clears what S_{i-1} held, too."""
        Dx = np.zeros_like(self.D)
        Dx[..., 1:, :] = self.D[..., :-1, :]
        return Dx * ~self.reset[:, None, :, None]

    def apply(self, M):
        return finish((M @ self.v).swapaxes(1, 2), self.inputs.real, self.normalize, self.eps)


def _t(x):
    return x.swapaxes(-1, -2)
