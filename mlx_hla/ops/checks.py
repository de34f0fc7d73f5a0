"""Checks at the public border: every shape, dtype and option error of the operators is raised here."""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx

FLOATS = (mx.float16, mx.bfloat16, mx.float32)


def fail(op: str, what: str, got) -> None:
    raise ValueError(f"[{op}] {what}, got {got}")


@dataclass
class Call:
    """One operator call after the checks: inputs with mask and segments folded in.

    g is None (no decay) or float32 `[B, T, Hkv]`; a masked token has q = k = v = 0 and g = 1, the first
    token of a segment has g = 0 and is True in starts `[B, T]`. `ones` (`[B, T, Hkv, 1]`, None unless
    normalising) is v's extra column. decay_gradient: the decay came as an array, so it may have a gradient.
    """

    op: str
    q: mx.array
    k: mx.array
    v: mx.array
    g: mx.array | None
    ones: mx.array | None
    scale: float
    eps: float
    mask: mx.array | None = None
    starts: mx.array | None = None
    decay_gradient: bool = True

    @property
    def dims(self) -> tuple[int, int, int, int, int]:
        """B, Hq, Hkv, D, Dv."""
        return self.q.shape[0], self.q.shape[-2], self.k.shape[-2], self.q.shape[-1], self.v.shape[-1]


def number(op: str, name: str, value, low: float = -math.inf) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or value < low
    ):
        fail(op, f"{name} must be a finite number" + (f" ≥ {low:g}" if low > -math.inf else ""), repr(value))
    return float(value)


def _scale(op: str, scale) -> float:
    if number(op, "scale", scale) == 0:
        fail(op, "scale must not be 0", scale)
    return float(scale)


def _arrays(op: str, arrays: dict[str, mx.array], form: str, rank: int) -> None:
    for name, x in arrays.items():
        if not isinstance(x, mx.array):
            fail(op, f"{name} must be an mlx array", type(x).__name__)
        if x.dtype not in FLOATS:
            fail(op, f"{name} must be float16, bfloat16 or float32", x.dtype)
        if x.ndim != rank:
            fail(op, f"{name} must be {form}", x.shape)
        if 0 in x.shape:
            fail(op, f"{name} must not be empty", x.shape)
    if len({x.dtype for x in arrays.values()}) > 1:
        fail(op, "q, k and v must have one dtype", [str(x.dtype) for x in arrays.values()])


def _qkv(op: str, q, k, v, time: str) -> None:
    rank = 4 if time else 3
    form = f"[B, {time}heads, dim]"
    _arrays(op, {"q": q, "k": k, "v": v}, form, rank)
    Hq, Hkv, lead = q.shape[-2], k.shape[-2], q.shape[:-2]
    if k.shape[:-2] != lead or Hq % Hkv or k.shape[-1] != q.shape[-1]:
        want = f"[{', '.join(map(str, lead))}, Hkv, {q.shape[-1]}] with Hkv dividing {Hq}"
        fail(op, f"k must be {want}, like q {q.shape}", k.shape)
    if v.shape[:-1] != k.shape[:-1]:
        fail(op, f"v must be [{', '.join(map(str, k.shape[:-1]))}, Dv], like k {k.shape}", v.shape)


def decay_array(op: str, decay, lead: tuple[int, ...], heads: int) -> mx.array | None:
    """decay as float32 `[*lead, heads]`, or None."""
    if decay is None:
        return None
    if isinstance(decay, mx.array):
        if decay.dtype not in FLOATS:
            fail(op, "decay must be float16, bfloat16 or float32", decay.dtype)
        shape = (*lead, heads)
        if decay.shape not in ((heads,), shape):
            fail(op, f"decay must be a number, [{heads}] or {list(shape)}", decay.shape)
        return mx.broadcast_to(decay.astype(mx.float32), shape)
    if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0 <= decay <= 1:
        fail(op, "decay must be None, a number in [0, 1] or an array", repr(decay))
    return None if decay == 1 else mx.full((*lead, heads), float(decay), dtype=mx.float32)


def _segment_starts(segment_ids: mx.array, mask: mx.array | None) -> mx.array:
    """True at a real token whose id differs from the id of the real token before it."""
    before = mx.pad(segment_ids[:, :-1], [(0, 0), (1, 0)])
    first = mx.arange(segment_ids.shape[1])[None] == 0
    if mask is None:
        return mx.logical_and(segment_ids != before, mx.logical_not(first))
    where = mx.where(mask, mx.arange(mask.shape[1])[None], -1)
    last = mx.pad(mx.cummax(where, axis=1)[:, :-1], [(0, 0), (1, 0)], constant_values=-1)
    before = mx.take_along_axis(segment_ids, mx.maximum(last, 0), axis=1)
    return mx.logical_and(mx.logical_and(mask, last >= 0), segment_ids != before)


def canonical(op, q, k, v, scale, decay, normalize, eps, mask, segment_ids) -> Call:
    """Check one call over a sequence and fold mask and segments into q, k, v and the decay."""
    _qkv(op, q, k, v, "T, ")
    B, T, _, Hkv, _ = (*q.shape[:3], *k.shape[2:])
    g = decay_array(op, decay, (B, T), Hkv)
    for name, x in (("mask", mask), ("segment_ids", segment_ids)):
        if x is not None and (not isinstance(x, mx.array) or x.shape != (B, T)):
            got = x.shape if isinstance(x, mx.array) else type(x).__name__
            fail(op, f"{name} must be an mlx array [{B}, {T}]", got)
    if mask is not None and mask.dtype != mx.bool_:
        fail(op, "mask must be boolean, True for a real token", mask.dtype)
    if segment_ids is not None and not mx.issubdtype(segment_ids.dtype, mx.integer):
        fail(op, "segment_ids must be integers", segment_ids.dtype)
    ones = mx.ones((B, T, Hkv, 1), q.dtype) if normalize else None
    if mask is not None:
        real = mask[..., None, None]
        q, k, v = (mx.where(real, x, mx.zeros((), x.dtype)) for x in (q, k, v))
        g = None if g is None else mx.where(mask[..., None], g, 1.0)
    starts = None
    if segment_ids is not None:
        g = mx.ones((B, T, Hkv), dtype=mx.float32) if g is None else g
        starts = _segment_starts(segment_ids, mask)
        g = mx.where(starts[..., None], 0.0, g)
    given = isinstance(decay, mx.array)
    return Call(op, q, k, v, g, ones, _scale(op, scale), number(op, "eps", eps, 0.0), mask, starts, given)


def canonical_step(op, q, k, v, scale, decay, normalize, eps) -> Call:
    """Check one call for one token, q `[B, Hq, D]`, k `[B, Hkv, D]`, v `[B, Hkv, Dv]`."""
    _qkv(op, q, k, v, "")
    g = decay_array(op, decay, q.shape[:1], k.shape[1])
    ones = mx.ones((*v.shape[:-1], 1), q.dtype) if normalize else None
    return Call(op, q, k, v, g, ones, _scale(op, scale), number(op, "eps", eps, 0.0))


def check_state(op: str, state, kind: type, shapes: dict[str, tuple[int, ...] | None]):
    """The state's fields, checked: float32 arrays of these shapes; None stands for a field not in use."""
    if not isinstance(state, kind):
        fail(op, f"the state must be a {kind.__name__}", type(state).__name__)
    for name, shape in shapes.items():
        x = getattr(state, name)
        if shape is None:
            if x is not None:
                fail(op, f"state.{name} must be None: it belongs to normalize=True", tuple(x.shape))
            continue
        if not isinstance(x, mx.array) or x.shape != shape or x.dtype != mx.float32:
            got = f"{x.dtype} {x.shape}" if isinstance(x, mx.array) else repr(x)
            fail(op, f"state.{name} must be float32 {list(shape)}", got)
    return state
