"""Asymmetric second order and third order in one piece: launches of metal/routed.metal, their gradients."""

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
from .plan import Blocks, back_shape, blocks, fused, segments, staged_width, wide_chunk
from .source import launch


class Operands(NamedTuple):
    """q, k, v, the decay g and the states before the first token; S is None for asymmetric second order."""

    q: mx.array
    k: mx.array
    v: mx.array
    g: mx.array
    S: mx.array | None
    P: mx.array
    F: mx.array

    @property
    def third(self) -> bool:
        return self.S is not None

    @property
    def power(self) -> int:
        """Of the decay in the last pass."""
        return 3 if self.third else 1

    def between(self, cut: slice, S: mx.array | None, P: mx.array, F: mx.array) -> Operands:
        """The tokens of `cut`, from the states before them."""
        q, k, v, g, *_ = self
        return Operands(q[:, cut], k[:, cut], v[:, cut], g[:, cut], S, P, F)


class Gradients(NamedTuple):
    """Of the operands; None where g is a constant."""

    q: mx.array
    k: mx.array
    v: mx.array | None
    g: mx.array | None
    S: mx.array | None
    P: mx.array
    F: mx.array


class Kept(NamedTuple):
    """What blocks leave to the backward: K̃, r and the states that enter the blocks."""

    kt: mx.array | None
    r: mx.array
    S_entry: mx.array | None
    P_entry: mx.array
    F_entry: mx.array


class Walked(NamedTuple):
    """o, the states after the last token, and what the backward takes if there is any."""

    o: mx.array
    S: mx.array | None
    P: mx.array
    F: mx.array
    kept: Kept | None = None


class Backward(NamedTuple):
    """What the reverse mode reads."""

    operands: Operands
    kept: Kept | None
    do: mx.array
    dS: mx.array | None
    dP: mx.array
    dF: mx.array


def _template(a: Operands):
    D, DV, dtype = a.q.shape[3], a.v.shape[3], a.q.dtype
    stripe = fused("hla3" if a.third else "ahla", max(D, DV))
    assert stripe is not None
    return [
        ("T", dtype),
        ("D", D),
        ("DV", DV),
        ("W", wide_chunk(D, dtype) if a.third else staged_width([(D, dtype), (D, dtype)])),
        ("NC", stripe),
        ("THIRD", a.third),
    ], 32 * stripes(max(D, DV) if a.third else DV, stripe)


def walk(a: Operands, scale: float) -> Walked:
    """One threadgroup per head."""
    (B, T, Hq, _), DV = a.q.shape, a.v.shape[3]
    template, threads = _template(a)
    o, S, P, F = launch(
        "routed",
        "routed_walk",
        inputs=[a.q, a.k, a.v, a.g, a.P if a.S is None else a.S, a.P, a.F, floats(scale)],
        template=template,
        output_shapes=[(B, T, Hq, DV), (1,) if a.S is None else a.S.shape, a.P.shape, a.F.shape],
        output_dtypes=[a.q.dtype, mx.float32, mx.float32, mx.float32],
        grid=(threads, 1, B * Hq),
        threadgroup=(threads, 1, 1),
    )
    return Walked(o, S if a.third else None, P, F)


def middle(a: Operands, S_entry, P_entry, cut: Blocks, scale: float):
    """(K̃, r, what each block but the last adds to F, its log decay, S and P after the last token)."""
    (B, T, Hq, D), DV, N = a.q.shape, a.v.shape[3], cut.count
    template, threads = _template(a)
    kind = between(a.q.dtype)
    kt, r, sums, logs, S, P = launch(
        "routed",
        "routed_middle",
        inputs=[
            a.q,
            a.k,
            a.v,
            a.g,
            S_entry if a.third else P_entry,
            P_entry,
            ints(cut.length),
            floats(scale),
        ],
        template=[*template, ("TK", kind)],
        output_shapes=[
            (B, T, Hq, D) if a.third else (1,),
            (B, T, Hq, DV),
            (B, Hq, N - 1, D, DV),
            (B, Hq, N - 1, 2),
            (1,) if a.S is None else a.S.shape,
            a.P.shape,
        ],
        output_dtypes=[kind, kind, *(mx.float32,) * 4],
        grid=(threads, N, B * Hq),
        threadgroup=(threads, 1, 1),
    )
    return kt if a.third else None, r, sums, logs, S if a.third else None, P


def forward(a: Operands, scale: float) -> Walked:
    """By the schedule that fits: one walk where the heads fill the GPU, else blocks."""
    B, T, Hq, _ = a.q.shape
    cut = blocks(T, B * Hq)
    if cut.count == 1:
        return walk(a, scale)
    one, last = floats(1, scale), floats(a.power, scale)
    sums, squares, logs = passes.block_sums(a.k, a.v, a.g, cut, one, squares=a.third)
    P_entry = passes.border_states(sums, logs, a.P, one)
    S_entry = passes.border_states(squares, logs, a.S, one) if a.third else None
    kt, r, sums, logs, S, P = middle(a, S_entry, P_entry, cut, scale)
    F_entry = passes.border_states(sums, logs, a.F, last)
    o, F = passes.outputs(a.q, a.k if kt is None else kt, r, a.g, F_entry, cut, last, a.q.dtype)
    return Walked(o, S, P, F, Kept(kt, r, S_entry, P_entry, F_entry))


def recomputed(a: Operands, scale: float) -> Kept:
    """What a walk did not keep, pass by pass."""
    options = {"scale": scale, "dtype": between(a.q.dtype)}
    r, _, P_entry = passes.walk(a.q, a.k, a.v, a.g, a.P, **options)
    kt, _, S_entry = passes.walk(a.q, a.k, None, a.g, a.S, **options) if a.third else (None, None, None)
    return Kept(kt, r, S_entry, P_entry, a.F[:, :, None])


def gradients(b: Backward, scale: float, decay: bool) -> Gradients:
    """Gradients of the operands (None for g unless `decay`): the passes from the last to the first."""
    q, k, v, g, *_ = a = b.operands
    kt, r, S_entry, P_entry, F_entry = b.kept or recomputed(a, scale)
    options = {"scale": scale, "decay": decay}
    last = passes.gradients(q, k if kt is None else kt, r, g, F_entry, b.do, b.dF, power=a.power, **options)
    values = passes.gradients(q, k, v, g, P_entry, last.z, b.dP, plus=last.x, **options)
    every = [last, values]
    if a.third:
        every.append(passes.gradients(q, k, None, g, S_entry, last.y, b.dS, plus=values.x, **options))
    dk = values.y + (every[-1].y if a.third else last.y)
    dgs = [x.g for x in every if x.g is not None]
    dg = sum(dgs[1:], dgs[0]) if dgs else None
    dS = every[-1].first if a.third else None
    return Gradients(every[-1].x, dk, values.z, dg, dS, values.first, last.first)


@lru_cache(maxsize=256)
def _routed(scale: float, decay: bool) -> Callable[[Operands], Walked]:
    back = differentiable(lambda b: gradients(b, scale, decay))

    def run_vjp(a: Operands, out: Walked, d: Walked) -> Gradients:
        return back(Backward(a, out.kept, d.o, d.S, d.P, d.F))

    return differentiable(lambda a: forward(a, scale), run_vjp)


def _run(q, k, v, g, S, P, F, scale: float, decay_gradient: bool) -> Walked:
    (B, T, Hq, D), DV = q.shape, v.shape[3]
    decay, wide, parts = decay_gradient and g is not None, between(q.dtype), []
    x, k_, v_, kt, r = (D, q.dtype), (D, q.dtype), (DV, q.dtype), (D, wide), (DV, wide)
    staged = [
        (x, k_, r, v_),
        (x, k_, v_, r) if S is None else (x, kt, v_, r),
        *([] if S is None else [(x, k_, kt)]),
    ]
    kept = min(back_shape(*each).keep for each in staged) if decay else None
    run, a = _routed(float(scale), decay), Operands(q, k, v, whole_decay(g, k.shape[:2]), S, P, F)
    for cut in segments(B * Hq, T, D, DV, kept):
        o, S, P, F, _ = run(a.between(cut, S, P, F))
        parts.append(o)
    return Walked(parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1), S, P, F)


def ahla(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array | None,
    P: mx.array,
    E: mx.array,
    *,
    scale: float = 1.0,
    decay_gradient: bool = True,
) -> tuple[mx.array, mx.array, mx.array]:
    """`R = LA_g(Q, K, V)`, `O = LA_g(Q, K, R)`: (o, P, E)."""
    done = _run(q, k, v, g, None, P, E, scale, decay_gradient)
    return done.o, done.P, done.F


def hla3(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array | None,
    S: mx.array,
    P: mx.array,
    F: mx.array,
    *,
    scale: float = 1.0,
    decay_gradient: bool = True,
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """`K̃ = LA_g(Q, K, K)`, `R = LA_g(Q, K, V)`, `O = LA_{g³}(Q, K̃, R)`: (o, S, P, F)."""
    done = _run(q, k, v, g, S, P, F, scale, decay_gradient)
    assert done.S is not None
    return done.o, done.S, done.P, done.F
