"""Launches of metal/step.metal: one token of every operator, one launch for a layer."""

from __future__ import annotations

import mlx.core as mx

from .plan import step_simdgroups
from .source import kernel


def step(family: str, q, k, v, g, state: tuple[mx.array, ...], factors: mx.array):
    """(o `[B, Hq, DV]`, new state) of `family` from q `[B, Hq, D]`, k and v `[B, Hkv, ..]`, g `[B, Hkv]`."""
    (B, Hq, D), Hkv, DV = q.shape, k.shape[1], v.shape[2]
    groups = Hq // Hkv
    simdgroups = step_simdgroups(D, DV, groups)
    o, *state = kernel("step", f"{family}_step")(
        inputs=[q, k, v, g, *state, factors],
        template=[("T", q.dtype), ("D", D), ("DV", DV), ("G", groups), ("NS", simdgroups)],
        output_shapes=[(B, Hq, DV), *(x.shape for x in state)],
        output_dtypes=[q.dtype, *(mx.float32 for _ in state)],
        grid=(32 * simdgroups * B * Hkv, 1, 1),
        threadgroup=(32 * simdgroups, 1, 1),
    )
    return o, tuple(state)
