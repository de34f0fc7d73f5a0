"""Launches of metal/step.metal: one token of an operator, one launch for a layer."""

# B batch, Hq query heads, Hkv key-value heads, D key dim, DV value dim

from __future__ import annotations

from functools import cache

import mlx.core as mx
import numpy as np

from .passes import floats
from .plan import step_simdgroups
from .source import launch


def step(
    family: str,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    matrices: list[mx.array],
    vectors: list[mx.array],
    *,
    scale: float,
    ridge: float = 0.0,
    eps: float = 0.0,
    packed: bool | None = None,
) -> tuple[mx.array, list[mx.array], list[mx.array]]:
    """(o `[B, Hq, DV]`, matrices, vectors) of the kernel `<family>_step`.

    q `[B, Hq, D]`, k and v `[B, Hkv, ..]`, g `[B, Hkv]`.
    matrices: the state's, in its order. vectors: their normalisers, none unless normalising; then
    o = num / (den + eps). packed: whether S comes and goes as `pack(S)`; None for a family without an S.
    """
    (B, Hq, D), Hkv, DV = q.shape, k.shape[1], v.shape[2]
    groups = Hq // Hkv
    simdgroups = step_simdgroups(D, DV, groups)
    template = [("T", q.dtype), ("D", D), ("DV", DV), ("G", groups), ("NS", simdgroups)]
    if packed is not None:
        template.append(("PACKED", packed))
    if packed:
        matrices = [matrices[0][:, :, None], *matrices[1:]]  # the kernel takes four axes of every state
    o, *new = launch(
        "step",
        f"{family}_step",
        normalising=bool(vectors),
        inputs=[q, k, v, g, *matrices, floats(scale, ridge, eps), *vectors],
        template=template,
        output_shapes=[(B, Hq, DV), *(x.shape for x in (*matrices, *vectors))],
        output_dtypes=[q.dtype, *(mx.float32 for _ in (*matrices, *vectors))],
        grid=(32 * simdgroups, 1, B * Hkv),
        threadgroup=(32 * simdgroups, 1, 1),
    )
    if packed:
        new[0] = new[0].squeeze(2)
    return o, new[: len(matrices)], new[len(matrices) :]


# ---- the upper triangle of a symmetric S, row by row


@cache
def _places(D: int) -> tuple[np.ndarray, np.ndarray]:
    """(places of the upper triangle in the D·D matrix, place in the triangle of every element)."""
    row, col = np.triu_indices(D)
    back = np.zeros((D, D), np.int32)
    back[row, col] = back[col, row] = np.arange(len(row))
    return (row * D + col).astype(np.int32), back.reshape(-1)


def pack(S: mx.array) -> mx.array:
    """The upper triangle of symmetric matrices: `[.., D, D]` -> `[.., D (D + 1) / 2]`."""
    D = S.shape[-1]
    return mx.take(S.reshape(*S.shape[:-2], D * D), mx.array(_places(D)[0]), axis=-1)


def unpack(packed: mx.array) -> mx.array:
    """The inverse of `pack`."""
    D = int((2 * packed.shape[-1]) ** 0.5)
    return mx.take(packed, mx.array(_places(D)[1]), axis=-1).reshape(*packed.shape[:-1], D, D)
