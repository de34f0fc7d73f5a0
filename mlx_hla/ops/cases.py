"""One operator run by the kernels and by the plain MLX ops on the same inputs: what is tested of kernels.

A case is one operator, what is run of it, dtype and shape. Its results (outputs and states, or each gradient)
are compared in the relative Frobenius norm, each on its own; the largest error counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_hla import kernels
from mlx_hla.transforms import leaves

from . import on_kernels
from .checks import Dims, canonical, canonical_step
from .operator import Held, Operator, find
from .places import Sequence as SequenceOps
from .places import Token

KINDS = ("forward", "backward", "step", "packed")
DTYPES = ("float32", "float16", "bfloat16")

# Errors that always pass, and that never do. In half precision the first is two units of roundoff: results
# are rounded, and so are K̃ and the parts of a gradient between launches. float32 has room for a GPU's fast
# exp and log and for sums of thousands.
LEAST = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 8e-3}
MOST = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Shape:
    B: int
    T: int
    Hq: int
    Hkv: int
    D: int
    DV: int

    def __str__(self) -> str:
        heads = f"H{self.Hq}" if self.Hq == self.Hkv else f"H{self.Hq}x{self.Hkv}"
        dims = f"D{self.D}" if self.D == self.DV else f"D{self.D}x{self.DV}"
        return f"B{self.B}-T{self.T}-{heads}-{dims}"


@dataclass(frozen=True)
class Case:
    family: str  # an operator's label
    kind: str  # one of KINDS; packed is a step with the upper triangle of S
    dtype: str
    shape: Shape

    @property
    def kernel(self) -> str:
        return f"{self.family} {self.kind}" + " step" * (self.kind == "packed")

    @property
    def operator(self) -> Operator:
        return find(self.family)

    @property
    def sequence(self) -> bool:
        return self.kind in ("forward", "backward")


def inputs(case: Case) -> tuple[list[mx.array], list[mx.array]]:
    """(q, k, v, decay and the state's arrays; the gradients that come in), the same at every run."""
    s, rng = case.shape, np.random.default_rng(0)

    def normal(*shape, dtype="float32"):
        return mx.array(rng.normal(size=shape), getattr(mx, dtype))

    widths = ((s.Hq, s.D), (s.Hkv, s.D), (s.Hkv, s.DV))
    arrays = [normal(s.B, s.T, *width, dtype=case.dtype) for width in widths]
    g = rng.uniform(0.9, 1, (s.B, s.T, s.Hkv))
    g[:, s.T // 3] = 0 if s.T > 1 else 0.9  # a reset: the state starts anew there
    state = []
    for slot in case.operator.slots:
        x = normal(*slot.shape(Dims(s.B, s.Hq, s.Hkv, s.D, s.DV)))
        x = x + x.swapaxes(2, 3) if slot.symmetric else 1 + mx.abs(x) if slot.counts else x
        state.append(x)
    given = [normal(s.B, s.T, s.Hq, s.DV, dtype=case.dtype), *(normal(*x.shape) for x in state)]
    return [*arrays, mx.array(g, mx.float32), *state], given


Run = Callable[..., list[mx.array]]


def state_from(operator: Operator, arrays: Sequence, kind: type | None = None):
    """The operator's state of its slots' arrays; kind: in a class of the same fields."""
    held = zip((slot.key for slot in operator.slots), map(Held, arrays), strict=True)
    state = operator.state_of(dict(held))
    return state if kind is None else kind(*state)


def through(case: Case, name: str) -> Run:
    """The case on the "kernels" or on plain "mlx" ops, whatever `backend` would choose."""
    operator = case.operator
    scale, launched = case.shape.D**-0.5, name == "kernels"

    def sequence(q, k, v, g, *state):
        call = canonical(operator.name, q, k, v, operator.options, decay=g, scale=scale)
        place = on_kernels.KernelSequence if launched else SequenceOps
        o, after = place(operator, call, state_from(operator, state)).run()
        return [o, *leaves(after)]

    def step(q, k, v, g, *state):
        token = (x[:, 0] for x in (q, k, v))
        call = canonical_step(operator.name, *token, operator.options, decay=g[:, 0], scale=scale)
        start = state_from(operator, state)
        if not launched:
            o, after = Token(operator, call, start).run()
        elif case.kind == "packed":
            o, after = on_kernels.step(operator, call, start, packed=True)
        else:
            o, after = on_kernels.one_token(operator, call, start)
        return [o[:, None], *leaves(after)]

    return sequence if case.sequence else step


def names_of(case: Case) -> list[str]:
    states = [slot.key for slot in case.operator.slots]
    return [f"d{x}" for x in ("q", "k", "v", "g", *states)] if case.kind == "backward" else ["o", *states]


def with_gradients(case: Case, run: Run, given) -> Run:
    if case.kind != "backward":
        return run
    return lambda *arrays: mx.vjp(run, list(arrays), given)[1]


def error_of(got: Sequence[mx.array], want: Sequence[np.ndarray], names: Sequence[str]) -> tuple[float, str]:
    """(largest relative error, whose it is)."""
    worst = (-1.0, "")
    for x, y, name in zip(got, want, names, strict=True):
        if tuple(x.shape) != y.shape:
            raise ValueError(f"{name} is {tuple(x.shape)}, expected {y.shape}")
        difference = np.array(x.astype(mx.float32), np.float64) - y
        error = float(np.linalg.norm(difference) / (np.linalg.norm(y) or 1.0))
        if not error <= worst[0]:  # NaN is the largest
            worst = (error, name)
        if np.isnan(error):
            break
    return worst


def milliseconds(run: Run, arrays, repeats: int, queue: int) -> float:
    times = []
    for _ in range(repeats):
        mx.synchronize()
        start = time.perf_counter()
        mx.eval([run(*arrays) for _ in range(queue)])
        mx.synchronize()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times) / queue


class Comparison(NamedTuple):
    """worst: the result with the largest error, or what was raised; then error is NaN."""

    passed: bool
    error: float
    tolerance: float
    ops_error: float
    worst: str


def compare(case: Case, want: Sequence[np.ndarray] | None = None) -> Comparison:
    """The kernels' results against `want`, by default the ops path's in float32 on the CPU.

    A case passes if nothing is NaN and its error is at most four times that of the ops path in the case's
    dtype, within limits: an error that is small for the dtype always passes, a large one never does, whatever
    the ops path has.
    """
    arrays, given = inputs(case)
    if want is None:
        with mx.stream(mx.cpu):  # a GPU's own products of float32 may round to TF32, which is no measure
            wide = [x.astype(mx.float32) for x in arrays]
            exact = with_gradients(case, through(case, "mlx"), [x.astype(mx.float32) for x in given])
            want = [np.array(x, np.float64) for x in exact(*wide)]
    ops = with_gradients(case, through(case, "mlx"), given)
    ops_error, _ = error_of(ops(*arrays), want, names_of(case))
    tolerance = min(max(4 * ops_error, LEAST[case.dtype]), MOST[case.dtype])
    kernel = with_gradients(case, through(case, "kernels"), given)
    if case.kind == "packed":
        arrays[4] = kernels.pack(arrays[4])
    try:
        got = kernel(*arrays)
        mx.eval(got)
        if case.kind == "packed":
            got[1] = kernels.unpack(got[1])
        error, worst = error_of(got, want, names_of(case))
    except Exception as e:  # a kernel that cannot be built or run is a result: the others are still wanted
        what = f"{type(e).__name__}: {' '.join(str(e).split())}"
        return Comparison(False, float("nan"), tolerance, ops_error, what[:300])
    return Comparison(error <= tolerance, error, tolerance, ops_error, worst)


def times(case: Case, repeats: int) -> tuple[float, float]:
    """Milliseconds of (kernels, ops), medians with warm kernels."""
    arrays, given = inputs(case)
    packed = list(arrays)
    if case.kind == "packed":
        packed[4] = kernels.pack(packed[4])
    queue = 20 if case.shape.T == 1 and repeats > 1 else 1
    runs = ((with_gradients(case, through(case, name), given), name) for name in ("kernels", "mlx"))
    kernel_ms, ops_ms = (
        milliseconds(run, packed if name == "kernels" else arrays, repeats, queue) for run, name in runs
    )
    return kernel_ms, ops_ms
