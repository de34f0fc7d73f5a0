"""Launches of metal/linear.metal and metal/backward.metal: one pass LA_{g^p} and its gradients."""

# B batch, T time, S heads of the state, O heads of the output, DY key dim, DZ value dim, N blocks

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx

from .plan import STRIPE, TINY, Back, Blocks, back_shape, blocks, ceil_div, scanned, staged_width, sums_stripe
from .source import launch


# What the host writes into an array the GPU must fetch when it first reads it: on CUDA, where that is managed
# memory, longer than a short kernel runs. So equal numbers are one array, which is fetched once.
@lru_cache(maxsize=1024)
def floats(*values: float) -> mx.array:
    return mx.array(values, mx.float32)


@lru_cache(maxsize=1024)
def ints(*values: int) -> mx.array:
    return mx.array(values, mx.int32)


def stripes(dim: int, stripe: int = STRIPE) -> int:
    """Simdgroups of a threadgroup whose result has `dim` columns."""
    return ceil_div(dim, 8 * stripe)


def block_sums(
    y, z, g, cut: Blocks, factors, back: bool = False, squares: bool = False
) -> tuple[mx.array, mx.array, mx.array]:
    """What each block adds to the state, or to its adjoint, `[B, S, N - 1, DY, DZ]`, and its log decay.

    In between the same of y yᵀ, if `squares` or z is None; then there is nothing else. The block that the
    walk comes to last is left out: nobody enters a block after it.
    """
    values, squares = z is not None, squares or z is None
    z = y if z is None else z
    B, DY, DZ, S = y.shape[0], y.shape[3], z.shape[3], max(y.shape[2], z.shape[2])
    stripe = sums_stripe(values, squares)
    N, threads = cut.count - 1, 32 * stripes(max(DZ, DY if squares else 0), stripe)
    return launch(
        "linear",
        "linear_sums",
        inputs=[y, z, g, ints(cut.length, 1 if back else 0), factors],
        template=[
            ("TY", y.dtype),
            ("TZ", z.dtype),
            ("DY", DY),
            ("DZ", DZ),
            ("W", staged_width([(DY, y.dtype)])),
            ("NC", stripe),
            ("BACK", back),
            ("VALUES", values),
            ("SQUARES", squares),
        ],
        output_shapes=[
            (B, S, N, DY, DZ) if values else (1,),
            (B, S, N, DY, DY) if squares else (1,),
            (B, S, N, 2),
        ],
        output_dtypes=[mx.float32, mx.float32, mx.float32],
        grid=(threads, N, B * S),
        threadgroup=(threads, 1, 1),
    )


def border_states(sums, logs, first, factors, back: bool = False) -> mx.array:
    """The states at the borders of N blocks `[B, S, N + 1, DY, DZ]`, from what the blocks add."""
    B, S, N, DY, DZ = sums.shape
    size, each = DY * DZ, scanned()
    threads = min(256, 32 * ceil_div(size, 32 * each))
    return launch(
        "linear",
        "linear_scan",
        inputs=[sums, logs, first, factors],
        template=[("EACH", each), ("BACK", back)],
        output_shapes=[(B, S, N + 1, DY, DZ)],
        output_dtypes=[mx.float32],
        grid=(threads * ceil_div(size, each * threads), 1, B * S),
        threadgroup=(threads, 1, 1),
    )[0]


def outputs(x, y, z, g, entry, cut: Blocks, factors, dtype) -> tuple[mx.array, mx.array]:
    """(o `[B, T, O, DZ]`, state after the walk `[B, S, DY, DZ]`) of one pass from its entry states."""
    same, z = z is None, y if z is None else z
    B, T, X, DY = x.shape
    DZ, S = z.shape[3], entry.shape[1]
    heads, threads = max(X, S), 32 * stripes(DZ)
    return launch(
        "linear",
        "linear_out",
        inputs=[x, y, z, g, entry, ints(cut.length), factors],
        template=[
            ("TX", x.dtype),
            ("TY", y.dtype),
            ("TZ", z.dtype),
            ("TO", dtype),
            ("DY", DY),
            ("DZ", DZ),
            ("W", staged_width([(DY, x.dtype), (DY, y.dtype)])),
            ("NC", STRIPE),
            ("SAME", same),
        ],
        output_shapes=[(B, T, heads, DZ), (B, S, DY, DZ)],
        output_dtypes=[dtype, mx.float32],
        grid=(threads, cut.count, B * heads),
        threadgroup=(threads, 1, 1),
    )


def entries(y, z, g, border, cut: Blocks, factors, back: bool = False) -> mx.array:
    """The states that enter N blocks `[B, S, N, DY, DZ]` from the one at the border where the walk starts."""
    if cut.count == 1:
        return border[:, :, None]
    sums, squares, logs = block_sums(y, z, g, cut, factors, back)
    return border_states(squares if z is None else sums, logs, border, factors, back)


def cut_of(x: mx.array, y: mx.array, z: mx.array | None) -> Blocks:
    """How a pass over these operands is cut."""
    heads = max(a.shape[2] for a in (x, y, z) if a is not None)
    return blocks(x.shape[1], x.shape[0] * heads)


def walk(x, y, z, g, first, *, power=1, scale=1.0, dtype=None):
    """One pass: (o `[B, T, O, DZ]`, last state `[B, S, DY, DZ]`, entry states `[B, S, N, DY, DZ]`).

    z None: it is y.
    """
    cut, factors = cut_of(x, y, z), floats(power, scale)
    entry = entries(y, z, g, first, cut, factors)
    return *outputs(x, y, z, g, entry, cut, factors, dtype or x.dtype), entry


# ---- gradients


class Gradients(NamedTuple):
    """Of a pass's x, y, z (None where it is y), g (`[B, T, Hg]`, None where it has none) and first state."""

    x: mx.array
    y: mx.array
    z: mx.array | None
    g: mx.array | None
    first: mx.array


def shared(x: mx.array, heads: int, axis: int = 2) -> mx.array:
    """Sum over neighbouring heads down to `heads`: the gradient of what they share."""
    if x.shape[axis] == heads:
        return x
    shape = (*x.shape[:axis], heads, x.shape[axis] // heads, *x.shape[axis + 1 :])
    return x.reshape(shape).sum(axis=axis + 1)


def spread(state: mx.array, heads: int) -> mx.array:
    """The gradient of a state, dealt out in equal parts to the heads that share it."""
    B, S, *shape = state.shape
    if heads == S:
        return state
    parts = mx.broadcast_to((state * (S / heads))[:, :, None], (B, S, heads // S, *shape))
    return parts.reshape(B, heads, *shape)


def _part_dtype(x: mx.array, heads: int) -> mx.Dtype:
    """dtype of x's gradient as the kernels write it: float32 where it is still to be summed over heads."""
    return x.dtype if x.shape[2] == heads else mx.float32


def kept_states(T: int, cut: Blocks, every: int) -> int:
    """How many states `back_queries` keeps: one every `every` tokens of each block, and the last."""
    last = T - (cut.count - 1) * cut.length
    return (cut.count - 1) * ceil_div(cut.length, every) + ceil_div(last, every) + 1


def back_queries(x, y, z, g, do, entry, plus, cut: Blocks, shape: Back, factors, decay: bool):
    """(dx + plus `[B, T, O, DY]`, a and some states S for `back_keys`)."""
    same, z = z is None, y if z is None else z
    (B, T, heads, DZ), DY, S = do.shape, y.shape[3], entry.shape[1]
    threads, added = 32 * stripes(DY), plus is not None
    plus = x if plus is None else plus
    return launch(
        "backward",
        "back_queries",
        inputs=[x, y, z, do, g, entry, plus, ints(cut.length), factors],
        template=[
            ("TX", x.dtype),
            ("TY", y.dtype),
            ("TZ", z.dtype),
            ("TD", do.dtype),
            ("TP", plus.dtype),
            ("TO", _part_dtype(x, heads)),
            ("DY", DY),
            ("DZ", DZ),
            ("W", shape.width),
            ("KEEP", shape.keep),
            ("NC", STRIPE),
            ("DECAY", decay),
            ("PLUS", added),
            ("SAME", same),
        ],
        output_shapes=[
            (B, T, heads, DY),
            (B, T, heads) if decay else (1,),
            (B, S, kept_states(T, cut, shape.keep), DZ, DY) if decay else (1,),
        ],
        output_dtypes=[_part_dtype(x, heads), mx.float32, mx.float32],
        grid=(threads, cut.count, B * heads),
        threadgroup=(threads, 1, 1),
    )


def back_keys(x, y, z, g, do, after, a, kept, cut: Blocks, shape: Back, factors, decay: bool):
    """(dy, dz or None where z is, r in parts, gradient of the first state), per head of do."""
    same, z = z is None, y if z is None else z
    (B, T, heads, DZ), DY = do.shape, y.shape[3]
    simdgroups = 2 * ceil_div(ceil_div(max(DY, DZ), 8), shape.stripe * shape.halves)
    dtypes = [_part_dtype(y, heads), _part_dtype(z, heads)]
    threads = 32 * simdgroups
    dy, dz, r, first = launch(
        "backward",
        "back_keys",
        inputs=[
            x,
            y,
            z,
            do,
            g,
            after,
            a if decay else g,
            kept if decay else after,
            ints(cut.length),
            factors,
        ],
        template=[
            ("TX", x.dtype),
            ("TY", y.dtype),
            ("TZ", z.dtype),
            ("TD", do.dtype),
            ("TOY", dtypes[0]),
            ("TOZ", dtypes[1]),
            ("DY", DY),
            ("DZ", DZ),
            ("W", shape.width),
            ("KEEP", shape.keep),
            ("NC", shape.stripe),
            ("HALVES", shape.halves),
            ("DECAY", decay),
            ("SAME", same),
        ],
        output_shapes=[
            (B, T, heads, DY),
            (1,) if same else (B, T, heads, DZ),
            (B, T, heads, shape.halves) if decay else (1,),
            (B, heads, DY, DZ),
        ],
        output_dtypes=[*dtypes, mx.float32, mx.float32],
        grid=(threads * shape.halves, cut.count, B * heads),
        threadgroup=(threads, 1, 1),
    )
    return dy, None if same else dz, r, first


def gradients(x, y, z, g, entry, do, d_last, *, power=1, scale=1.0, decay=True, plus=None) -> Gradients:
    """Gradients of one pass from its entry states, that of x added to `plus`.

    z None: it is y, and its gradient is part of y's.
    """
    heads, cut, factors = do.shape[2], cut_of(x, y, z), floats(power, scale)
    shape = back_shape(*((a.shape[3], a.dtype) for a in (x, y, do, z) if a is not None))
    dx, a, kept = back_queries(x, y, z, g, do, entry, plus, cut, shape, factors, decay)
    after = entries(x, do, g, spread(d_last, heads), cut, factors, back=True)
    dy, dz, r, first = back_keys(x, y, z, g, do, after, a, kept, cut, shape, factors, decay)
    dx, dy = (shared(d, a.shape[2]).astype(a.dtype) for d, a in ((dx, x), (dy, y)))
    dz = None if z is None else shared(dz, z.shape[2]).astype(z.dtype)
    dg = power * shared(r.flatten(2), g.shape[2]) / mx.maximum(g, TINY) if decay else None
    return Gradients(dx, dy, dz, dg, shared(first, entry.shape[1], 1))
