"""The gated delta rule (Gated DeltaNet, arXiv 2412.06464) in MLX ops: the baseline with one state matrix.

    S_t = g_t (I − β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ ,   o_t = S_tᵀ q_t

In a chunk of W tokens with carry-in S (b_t = Π_{s≤t} g_s, D_ij = b_i / b_j for j ≤ i) it is first order with
corrected values u, which solve a triangular system (the WY or UT form):

    (I + diag(β) tril(D ⊙ K Kᵀ, −1)) U = diag(β) (V − diag(b) K S)
    O = (D ⊙ Q Kᵀ) U + diag(b) Q S           S' = b_W S + Σ_j (b_W / b_j) k_j u_jᵀ

Keys should be unit vectors and β in [0, 1], so that I − β k kᵀ does not expand.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_hla.nn import HLAttention

# B batch, T time, H heads, D key dim, V value dim, W chunk width

WIDTH = 64
_FAR = -1e9  # its exponential is 0


class GDNState(NamedTuple):
    """S `[B, H, D, V]`, float32."""

    S: mx.array


def unit_lower_inverse(n: mx.array) -> mx.array:
    """(I + N)⁻¹ for strictly lower triangular N `[.., W, W]`, W a power of two.

    Blocks of twice the size at each level: [[A, 0], [C, B]]⁻¹ = [[A⁻¹, 0], [−B⁻¹ C A⁻¹, B⁻¹]], for all the
    blocks on the diagonal at once. The levels are numbers to the gradient, which comes from one Newton step
    X (2I − (I + N) X) at the solution: dX = −X dN X.
    """
    W = n.shape[-1]
    fixed, row = mx.stop_gradient(n), np.arange(W)
    x, size = mx.eye(W), 1
    while size < W:
        blocks, odd = row // (2 * size), row // size % 2
        corner = (blocks[:, None] == blocks) & (odd[:, None] > odd)
        x = x - x @ (mx.array(corner.astype(np.float32)) * fixed) @ x
        size *= 2
    x = mx.broadcast_to(x, n.shape)
    return 2 * x - x @ (x + n @ x)


def gated_delta(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    beta: mx.array,
    decay: mx.array | None = None,
    state: GDNState | None = None,
    width: int = WIDTH,
) -> tuple[mx.array, GDNState]:
    """(o `[B, T, H, V]`, state) of q, k `[B, T, H, D]`, v `[B, T, H, V]`, beta and decay `[B, T, H]`."""
    B, T, H, _ = q.shape
    W = 1 << (min(T, width) - 1).bit_length()
    padding = -T % W
    log_g = mx.zeros((B, T, H)) if decay is None else mx.log(mx.maximum(decay, 1e-37))

    def chunks(x: mx.array) -> mx.array:
        """[B, T, H, ..] -> [N, B, H, W, ..]; a token of padding has k = v = β = 0 and g = 1."""
        x = mx.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)) if padding else x
        x = x.reshape(B, -1, W, *x.shape[2:])
        return mx.moveaxis(mx.moveaxis(x, 1, 0), 3, 2)

    q, k, v, beta, c = (chunks(x) for x in (q, k, v, beta[..., None], log_g))
    c = mx.cumsum(c, axis=-1)[..., None]  # log b
    later = mx.array(np.tri(W, dtype=bool))
    pairs = mx.exp(mx.where(later, c - c.swapaxes(-1, -2), _FAR))  # D
    strict = mx.array(np.tri(W, k=-1, dtype=np.float32))
    kt = k.swapaxes(-1, -2)
    inverse = unit_lower_inverse(beta * pairs * (k @ kt) * strict)
    scores, b = pairs * (q @ kt), mx.exp(c)
    to_end = (k * mx.exp(c[..., -1:, :] - c)).swapaxes(-1, -2)
    through = mx.exp(c[..., -1:, :])

    S = None if state is None else state.S
    out = []
    for n in range(q.shape[0]):
        values = v[n] if S is None else v[n] - b[n] * (k[n] @ S)
        u = inverse[n] @ (beta[n] * values)
        o = scores[n] @ u
        out.append(o if S is None else o + b[n] * (q[n] @ S))
        added = to_end[n] @ u
        S = added if S is None else through[n] * S + added
    o = mx.concatenate(out, axis=2)[:, :, :T].transpose(0, 2, 1, 3)
    return o, GDNState(S)


class GDNAttention(HLAttention):
    """`HLAttention` with the gated delta rule for its operator: unit keys, β = sigmoid(x W_β + b_β)."""

    def __init__(self, dims: int, num_heads: int, **options: Any):
        super().__init__(dims, num_heads, operator="first", qk_norm="l2", **options)
        # β starts at 1/2 for every token.
        self.beta_weight, self.beta_bias = mx.zeros((num_heads, dims)), mx.zeros((num_heads,))

    @property
    def operator(self) -> str:
        return "gdn"

    def _attend(self, q, k, v, x, lengths, segment_ids, carried, split):
        if lengths is not None or segment_ids is not None or split is not None:
            raise ValueError("[GDNAttention] takes neither mask nor segment_ids nor group")
        beta = mx.sigmoid(x @ self.beta_weight.T + self.beta_bias)
        state = None if carried.memory is None else GDNState(*carried.memory)
        unit = self.head_dim**-0.5  # "l2" leaves the length √D
        width = WIDTH if q.shape[1] <= 4096 else 4 * WIDTH  # fewer chunks to walk over, and to compile
        decay = self._decay_of(x)
        o, carried.memory = gated_delta(q * self.scale, k * unit, v, beta, decay, state, width)
        return o
