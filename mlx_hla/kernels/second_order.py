"""Launches of metal/hla2.metal and its schedules."""

from __future__ import annotations

import mlx.core as mx

from . import passes
from .passes import floats, ints, stripes
from .plan import Blocks, blocks, fused, wide_chunk
from .source import kernel


def between(dtype: mx.Dtype) -> mx.Dtype:
    """dtype of K̃ between two launches: float16 has too little range for a sum of products."""
    return mx.bfloat16 if dtype == mx.bfloat16 else mx.float32


def _template(q, v):
    D, DV = q.shape[3], v.shape[3]
    shape = fused(max(D, DV))
    return [
        ("T", q.dtype),
        ("D", D),
        ("DV", DV),
        ("W", wide_chunk(D, q.dtype)),
        ("NC", shape),
    ], 32 * stripes(max(D, DV), shape)


def walk(q, k, v, g, S, F, scale: float, ridge: float):
    """One threadgroup per head: (o, S, F)."""
    (B, T, Hq, _), DV = q.shape, v.shape[3]
    template, threads = _template(q, v)
    return kernel("hla2", "hla2_walk")(
        inputs=[q, k, v, g, S, F, floats(scale, ridge)],
        template=template,
        output_shapes=[(B, T, Hq, DV), S.shape, F.shape],
        output_dtypes=[q.dtype, mx.float32, mx.float32],
        grid=(threads, 1, B * Hq),
        threadgroup=(threads, 1, 1),
    )


def middle(q, k, v, g, entry, cut: Blocks, scale: float, ridge: float):
    """(K̃, what each block but the last adds to F, its log decay, S after the last token)."""
    (B, T, Hq, D), DV, Hkv, N = q.shape, v.shape[3], k.shape[2], cut.count
    template, threads = _template(q, v)
    return kernel("hla2", "hla2_middle")(
        inputs=[q, k, v, g, entry, ints(cut.length), floats(scale, ridge)],
        template=[*template, ("TK", between(q.dtype))],
        output_shapes=[(B, T, Hq, D), (B, Hq, N - 1, D, DV), (B, Hq, N - 1, 2), (B, Hkv, D, D)],
        output_dtypes=[between(q.dtype), mx.float32, mx.float32, mx.float32],
        grid=(threads, N, B * Hq),
        threadgroup=(threads, 1, 1),
    )


def forward(q, k, v, g, S, F, scale: float, ridge: float, cut: Blocks | None = None):
    """(o, S, F) by the schedule that fits: one walk where the heads fill the GPU, else blocks.

    Blocks also give what the backward takes: K̃ and the states S and F that enter the blocks.
    """
    B, T, Hq, _ = q.shape
    cut = cut or blocks(T, B * Hq)
    if cut.count == 1:
        return walk(q, k, v, g, S, F, scale, ridge)
    one, two = floats(1, scale), floats(2, scale)
    S_entry = passes.entries(k, k, g, S, cut, one)
    kt, sums, logs, S = middle(q, k, v, g, S_entry, cut, scale, ridge)
    F_entry = passes.border_states(sums, logs, F, two, False)
    o, F = passes.outputs(q, kt, v, g, F_entry, cut, two, q.dtype)
    return o, S, F, kt, S_entry, F_entry


def add_ridge(kt, q, factor: float):
    """K̃ + scale · ridge · Q; the product in K̃'s dtype."""
    return kt + factor * q.astype(kt.dtype) if factor else kt


def gradients(q, k, v, g, S, F, do, dS, dF, kept, scale: float, ridge: float, decay: bool):
    """Gradients of q, k, v, g, S and F: the second pass backward, then the first."""
    if kept:
        kt, S_entry, F_entry = kept
    else:
        kt, _, S_entry = passes.walk(q, k, k, g, S, scale=scale, dtype=between(q.dtype))
        kt, F_entry = add_ridge(kt, q, scale * ridge), F[:, :, None]
    options = {"scale": scale, "decay": decay}
    dq, dkt, dv, dg2, dF = passes.gradients(q, kt, v, g, F_entry, do, dF, power=2, **options)
    dq = add_ridge(dq, dkt, scale * ridge)
    dq, dk, _, dg, dS = passes.gradients(q, k, k, g, S_entry, dkt, dS, plus=dq, **options)
    return dq, dk, dv, dg + dg2 if decay else None, dS, dF
