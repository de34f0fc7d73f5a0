"""The operators beside their float64 oracles: cases from their records, problems, one error bound."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from conftest import assert_close, to_numpy

import mlx_hla
from mlx_hla import reference as R
from mlx_hla.ops.operator import OPERATORS as RECORDS
from mlx_hla.ops.operator import Held, Operator
from mlx_hla.ops.order import of_order


class Level(int):
    """Sums, products and quotients are as deep as the deeper of the two."""

    dtype = None

    def deeper(self, other):
        return Level(max(self, other if isinstance(other, int) else 0))

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = deeper

    def astype(self, dtype):
        return self


class Depth:
    """A place in which an array is the number of passes behind it."""

    q = k = v = Level(0)

    def scaled_q(self, by=1.0):
        return 0

    def la(self, slot, q, k, v, **options):
        return Level(1 + int(max(q, k, v or 0)))

    def la_before(self, slot, q, k, v):
        return self.la(slot, q, k, v)

    def count(self, slot):
        return Level(1)

    def per_query(self, x):
        return x

    def coefficient(self, name):
        return Level(0)


class Tested(NamedTuple):
    """An operator and its options: numbers, and those given as arrays, with the axes of each."""

    operator: Operator
    options: dict
    arrays: dict

    @property
    def name(self):
        return self.operator.name

    @property
    def passes(self):
        """Passes of the primitive one after another."""
        place = Depth()
        place.call = mlx_hla.ops.checks.Call(*[None] * 5, 1.0, False, 0.0, options={"ridge": 0.0})
        return int(self.operator.compose(place))


def _cases():
    """Every operator as it is, with a number for each option, with arrays where an option takes them."""
    for operator in (*RECORDS.values(), of_order(4), of_order(5)):
        yield operator.key, Tested(operator, dict(operator.selected), {})
        if operator.options:
            numbers = {o.name: 0.3 + 0.4 * i for i, o in enumerate(operator.options)}
            label = "-".join([operator.key, *(o.name for o in operator.options)])
            yield label, Tested(operator, numbers | operator.selected, {})
        per_token = [o.name for o in operator.options if o.per_token]
        if per_token:
            axes = {name: "HTH"[i % 3] for i, name in enumerate(per_token)}
            yield f"{operator.key}-arrays", Tested(operator, dict(operator.selected), axes)


OPERATORS = dict(_cases())
each_operator = pytest.mark.parametrize("op", OPERATORS)

DTYPES = {"f32": mx.float32, "f16": mx.float16, "bf16": mx.bfloat16}
# Unit roundoff: half the distance from 1 to the next number.
ROUNDOFF = {"f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8}


def function(op, step=False):
    """The operator as f(q, k, v, ..) with the options of its table row."""
    tested = OPERATORS[op]
    f = getattr(mlx_hla, tested.name + ("_step" if step else ""))
    return lambda *args, **options: f(*args, **tested.options, **options)


def serial(op, *qkv, **options):
    tested = OPERATORS[op]
    return getattr(R, f"serial_{tested.name}")(*qkv, **tested.options, **options)


def reference_vjp(op, *args, **options):
    tested = OPERATORS[op]
    return getattr(R, f"vjp_{tested.name}")(*args, **tested.options, **options)


def leaves(state):
    """The arrays of a state by name, tuples opened."""
    out = {}
    for name, field in zip(state._fields, state, strict=True):
        if isinstance(field, tuple):
            out |= {f"{name}{i}": x for i, x in enumerate(field)}
        elif field is not None:
            out[name] = field
    return out


def rebuild(like, arrays, kind=None):
    """A state built like another one, of other arrays in the order of its leaves."""
    arrays = iter(arrays)

    def one(field):
        if isinstance(field, tuple):
            return tuple(next(arrays) for _ in field)
        return None if field is None else next(arrays)

    return (kind or type(like))(*(one(field) for field in like))


def mlx_state(like, arrays):
    return rebuild(like, arrays, getattr(mlx_hla, type(like).__name__))


def error_bound(op, T, D, gradient=False):
    """How far float32 may be from float64, relative and in the Frobenius norm: c·u·passes·(√T + √D).

    A dot product of D terms is off by about u·√D, and a sum of T such terms, rounded at every addition,
    by u·√T more; errors of passes that feed one another add up. A gradient runs the passes forwards and
    then each of them backwards twice, on the query's and on the key's side: three times the bound. c = 4
    leaves room for the decay factors and for terms that cancel one another.
    """
    passes = OPERATORS[op].passes * (3 if gradient else 1)
    return 4 * ROUNDOFF["f32"] * passes * (np.sqrt(T) + np.sqrt(D))


@dataclass(frozen=True)
class Case:
    """One call: shapes, dtype and options. `carried`: from an initial state of random numbers."""

    T: int = 37
    B: int = 2
    Hq: int = 4
    Hkv: int = 2
    D: int = 6
    V: int = 5
    dtype: str = "f32"
    decay: str | None = None  # "float", "heads", "gates", "extreme", "resets" or "half", see `Problem.decay`
    mask: str | None = None  # "left", "right", "holes"
    segments: bool = False
    normalize: bool = False
    eps: float = 0.1
    scale: float = 1.0
    carried: bool = False

    def __str__(self):
        heads = f"H{self.Hq}" + (f"x{self.Hkv}" if self.Hkv != self.Hq else "")
        dims = f"D{self.D}" + (f"-V{self.V}" if self.V != self.D else "")
        extra = [self.decay, self.mask and f"{self.mask}mask", "segments" if self.segments else None]
        extra += ["ratio" if self.normalize else None, "carried" if self.carried else None]
        extra += ["eps0" if self.eps == 0 else None, f"s{self.scale}" if self.scale != 1 else None]
        parts = [f"B{self.B}-T{self.T}-{heads}-{dims}-{self.dtype}", *(x for x in extra if x)]
        return "-".join(parts)


def each_case(*cases):
    return pytest.mark.parametrize("case", cases, ids=str)


class Problem:
    """The inputs of a case, as MLX arrays and as the same numbers in float64, and both answers."""

    def __init__(self, op, case, seed=0, poison=True):
        self.op, self.case = op, case
        self.rng = np.random.default_rng(seed)
        c, dtype = case, DTYPES[case.dtype]
        qkv = [self._draw(c.B, c.T, h, d) for h, d in ((c.Hq, c.D), (c.Hkv, c.D))]
        qkv.append(self.rng.normal(size=(c.B, c.T, c.Hkv, c.V)))
        qkv[0], qkv[1] = qkv[0] / np.sqrt(c.D), qkv[1] / np.sqrt(c.D)
        decay, own = self._decay(), self._own()
        self.mask, self.segments = self._mask(), self._segments()
        if self.mask is not None and poison:
            # What a masked token holds must not matter: not even if it is not a number.
            for x in (*qkv, decay, *own.values()):
                if np.ndim(x) >= 3:
                    x[~self.mask] = np.nan
        self.arrays = {n: mx.array(x).astype(dtype) for n, x in zip("qkv", qkv, strict=True)}
        self.fixed_decay = decay if isinstance(decay, float) else None
        if isinstance(decay, np.ndarray):
            self.arrays["decay"] = mx.array(decay).astype(mx.bfloat16 if c.decay == "half" else mx.float32)
        self.arrays |= {n: mx.array(x.astype(np.float32)) for n, x in own.items()}
        self.eps = c.eps
        _, self.shape = serial(op, *(np.ones((*x.shape[:1], 1, *x.shape[2:])) for x in qkv), **self._ratio())
        if c.carried:
            for name, x in leaves(self.shape).items():
                self.arrays[f"state.{name}"] = mx.array(self._draw(*x.shape).astype(np.float32))
        self.numbers = {name: to_numpy(x) for name, x in self.arrays.items()}
        if c.normalize and c.eps > 0 and self._signed:
            # A denominator of any sign, even of positive inputs: keep ε above it.
            q, k, v, decay, start = self._reference
            if start is not None:  # the operator on v = 1: the normalisers are its states
                held = self.record.held(start)
                start = self.record.state_of(
                    {key: x if x.vector is None else Held(x.vector[..., None]) for key, x in held.items()}
                )
                start = rebuild(start, leaves(start).values(), type(self.shape))
            options = self.options | {"decay": decay, "normalize": False} | self.own
            den, _ = serial(op, q, k, np.ones_like(v[..., :1]), initial_state=start, **options)
            self.eps = 2.0 * float(np.abs(den).max())

    @property
    def record(self):
        return OPERATORS[self.op].operator

    @property
    def _signed(self):
        """Differences (Algorithm 3), or options of any sign."""
        return self.record.wide or any(o.per_token for o in self.record.options)

    def _ratio(self):
        return {"normalize": self.case.normalize, "eps": self.eps}

    def _draw(self, *shape):
        """Positive numbers where a denominator has to stay away from 0."""
        if self.case.normalize:
            return self.rng.uniform(0.3, 1.0, shape)
        return self.rng.normal(size=shape)

    def _decay(self):
        c = self.case
        if c.decay in (None, "float"):
            return 0.9 if c.decay else None
        if c.decay == "heads":
            return np.linspace(0.8, 0.95, c.Hkv)
        g = self.rng.uniform(0.5, 1.0, (c.B, c.T, c.Hkv))
        if c.decay == "resets":  # all or nothing, never twice in a chunk
            g[:] = 1.0
            g[:, 5::37] = 0.0
        if c.decay == "extreme":
            # zeros at the start, in the middle, twice running, and at both sides of chunk borders
            for t, value in ((0, 0.0), (5, 1e-30), (6, 1e-12), (7, 0.0), (8, 0.0), (15, 1e-30), (16, 0.0)):
                g[0, t % c.T, 0] = value
            g[-1, (11, 12, 24), -1] = 1e-30, 0.0, 1e-20
            g[-1, 17:23, 0] = 1.0
        return g

    def _own(self):
        """The operator's options that this case gives as arrays."""
        shapes = {"H": (self.case.Hq,), "T": (self.case.B, self.case.T, self.case.Hq)}
        return {n: self._draw(*shapes[axes]) for n, axes in OPERATORS[self.op].arrays.items()}

    def _mask(self):
        c = self.case
        if c.mask is None:
            return None
        real = np.ones((c.B, c.T), bool)
        for b, row in enumerate(real):
            if c.mask == "left":
                row[: 3 + 9 * b] = False
            elif c.mask == "right":
                row[c.T - 4 - 9 * b :] = False
            else:
                row[self.rng.random(c.T) < 0.4] = False
        return real

    def _segments(self):
        if not self.case.segments:
            return None
        borders = self.rng.random((self.case.B, self.case.T)) < 0.12
        return np.cumsum(borders, axis=1) % 3

    @property
    def options(self):
        """Options that both sides take, as NumPy; the decay only where it is a number."""
        out = {"scale": self.case.scale, "mask": self.mask, "segment_ids": self.segments, **self._ratio()}
        return out | ({"decay": self.fixed_decay} if self.fixed_decay is not None else {})

    def start(self, arrays=None):
        """The initial state among the arrays (by default the problem's), or None."""
        start = [x for name, x in (arrays or self.arrays).items() if name.startswith("state.")]
        return mlx_state(self.shape, start) if start else None

    def at(self, index, arrays=None):
        """([q, k, v], options that are arrays) at some tokens, or at one."""
        given = {n: x for n, x in (arrays or self.arrays).items() if not n.startswith("state.")}
        cut = {n: x[:, index] if x.ndim >= 3 else x for n, x in given.items()}
        return [cut.pop(n) for n in "qkv"], cut

    def call(self, *arrays, f=None):
        """The operator on arrays in the order of `self.arrays`: (o, state)."""
        named = dict(zip(self.arrays, arrays, strict=True))
        options = {n: mx.array(x) if isinstance(x, np.ndarray) else x for n, x in self.options.items()}
        qkv, given = self.at(slice(None), named)
        if self.case.carried:
            options["initial_state"] = self.start(named)
        return (f or function(self.op))(*qkv, **options | given)

    def run(self):
        return self.call(*self.arrays.values())

    @cached_property
    def _reference(self):
        """q, k, v, decay and initial state in float64."""
        n = self.numbers
        start = [x for name, x in n.items() if name.startswith("state.")]
        start = rebuild(self.shape, start) if start else None
        return (*(n[x] for x in "qkv"), n.get("decay", self.fixed_decay), start)

    @property
    def own(self):
        """The operator's options that are arrays, in float64."""
        return {name: self.numbers[name] for name in OPERATORS[self.op].arrays}

    def expected(self):
        q, k, v, decay, start = self._reference
        options = self.options | {"decay": decay} | self.own
        return serial(self.op, q, k, v, **options, initial_state=start)

    def wanted(self, do, dstate):
        """The gradients in float64 by input name, from those of o and of the final state."""
        options = {n: x for n, x in self.options.items() if n != "decay"} | self.own
        want = reference_vjp(self.op, *self._reference, do, dstate, **options)
        return want | {f"state.{name}": x for name, x in leaves(want.pop("initial_state")).items()}

    def cotangents(self, o, state):
        """Incoming gradients of o and of the state's leaves, MLX arrays of their dtypes."""
        draw = [mx.array(self.rng.normal(size=x.shape)).astype(x.dtype) for x in (o, *leaves(state).values())]
        return draw[0], draw[1:]

    def gradients(self, through="both"):
        """(got, want) by input name: the gradients through o, through the final state, or through both."""
        o, state = self.run()
        do, dstate = self.cotangents(o, state)
        use_o, use_state = through != "state", through != "o"

        def f(*arrays):
            o, state = self.call(*arrays)
            return [*([o] if use_o else []), *(leaves(state).values() if use_state else [])]

        given = [*([do] if use_o else []), *(dstate if use_state else [])]
        _, got = mx.vjp(f, list(self.arrays.values()), given)
        want = self.wanted(
            to_numpy(do) * use_o,
            rebuild(self.shape, [to_numpy(x) for x in dstate]) if use_state else None,
        )
        for name, x, y in zip(self.arrays, self.arrays.values(), got, strict=True):
            assert x.dtype == y.dtype, f"d{name} is {y.dtype}, expected {x.dtype}"
        return dict(zip(self.arrays, got, strict=True)), want

    @cached_property
    def cancellation(self):
        """How much larger the parts of a difference are than it: only Algorithm 3 subtracts."""
        if not self.record.wide:
            return 1.0
        q, k, v, decay, _ = self._reference
        q, k, v, decay = (None if x is None else np.nan_to_num(x) for x in (q, k, v, decay))
        options = self.options | {"decay": decay, "normalize": False}
        full = R.serial_hla3(q, k, v, masked=False, **options)[0]
        rest = R.serial_hla3(q, k, v, convention="paper", **options)[0]
        return max(1.0, np.linalg.norm(full) / np.linalg.norm(rest))

    def bound(self, gradient=False, result=None):
        """The error bound of this case; `result`, an array, adds the rounding to its own dtype."""
        c = self.case
        bound = error_bound(self.op, c.T, c.D, gradient) * self.cancellation
        half = {mx.float16: "f16", mx.bfloat16: "bf16"}.get(getattr(result, "dtype", None))
        return bound + (ROUNDOFF[half] if half else 0.0)

    def check_values(self):
        o, state = self.run()
        want_o, want = self.expected()
        assert o.dtype == self.arrays["q"].dtype
        assert_close(f"{self.op} o", o, want_o, self.bound(result=o))
        check_state(self.op, state, want, self.bound())
        if self.mask is not None:
            assert not to_numpy(o)[~self.mask].any(), "a masked token must give 0"

    def check_gradients(self, through="both"):
        got, want = self.gradients(through)
        for name, x in got.items():
            tol = self.bound(gradient=True, result=x)
            if self.case.eps == 0 and name in OPERATORS[self.op].arrays:
                tol *= 10  # a pure ratio does not change with the size of its query: α dα + β dβ = 0
            assert_close(f"{self.op} d{name}", x, want[name], tol)
        return got, want


def check_state(op, state, want, tol):
    """Type, fields, dtype and values of a final state."""
    assert type(state) is getattr(mlx_hla, type(want).__name__)
    got = leaves(state)
    assert got.keys() == leaves(want).keys()
    for name, x in leaves(want).items():
        assert got[name].dtype == mx.float32, f"state.{name} is {got[name].dtype}"
        assert_close(f"{op} state.{name}", got[name], x, tol)


def tiny_chunks(monkeypatch):
    """Chunks of 8 tokens in groups of 2: a short sequence takes several groups on three levels."""
    monkeypatch.setattr("mlx_hla.ops.places.WIDTH_CPU", 8)
    monkeypatch.setattr("mlx_hla.ops.scan.GROUP_CPU", 2)


def gpu_dtypes(monkeypatch, width=16):
    """The arithmetic of a GPU on a CPU: bfloat16 chunks and what only a GPU's branch computes.

    The fused functions stay as they are on a CPU, where compiling each of them takes a second.
    """
    monkeypatch.setattr("mlx_hla.ops.places.on_gpu", lambda: True)
    monkeypatch.setattr("mlx_hla.ops.primitive.on_gpu", lambda: True)
    monkeypatch.setattr("mlx_hla.ops.places.WIDTH_GPU", width)
    monkeypatch.setattr("mlx_hla.ops.scan.GROUP_CPU", 2)
