"""Checks at the public border: every shape, dtype and option error of the operators is raised here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, NoReturn

import mlx.core as mx

from ..kernels.serve import DTYPES as FLOATS
from .parallel import Turns, usable
from .scan import fuse


def fail(op: str, what: str, got: Any) -> NoReturn:
    # An array's text has many lines, a list's may have no end.
    raise ValueError(f"[{op}] {what}, got {' '.join(str(got).split())[:100]}")


class Dims(NamedTuple):
    B: int
    Hq: int
    Hkv: int
    D: int
    Dv: int


@dataclass(frozen=True)
class Call:
    """One operator call after the checks: inputs with mask and segments folded in.

    g is None (no decay) or float32 `[B, T, Hkv]`; a masked token has q = k = v = 0 and g = 1, the first
    token of a segment has g = 0 and is True in starts `[B, T]`. options: the operator's own arguments.
    decay_gradient: the decay came as an array, so it may have a gradient. A step has no T.
    group: over whose ranks T is split, None where it is not. empty: this rank has no token, and a masked one
    stands in its place.
    """

    op: str
    q: mx.array
    k: mx.array
    v: mx.array
    g: mx.array | None
    scale: float
    normalize: bool
    eps: float
    mask: mx.array | None = None
    starts: mx.array | None = None
    decay_gradient: bool = True
    options: Mapping[str, float | mx.array] = field(default_factory=dict)
    group: Any = None
    empty: bool = False

    @property
    def dims(self) -> Dims:
        return Dims(self.q.shape[0], self.q.shape[-2], self.k.shape[-2], self.q.shape[-1], self.v.shape[-1])

    @property
    def values(self) -> mx.array:
        """v; normalising, with a last column of ones, whose result is the denominator."""
        if not self.normalize:
            return self.v
        return mx.concatenate([self.v, mx.ones((*self.v.shape[:-1], 1), self.v.dtype)], axis=-1)

    def as_sequence(self) -> Call:
        """One token as a sequence of one."""

        def longer(x: Any) -> Any:
            return x[:, None] if isinstance(x, mx.array) else x

        q, k, v, g = map(longer, (self.q, self.k, self.v, self.g))
        return replace(self, q=q, k=k, v=v, g=g, options={n: longer(x) for n, x in self.options.items()})

    def result(self, o: mx.array) -> mx.array:
        """o in the dtype of q; normalising, divided by its last column (Eq. 3.4)."""
        if self.empty:
            o = o[:, :0]
            return (o[..., :-1] if self.normalize else o).astype(self.q.dtype)
        if not self.normalize:
            return o.astype(self.q.dtype)
        o = o.astype(mx.float32)
        num, den = o[..., :-1], o[..., -1:] + self.eps
        if self.mask is not None:  # with ε = 0 a masked token is 0 / 0, and so is its gradient
            den = mx.where(self.mask[..., None, None], den, 1.0)
        return (num / den).astype(self.q.dtype)


class Option(NamedTuple):
    """An argument of an operator's own.

    A number of at least `least`; or, `per_token`, also an array `[Hq]` or `[B, T, Hq]` (`[B, Hq]` in a step).
    default: for unit keys. key_degree: with keys of length r, r to this power times as much does the same.
    learned: a layer may learn it per token. It multiplies a "mean" over the tokens so far, or their "sum",
    which the layer then divides by what their decayed count comes to, 1 / (1 − g).
    """

    name: str
    default: float
    least: float = -math.inf
    per_token: bool = False
    key_degree: int = 0
    learned: str | None = None


def number(op: str, name: str, value: Any, low: float = -math.inf) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            if math.isfinite(value) and value >= low:
                return float(value)
        except OverflowError:  # an int beyond the floats
            pass
    fail(op, f"{name} must be a finite number" + (f" ≥ {low:g}" if low > -math.inf else ""), repr(value)[:60])


def boolean(op: str, name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        fail(op, f"{name} must be True or False", repr(value))
    return value


def choice(op: str, name: str, value: Any, choices: tuple[str | None, ...]) -> Any:
    # By type first: an array compares with None by raising.
    if not isinstance(value, str | None) or value not in choices:
        fail(op, f"{name} must be {', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}", repr(value))
    return value


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


def _per_head(
    op: str, name: str, x: mx.array, lead: tuple[int, ...], heads: int, change: Callable = lambda x: x
) -> mx.array:
    """An array `[heads]` or `[*lead, heads]`, changed, as float32 `[*lead, heads]`."""
    if x.dtype not in FLOATS:
        fail(op, f"{name} must be float16, bfloat16 or float32", x.dtype)
    shape = (*lead, heads)
    if x.shape not in ((heads,), shape):
        fail(op, f"{name} must be a number, [{heads}] or {list(shape)}", x.shape)
    return mx.broadcast_to(change(x.astype(mx.float32)), shape)


@mx.custom_function
@fuse
def _clamped(g):
    # By comparisons, so that NaN stays NaN.
    return mx.where(g < 0, 0.0, mx.where(g > 1, 1.0, g))


@_clamped.vjp
def _(g, d, clamped):
    # At exactly 0 and 1 the gradient is that of g. What the comparisons gave need not be kept for it.
    return mx.where((clamped == g) | mx.isnan(g), d, 0.0)


def decay_array(
    op: str, decay: float | mx.array | None, lead: tuple[int, ...], heads: int
) -> mx.array | None:
    """decay as float32 `[*lead, heads]` in [0, 1], or None; NaN stays NaN."""
    if decay is None:
        return None
    if isinstance(decay, mx.array):
        return _per_head(op, "decay", decay, lead, heads, _clamped)
    if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0 <= decay <= 1:
        fail(op, "decay must be None, a number in [0, 1] or an array", repr(decay))
    return None if decay == 1 else mx.full((*lead, heads), float(decay), dtype=mx.float32)


def _own(
    op: str, options: tuple[Option, ...], given: Mapping[str, Any], lead: tuple[int, ...], heads: int
) -> dict[str, float | mx.array]:
    """An operator's own arguments, None standing for the default: numbers, or float32 `[*lead, heads]`."""
    out: dict[str, float | mx.array] = {}
    for option in options:
        value = given.get(option.name)
        if value is None:
            out[option.name] = option.default
        elif option.per_token and isinstance(value, mx.array):
            out[option.name] = _per_head(op, option.name, value, lead, heads)
        else:
            out[option.name] = number(op, option.name, value, option.least)
    return out


def _segment_starts(segment_ids: mx.array, mask: mx.array | None, turns: Turns | None = None) -> mx.array:
    """True at a real token whose id differs from the id of the real token before it, if there is one."""
    real = mx.ones(segment_ids.shape, mx.bool_) if mask is None else mask
    where = mx.where(real, mx.arange(real.shape[1])[None], -1)
    last = mx.pad(mx.cummax(where, axis=1)[:, :-1], [(0, 0), (1, 0)], constant_values=-1)
    before = mx.take_along_axis(segment_ids, mx.maximum(last, 0), axis=1)
    follows = last >= 0
    if turns is not None:  # the first ones follow a token of an earlier rank
        earlier, there = (x[:, None] for x in turns.last_ids(segment_ids, mask))
        before = mx.where(follows, before, earlier)
        follows = mx.logical_or(follows, there)
    return mx.logical_and(mx.logical_and(real, follows), segment_ids != before)


def _one_masked(x: Any, B: int, fill: float = 0.0) -> Any:
    """An argument `[B, 0, ..]` of a call without a token, with room for a masked one; others as they are."""
    if not isinstance(x, mx.array) or x.ndim < 2 or x.shape[:2] != (B, 0):
        return x
    return mx.pad(x, [(0, 0), (0, 1), *[(0, 0)] * (x.ndim - 2)], constant_values=fill)


def canonical(
    op: str,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    options: tuple[Option, ...] = (),
    given: Mapping[str, Any] | None = None,
    *,
    scale: float = 1.0,
    decay: float | mx.array | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
    mask: mx.array | None = None,
    segment_ids: mx.array | None = None,
    group: Any = None,
) -> Call:
    """Check one call over a sequence and fold mask and segments into q, k, v, the decay and the options."""
    group = usable(op, group)
    empty = group is not None and isinstance(q, mx.array) and q.ndim == 4 and q.shape[1] == 0
    if empty:
        own: Any = (q, k, v, decay, segment_ids)
        q, k, v, decay, segment_ids = (_one_masked(x, q.shape[0], 1.0 if x is decay else 0.0) for x in own)
        given = {name: _one_masked(x, q.shape[0]) for name, x in (given or {}).items()}
        mask = mx.zeros((q.shape[0], 1), mx.bool_)
    call = _checked(op, q, k, v, "T, ", options, given, scale, decay, normalize, eps)
    B, T = call.q.shape[:2]
    for name, x in (("mask", mask), ("segment_ids", segment_ids)):
        if x is not None and (not isinstance(x, mx.array) or x.shape != (B, T)):
            got = x.shape if isinstance(x, mx.array) else type(x).__name__
            fail(op, f"{name} must be an mlx array [{B}, {T}]", got)
    if mask is not None and mask.dtype != mx.bool_:
        fail(op, "mask must be boolean, True for a real token", mask.dtype)
    if segment_ids is not None and not mx.issubdtype(segment_ids.dtype, mx.integer):
        fail(op, "segment_ids must be integers", segment_ids.dtype)
    g = call.g
    if mask is not None:
        per_token, real = mask[..., None], mask[..., None, None]
        q, k, v = (mx.where(real, x, mx.zeros((), x.dtype)) for x in (q, k, v))
        g = None if g is None else mx.where(per_token, g, 1.0)
        own = {
            n: mx.where(per_token, x, 0.0) if isinstance(x, mx.array) else x for n, x in call.options.items()
        }
        call = replace(call, q=q, k=k, v=v, g=g, options=own, mask=mask)
    if segment_ids is not None:
        starts = _segment_starts(segment_ids, mask, None if group is None else Turns(group, q))
        g = mx.ones((B, T, k.shape[2]), dtype=mx.float32) if g is None else g
        call = replace(call, g=mx.where(starts[..., None], 0.0, g), starts=starts)
    return call if group is None else replace(call, group=group, empty=empty)


def canonical_step(
    op: str,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    options: tuple[Option, ...] = (),
    given: Mapping[str, Any] | None = None,
    *,
    scale: float = 1.0,
    decay: float | mx.array | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
) -> Call:
    """Check one call for one token, q `[B, Hq, D]`, k `[B, Hkv, D]`, v `[B, Hkv, Dv]`."""
    return _checked(op, q, k, v, "", options, given, scale, decay, normalize, eps)


def _checked(op, q, k, v, time, options, given, scale, decay, normalize, eps) -> Call:
    _qkv(op, q, k, v, time)
    lead = q.shape[:-2]
    return Call(
        op,
        q,
        k,
        v,
        decay_array(op, decay, lead, k.shape[-2]),
        _scale(op, scale),
        boolean(op, "normalize", normalize),
        number(op, "eps", eps, 0.0),
        decay_gradient=isinstance(decay, mx.array),
        options=_own(op, options, given or {}, lead, q.shape[-2]),
    )
