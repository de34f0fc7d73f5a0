"""Masked second order in one piece: launches of metal/hla2.metal, their schedules, their gradients."""

# B batch, T time, Hq query heads, Hkv key-value heads, D key dim, DV value dim, N blocks

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx

from ..transforms import differentiable
from . import passes
from .one_pass import between, whole_decay
from .passes import floats, ints, stripes
from .plan import Blocks, back_shape, blocks, fused, segments, wide_chunk
from .source import launch


class Operands(NamedTuple):
    """q, k, v, the decay g and the states before the first token."""

    q: mx.array
    k: mx.array
    v: mx.array
    g: mx.array
    S: mx.array
    F: mx.array

    def between(self, cut: slice, S: mx.array, F: mx.array) -> Operands:
        """The tokens of `cut`, from the states before them."""
        q, k, v, g, *_ = self
        return Operands(q[:, cut], k[:, cut], v[:, cut], g[:, cut], S, F)


class Gradients(NamedTuple):
    """Of the operands; None where g is a constant."""

    q: mx.array
    k: mx.array
    v: mx.array | None
    g: mx.array | None
    S: mx.array
    F: mx.array


class Kept(NamedTuple):
    """What blocks leave to the backward: K̃ and the states that enter the blocks."""

    kt: mx.array
    S_entry: mx.array
    F_entry: mx.array


class Walked(NamedTuple):
    """o, the states after the last token, and what the backward takes if there is any."""

    o: mx.array
    S: mx.array
    F: mx.array
    kept: Kept | None = None


class Backward(NamedTuple):
    """What the reverse mode reads."""

    operands: Operands
    kept: Kept | None
    do: mx.array
    dS: mx.array
    dF: mx.array


def _template(q, v):
    D, DV = q.shape[3], v.shape[3]
    shape = fused("hla2", max(D, DV))
    return [
        ("T", q.dtype),
        ("D", D),
        ("DV", DV),
        ("W", wide_chunk(D, q.dtype)),
        ("NC", shape),
    ], 32 * stripes(max(D, DV), shape)


def walk(q, k, v, g, S, F, scale: float, ridge: float) -> Walked:
    """One threadgroup per head."""
    (B, T, Hq, _), DV = q.shape, v.shape[3]
    template, threads = _template(q, v)
    o, S, F = launch(
        "hla2",
        "hla2_walk",
        inputs=[q, k, v, g, S, F, floats(scale, ridge)],
        template=template,
        output_shapes=[(B, T, Hq, DV), S.shape, F.shape],
        output_dtypes=[q.dtype, mx.float32, mx.float32],
        grid=(threads, 1, B * Hq),
        threadgroup=(threads, 1, 1),
    )
    return Walked(o, S, F)


def middle(q, k, v, g, entry, cut: Blocks, scale: float, ridge: float):
    """(K̃, what each block but the last adds to F, its log decay, S after the last token)."""
    (B, T, Hq, D), DV, Hkv, N = q.shape, v.shape[3], k.shape[2], cut.count
    template, threads = _template(q, v)
    return launch(
        "hla2",
        "hla2_middle",
        inputs=[q, k, v, g, entry, ints(cut.length), floats(scale, ridge)],
        template=[*template, ("TK", between(q.dtype))],
        output_shapes=[(B, T, Hq, D), (B, Hq, N - 1, D, DV), (B, Hq, N - 1, 2), (B, Hkv, D, D)],
        output_dtypes=[between(q.dtype), mx.float32, mx.float32, mx.float32],
        grid=(threads, N, B * Hq),
        threadgroup=(threads, 1, 1),
    )


def forward(a: Operands, scale: float, ridge: float) -> Walked:
    """By the schedule that fits: one walk where the heads fill the GPU, else blocks."""
    q, k, v, g, S, F = a
    B, T, Hq, _ = q.shape
    cut = blocks(T, B * Hq)
    if cut.count == 1:
        return walk(q, k, v, g, S, F, scale, ridge)
    one, two = floats(1, scale), floats(2, scale)
    S_entry = passes.entries(k, None, g, S, cut, one)
    kt, sums, logs, S = middle(q, k, v, g, S_entry, cut, scale, ridge)
    F_entry = passes.border_states(sums, logs, F, two)
    o, F = passes.outputs(q, kt, v, g, F_entry, cut, two, q.dtype)
    return Walked(o, S, F, Kept(kt, S_entry, F_entry))


def add_ridge(kt, q, factor: float):
    """K̃ + scale · ridge · Q; the product in K̃'s dtype."""
    return kt + factor * q.astype(kt.dtype) if factor else kt


def gradients(b: Backward, scale: float, ridge: float, decay: bool) -> Gradients:
    """Gradients of the operands (None for g unless `decay`): the second pass backward, then the first."""
    q, k, v, g, S, F = b.operands
    if b.kept is not None:
        kt, S_entry, F_entry = b.kept
    else:
        kt, _, S_entry = passes.walk(q, k, None, g, S, scale=scale, dtype=between(q.dtype))
        kt, F_entry = add_ridge(kt, q, scale * ridge), F[:, :, None]
    options = {"scale": scale, "decay": decay}
    second = passes.gradients(q, kt, v, g, F_entry, b.do, b.dF, power=2, **options)
    dq = add_ridge(second.x, second.y, scale * ridge)
    first = passes.gradients(q, k, None, g, S_entry, second.y, b.dS, plus=dq, **options)
    dg = None if first.g is None or second.g is None else first.g + second.g
    return Gradients(first.x, first.y, second.z, dg, first.first, second.first)


@lru_cache(maxsize=256)
def _hla2(scale: float, ridge: float, decay: bool) -> Callable[[Operands], Walked]:
    back = differentiable(lambda b: gradients(b, scale, ridge, decay))

    def run_vjp(a: Operands, out: Walked, d: Walked) -> Gradients:
        return back(Backward(a, out.kept, d.o, d.S, d.F))

    return differentiable(lambda a: forward(a, scale, ridge), run_vjp)


def hla2(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array | None,
    S: mx.array,
    F: mx.array,
    *,
    scale: float = 1.0,
    ridge: float = 0.0,
    decay_gradient: bool = True,
) -> tuple[mx.array, mx.array, mx.array]:
    """`K̃ = LA_g(Q, K, K) + scale · ridge · Q`, `O = LA_{g²}(Q, K̃, V)`: (o, S, F)."""
    (B, T, Hq, D), DV = q.shape, v.shape[3]
    decay, middle, parts = decay_gradient and g is not None, (D, between(q.dtype)), []
    passes_staged = [(D, q.dtype), middle, (DV, q.dtype), (DV, q.dtype)], [(D, q.dtype), (D, q.dtype), middle]
    kept = min(back_shape(*staged).keep for staged in passes_staged) if decay else None
    run, a = _hla2(float(scale), float(ridge), decay), Operands(q, k, v, whole_decay(g, k.shape[:2]), S, F)
    for cut in segments(B * Hq, T, D, DV, kept):
        o, S, F, _ = run(a.between(cut, S, F))
        parts.append(o)
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1), S, F
