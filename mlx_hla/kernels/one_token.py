"""Launches of metal/step.metal: one token of every operator, one launch for a layer."""

from __future__ import annotations

from functools import cache

import mlx.core as mx
import numpy as np

from .plan import step_simdgroups
from .source import kernel

SYMMETRIC = ("hla2", "hla3")  # families whose state begins with the symmetric S


def step(
    family: str,
    q,
    k,
    v,
    g,
    state: tuple[mx.array, ...],
    factors: mx.array,
    packed: bool = False,
    normalising: bool = False,
) -> tuple[mx.array, tuple[mx.array, ...]]:
    """(o `[B, Hq, DV]`, new state) of `family` from q `[B, Hq, D]`, k and v `[B, Hkv, ..]`, g `[B, Hkv]`.

    packed: S comes and goes as `pack(S)`. normalising: the state goes on with its normalisers.
    factors: scale, ridge, eps.
    """
    (B, Hq, D), Hkv, DV = q.shape, k.shape[1], v.shape[2]
    groups = Hq // Hkv
    simdgroups = step_simdgroups(D, DV, groups)
    template = [("T", q.dtype), ("D", D), ("DV", DV), ("G", groups), ("NS", simdgroups)]
    if family in SYMMETRIC:
        template.append(("PACKED", packed))
    if packed:
        state = (state[0][:, :, None], *state[1:])  # the kernel takes four axes of every state
    matrices = {"linear": 1, "hla2": 2, "ahla": 2, "hla3": 3}[family]
    o, *new = kernel("step", f"{family}_step", normalising)(
        inputs=[q, k, v, g, *state[:matrices], factors, *state[matrices:]],
        template=template,
        output_shapes=[(B, Hq, DV), *(x.shape for x in state)],
        output_dtypes=[q.dtype, *(mx.float32 for _ in state)],
        grid=(32 * simdgroups * B * Hkv, 1, 1),
        threadgroup=(32 * simdgroups, 1, 1),
    )
    if packed:
        new[0] = new[0].squeeze(2)
    return o, tuple(new)


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
