"""Launches of metal/linear.metal: one pass LA_{g^p} over a sequence, forward, reversed, and its gradients."""

# B batch, T time, S heads of the state, O heads of the output, DY key dim, DZ value dim, N blocks

from __future__ import annotations

import math

import mlx.core as mx

from .plan import STRIPE, Blocks, blocks, ceil_div, chunk_width, decay_chunk, decay_stripe
from .source import kernel

TINY = 1e-30  # stands for a decay of 0 where its gradient divides by it


def floats(*values: float) -> mx.array:
    return mx.array(values, mx.float32)


def ints(*values: int) -> mx.array:
    return mx.array(values, mx.int32)


def stripes(dim: int, stripe: int = STRIPE) -> int:
    """Simdgroups of a threadgroup whose result has `dim` columns."""
    return ceil_div(dim, 8 * stripe)


def block_sums(y, z, g, cut: Blocks, factors, rev: bool, skip: int = 1) -> tuple[mx.array, mx.array]:
    """What each block adds to the state `[B, S, N - skip, DY, DZ]`, and its log decay.

    skip = 1 leaves out the block that the walk comes to last: nobody enters a block after it.
    """
    B, DY, DZ, S = y.shape[0], y.shape[3], z.shape[3], max(y.shape[2], z.shape[2])
    N, threads = cut.count - skip, 32 * stripes(DZ)
    return kernel("linear", "linear_sums")(
        inputs=[y, z, g, ints(cut.length, skip if rev else 0), factors],
        template=[
            ("TY", y.dtype),
            ("DY", DY),
            ("DZ", DZ),
            ("W", chunk_width([(DY, y.dtype)])),
            ("NC", STRIPE),
            ("REV", rev),
            ("SAME", y is z),
        ],
        output_shapes=[(B, S, N, DY, DZ), (B, S, N, 2)],
        output_dtypes=[mx.float32, mx.float32],
        grid=(threads, N, B * S),
        threadgroup=(threads, 1, 1),
    )


def border_states(sums, logs, first, factors, rev: bool) -> mx.array:
    """The states at the borders of N blocks `[B, S, N + 1, DY, DZ]`, from what the blocks add."""
    B, S, N, DY, DZ = sums.shape
    size = DY * DZ
    threads = min(256, 32 * ceil_div(size, 32))
    return kernel("linear", "linear_scan")(
        inputs=[sums, logs, first, factors],
        template=[("REV", rev)],
        output_shapes=[(B, S, N + 1, DY, DZ)],
        output_dtypes=[mx.float32],
        grid=(threads * ceil_div(size, threads), B * S, 1),
        threadgroup=(threads, 1, 1),
    )[0]


def outputs(x, y, z, g, entry, cut: Blocks, factors, rev: bool, dtype) -> tuple[mx.array, mx.array]:
    """(o `[B, T, O, DZ]`, state after the walk `[B, S, DY, DZ]`) of one pass from its entry states."""
    B, T, X, DY = x.shape
    DZ, S = z.shape[3], entry.shape[1]
    heads, threads = max(X, S), 32 * stripes(DZ)
    return kernel("linear", "linear_out")(
        inputs=[x, y, z, g, entry, ints(cut.length), factors],
        template=[
            ("TX", x.dtype),
            ("TY", y.dtype),
            ("TO", dtype),
            ("DY", DY),
            ("DZ", DZ),
            ("W", chunk_width([(DY, x.dtype), (DY, y.dtype)])),
            ("NC", STRIPE),
            ("REV", rev),
        ],
        output_shapes=[(B, T, heads, DZ), (B, S, DY, DZ)],
        output_dtypes=[dtype, mx.float32],
        grid=(threads, cut.count, B * heads),
        threadgroup=(threads, 1, 1),
    )


def walk(
    x, y, z, g, first, *, power=1, read=1.0, write=1.0, rev=False, dtype=None, cut: Blocks | None = None
):
    """One pass LA from the state `first`: (o `[B, T, O, DZ]`, state after the walk `[B, S, DY, DZ]`)."""
    cut = cut or blocks(x.shape[1], x.shape[0] * max(a.shape[2] for a in (x, y, z)))
    factors = floats(power, read, write)
    if cut.count == 1:
        entry = first[:, :, None]
    else:
        entry = border_states(*block_sums(y, z, g, cut, factors, rev), first, factors, rev)
    return outputs(x, y, z, g, entry, cut, factors, rev, dtype or x.dtype)


# ---- gradients


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


def decay_terms(x, y, z, do, g, first, d_last, *, power, scale) -> mx.array:
    """r `[B, T, O]`, every term of the loss that holds a token's decay: dg = power · r / g."""
    (B, T, _, DY), DZ, heads = x.shape, z.shape[3], do.shape[2]
    stripe = decay_stripe(max(DY, DZ))
    simdgroups = stripes(DZ, stripe)
    width, room = decay_chunk([(DY, x.dtype), (DY, y.dtype)], [(DZ, do.dtype), (DZ, z.dtype)], simdgroups)
    cut = Blocks(width, ceil_div(T, width))
    ahead, back = floats(power, scale, 1.0), floats(power, 1.0, scale)
    before = border_states(*block_sums(y, z, g, cut, ahead, False, 0), first, ahead, False)
    after = border_states(*block_sums(x, do, g, cut, back, True, 0), d_last, back, True)
    threads = 32 * simdgroups
    return kernel("linear", "linear_decay")(
        inputs=[x, y, z, do, g, before, after, floats(power, scale, 1.0, math.log(TINY))],
        template=[
            ("TX", x.dtype),
            ("TY", y.dtype),
            ("TZ", z.dtype),
            ("TD", do.dtype),
            ("DY", DY),
            ("DZ", DZ),
            ("W", width),
            ("NC", stripe),
            ("ROOM", room),
        ],
        output_shapes=[(B, T, heads)],
        output_dtypes=[mx.float32],
        grid=(threads, cut.count, B * heads),
        threadgroup=(threads, 1, 1),
    )[0]


def gradients(x, y, z, g, first, do, d_last, *, power=1, scale=1.0, decay=True):
    """Gradients of x, y, z, g (as [B, T, Hg], None unless `decay`) and first of one pass."""
    heads = do.shape[2]
    d_state = spread(d_last, heads)
    # dx = LA(do, z, y), from the transposed state
    dx, _ = walk(do, z, y, g, first.swapaxes(2, 3), power=power, read=scale, dtype=x.dtype)
    # dy = REV LA(z, do, x), dz = REV LA(y, x, do): both walk the gradient of the state
    kind = {"power": power, "write": scale, "rev": True}
    dtype = [a.dtype if a.shape[2] == heads else mx.float32 for a in (y, z)]
    dy, _ = walk(z, do, x, g, d_state.swapaxes(2, 3), dtype=dtype[0], **kind)
    dz, d_first = walk(y, x, do, g, d_state, dtype=dtype[1], **kind)
    dy, dz = shared(dy, y.shape[2]).astype(y.dtype), shared(dz, z.shape[2]).astype(z.dtype)
    # The walk stops before the first token's decay.
    d_first = d_first * _per_head(g[:, 0], heads)[..., None, None] ** power
    d_first = shared(d_first, first.shape[1], 1)
    if not decay:
        return dx, dy, dz, None, d_first
    terms = shared(decay_terms(x, y, z, do, g, first, d_state, power=power, scale=scale), g.shape[2])
    return dx, dy, dz, power * terms / mx.maximum(g, TINY), d_first


def _per_head(g: mx.array, heads: int) -> mx.array:
    """[B, Hg] -> [B, heads], neighbours sharing one."""
    return mx.repeat(g, heads // g.shape[1], axis=1)
