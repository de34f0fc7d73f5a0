"""One pass LA_{g^p} over a sequence as a differentiable function: what every operator is made of."""

# B batch, T time, S heads of the state, D key dim, DV value dim

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx

from ..transforms import differentiable
from . import passes
from .plan import back_shape, segments


def whole_decay(g: mx.array | None, lead: tuple[int, ...]) -> mx.array:
    """g as `[*lead, Hg]`, broadcast without a copy; no decay is a decay of 1."""
    if g is None:
        return mx.broadcast_to(passes.floats(1), (*lead, 1))
    return mx.broadcast_to(g, (*lead, g.shape[-1]))


def zero_state(shape: tuple[int, ...]) -> mx.array:
    """Zeros that no launch writes: one number, which kernels read with strides of 0."""
    return mx.broadcast_to(passes.floats(0), shape)


def between(dtype: mx.Dtype) -> mx.Dtype:
    """dtype of K̃ between two launches: float16 has too little range for a sum of products."""
    return mx.bfloat16 if dtype == mx.bfloat16 else mx.float32


class Operands(NamedTuple):
    """Of a pass: queries x, keys y, values z (None: the keys), decay g, the state before the first token."""

    x: mx.array
    y: mx.array
    z: mx.array | None
    g: mx.array
    first: mx.array

    def between(self, cut: slice, first: mx.array) -> Operands:
        """The tokens of `cut`, from the state before them."""
        x, y, z, g, _ = self
        return Operands(x[:, cut], y[:, cut], None if z is None else z[:, cut], g[:, cut], first)


class Walked(NamedTuple):
    """What a pass gives: o, the state after the last token, the states that enter its blocks."""

    o: mx.array
    last: mx.array
    entry: mx.array


class Backward(NamedTuple):
    """What a pass's reverse mode reads."""

    operands: Operands
    entry: mx.array
    do: mx.array
    d_last: mx.array


@lru_cache(maxsize=256)
def _pass(scale: float, power: int, decay: bool, dtype: mx.Dtype) -> Callable[[Operands], Walked]:
    """LA_{g^power}; decay: g has a gradient."""

    def run(a: Operands) -> Walked:
        return Walked(*passes.walk(*a, power=power, scale=scale, dtype=dtype))

    def gradients(b: Backward) -> passes.Gradients:
        x, y, z, g, _ = b.operands
        return passes.gradients(x, y, z, g, b.entry, b.do, b.d_last, power=power, scale=scale, decay=decay)

    back = differentiable(gradients)

    def run_vjp(a: Operands, out: Walked, d: Walked) -> passes.Gradients:
        return back(Backward(a, out.entry, d.o, d.last))

    return differentiable(run, run_vjp)


def linear(
    q: mx.array,
    k: mx.array,
    v: mx.array | None = None,
    g: mx.array | None = None,
    state: mx.array | None = None,
    *,
    scale: float = 1.0,
    power: int = 1,
    dtype: mx.Dtype | None = None,
    decay_gradient: bool = True,
) -> tuple[mx.array, mx.array]:
    """LA_{g^power}: `P_t = g_t^power P_{t-1} + k_t v_tᵀ`, `o_t = scale · P_tᵀ q_t`; returns (o, P).

    q, k, v may differ in dtype and head counts; v None: the keys, read once. o comes in `dtype`, by default
    that of q. decay_gradient=False: g is a constant, its gradient zero and free.
    """
    values = k if v is None else v
    (B, T, _, D), DV, heads = q.shape, values.shape[3], max(k.shape[2], values.shape[2])
    dtype, decay = dtype or q.dtype, decay_gradient and g is not None
    first = zero_state((B, heads, D, DV)) if state is None else state
    a = Operands(q, k, v, whole_decay(g, k.shape[:2]), first)
    run, parts = _pass(float(scale), power, decay, dtype), []
    staged = [(D, q.dtype), (D, k.dtype), (DV, dtype), *([] if v is None else [(DV, v.dtype)])]
    kept = back_shape(*staged).keep if decay else None
    for cut in segments(B * max(q.shape[2], heads), T, D, DV, kept):
        o, first, _ = run(a.between(cut, first))
        parts.append(o)
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1), first
