"""`mlx-hla selftest`: every Metal kernel on this machine, against float64 and against the plain MLX ops.

A case is one operator, what is run of it, dtype and shape. Its results (outputs and states, or each gradient)
are compared in the relative Frobenius norm, each on its own, the largest error counts:

- with the float64 reference on the same inputs; where that would take minutes, with the ops path in float32;
- the ops path in the case's dtype takes the same measure.

A case passes if nothing is NaN and its error is at most four times the ops path's, within limits by dtype: an
error that is small for the dtype always passes, a large one never does, whatever the ops path has.
Times are medians with warm kernels; ratio is ops over kernel.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

import mlx_hla
from mlx_hla import kernels, reference
from mlx_hla.errors import InputError
from mlx_hla.ops import backend, metal
from mlx_hla.ops.checks import Dims, canonical_step
from mlx_hla.ops.operator import Held, Operator, choices, find
from mlx_hla.transforms import leaves

KINDS = ("forward", "backward", "step", "packed")
DTYPES = ("float32", "float16", "bfloat16")

# Errors that always pass, and that never do. In half precision the first is two units of roundoff: results
# are rounded, and so are K̃ and the parts of a gradient between launches. float32 has room for a GPU's fast
# exp and log and for sums of thousands.
LEAST = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 8e-3}
MOST = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}

REFERENCE_WORK = 2**28  # tokens x heads x D x D above which float64 takes too long


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


@dataclass(frozen=True)
class Result:
    case: Case
    passed: bool
    error: float  # NaN where the kernel did not run
    tolerance: float
    ops_error: float
    worst: str  # the result with the largest error, or what was raised
    kernel_ms: float
    ops_ms: float

    def as_dict(self) -> dict:
        plain = dataclasses.asdict(self) | {"kernel": self.case.kernel, "dtype": self.case.dtype}
        del plain["case"]
        plain["shape"] = str(self.case.shape)
        return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in plain.items()}


# One chunk and a rest, with odd widths and shared heads; several blocks; two states that just fit the
# registers; heads too wide for that, in blocks; what a model of 16 heads runs.
SEQUENCES = (
    Shape(2, 70, 4, 2, 40, 24),
    Shape(1, 1100, 2, 2, 64, 64),
    Shape(1, 300, 2, 1, 96, 96),
    Shape(1, 600, 2, 2, 128, 128),
)
LONG = Shape(1, 4096, 16, 16, 64, 64)
STEPS = (Shape(2, 1, 4, 2, 40, 24), Shape(1, 1, 16, 16, 64, 64), Shape(8, 1, 16, 4, 128, 128))


def kinds(operator: Operator) -> Iterator[str]:
    """What there is to run of an operator; a packed step where a kernel steps a symmetric S."""
    symmetric = any(slot.symmetric for slot in operator.slots)
    yield from (k for k in KINDS if k != "packed" or (symmetric and kernels.steps(operator.family, 1)))


def all_cases(sequences=SEQUENCES, steps=STEPS, long=LONG) -> Iterator[Case]:
    for family in choices():
        for kind in kinds(find(family)):
            sequence = kind in ("forward", "backward")
            for shape in sequences if sequence else steps:
                yield from (Case(family, kind, dtype, shape) for dtype in DTYPES)
            if sequence and long:
                yield from (Case(family, kind, dtype, long) for dtype in ("float32", "bfloat16"))


# ---- one case


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


def _state(operator: Operator, arrays: Sequence, kind: type | None = None):
    """The operator's state of its slots' arrays; kind: in a class of the same fields."""
    held = zip((slot.key for slot in operator.slots), map(Held, arrays), strict=True)
    state = operator.state_of(dict(held))
    return state if kind is None else kind(*state)


def through(case: Case, name: str) -> Run:
    """The case on a backend."""
    operator = case.operator
    options = {"scale": case.shape.D**-0.5, "backend": name}

    def run(q, k, v, g, *state):
        if case.sequence:
            o, after = backend.sequence(operator, q, k, v, _state(operator, state), decay=g, **options)
            return [o, *leaves(after)]
        token = (x[:, 0] for x in (q, k, v))
        o, after = backend.step(operator, *token, _state(operator, state), decay=g[:, 0], **options)
        return [o[:, None], *leaves(after)]

    def packed(q, k, v, g, *state):
        token = (x[:, 0] for x in (q, k, v))
        call = canonical_step(operator.name, *token, operator.options, decay=g[:, 0], scale=options["scale"])
        o, after = metal.step(operator, call, _state(operator, state), packed=True)
        return [o[:, None], *leaves(after)]

    return packed if case.kind == "packed" and name == "metal" else run


def _in_float64(case: Case, arrays, given) -> list[np.ndarray]:
    """The case's results by the reference."""
    q, k, v, g, *state = (np.array(x.astype(mx.float32), np.float64) for x in arrays)
    operator, scale = case.operator, case.shape.D**-0.5
    kind = getattr(reference, operator.state.__name__)
    start = _state(operator, state, kind)
    if case.kind != "backward":
        serial = getattr(reference, f"serial_{operator.name}")
        o, last = serial(q, k, v, scale=scale, decay=g, initial_state=start)
        return [o, *(x for x in last if x is not None)]
    do, *dstate = (np.array(x.astype(mx.float32), np.float64) for x in given)
    vjp = getattr(reference, f"vjp_{operator.name}")
    d = vjp(q, k, v, g, start, do, _state(operator, dstate, kind), scale=scale)
    return [d["q"], d["k"], d["v"], d["decay"], *(x for x in d["initial_state"] if x is not None)]


def _names(case: Case) -> list[str]:
    states = [slot.key for slot in case.operator.slots]
    return [f"d{x}" for x in ("q", "k", "v", "g", *states)] if case.kind == "backward" else ["o", *states]


def _with_gradients(case: Case, run: Run, given) -> Run:
    if case.kind != "backward":
        return run
    return lambda *arrays: mx.vjp(run, list(arrays), given)[1]


def _error(got: Sequence[mx.array], want: Sequence[np.ndarray], names: Sequence[str]) -> tuple[float, str]:
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


def _milliseconds(run: Run, arrays, repeats: int, queue: int) -> float:
    times = []
    for _ in range(repeats):
        mx.synchronize()
        start = time.perf_counter()
        mx.eval([run(*arrays) for _ in range(queue)])
        mx.synchronize()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times) / queue


def run_case(case: Case, repeats: int = 5) -> Result:
    arrays, given = inputs(case)
    s = case.shape
    ops = _with_gradients(case, through(case, "mlx"), given)
    if s.B * s.T * s.Hq * s.D * s.DV <= REFERENCE_WORK:
        want = _in_float64(case, arrays, given)
    else:
        wide = [x.astype(mx.float32) for x in arrays]
        exact = _with_gradients(case, through(case, "mlx"), [x.astype(mx.float32) for x in given])
        want = [np.array(x, np.float64) for x in exact(*wide)]
    ops_error, _ = _error(ops(*arrays), want, _names(case))
    tolerance = min(max(4 * ops_error, LEAST[case.dtype]), MOST[case.dtype])
    fast_arrays = list(arrays)
    if case.kind == "packed":
        fast_arrays[4] = kernels.pack(fast_arrays[4])
    kernel = _with_gradients(case, through(case, "metal"), given)
    nan = float("nan")
    try:
        got = kernel(*fast_arrays)
        mx.eval(got)
        if case.kind == "packed":
            got[1] = kernels.unpack(got[1])
        error, worst = _error(got, want, _names(case))
    except Exception as e:  # a kernel that cannot be built or run is a result: the others are still wanted
        what = f"{type(e).__name__}: {' '.join(str(e).split())}"
        return Result(case, False, nan, tolerance, ops_error, what[:300], nan, nan)
    queue = 20 if s.T == 1 and repeats > 1 else 1
    times = [_milliseconds(f, x, repeats, queue) for f, x in ((kernel, fast_arrays), (ops, arrays))]
    return Result(case, error <= tolerance, error, tolerance, ops_error, worst, *times)


# ---- the command


def machine() -> dict[str, str]:
    """What the numbers were measured on."""
    system = f"macOS {platform.mac_ver()[0]}" if platform.mac_ver()[0] else platform.platform(terse=True)
    return {
        "chip": str(mx.device_info().get("device_name", "unknown")),
        "system": system,
        "mlx": mx.__version__,  # type: ignore[attr-defined]
        "mlx_hla": mlx_hla.__version__,
        "python": platform.python_version(),
    }


def why_not_here() -> str | None:
    """Why there is nothing to test, or None."""
    if kernels.metal_available():
        return None
    if mx.metal.is_available():
        return "no Metal device here; MLX's default device is the CPU in place of the GPU"
    return (
        "no Metal device here; the kernels run on Apple GPUs, and elsewhere the plain MLX ops serve every "
        "call. On Linux, `pytest tests/test_kernels*.py` in a checkout runs the kernels on a CPU stand-in"
    )


HEAD = ("kernel", "dtype", "shape", "error", "allowed", "ops error", "kernel ms", "ops ms", "ratio", "")
WIDTHS = (16, 8, 22, 8, 8, 9, 10, 10, 6, 4)


def _line(cells) -> str:
    return "  ".join(
        f"{c:<{w}}" if i < 3 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(cells, WIDTHS, strict=True))
    )


def row(r: Result) -> str:
    ratio = r.ops_ms / r.kernel_ms
    cells = [r.case.kernel, r.case.dtype, str(r.case.shape), f"{r.error:.1e}", f"{r.tolerance:.1e}"]
    cells += (f"{r.ops_error:.1e}", f"{r.kernel_ms:.3f}", f"{r.ops_ms:.3f}", f"{ratio:.2f}")
    line = _line((*cells, "pass" if r.passed else "FAIL"))
    return line if r.passed else f"{line}  ({r.worst})"


def add_arguments(parser) -> None:
    add = parser.add_argument
    add("--family", action="append", choices=choices(), help="only this operator; repeatable")
    add("--dtype", action="append", choices=DTYPES, help="only this dtype; repeatable")
    add("--repeats", type=int, default=5, help="timed runs of each kernel")
    add("--json", action="store_true", help="print one JSON object instead of the table")


def run(args, cases: Sequence[Case] | None = None) -> int:
    """Exit status: 0 if every case passes, 1 if one fails, 2 if there is no Metal device."""
    if args.repeats < 1:
        raise InputError(f"repeats must be at least 1, got {args.repeats}")
    if why := why_not_here():
        if args.json:
            print(json.dumps({"error": why}))
        sys.stderr.write(f"mlx-hla: error: {why}\n")
        return 2
    cases = [
        c
        for c in (all_cases() if cases is None else cases)
        if c.family in (args.family or choices()) and c.dtype in (args.dtype or DTYPES)
    ]
    here = machine()
    if not args.json:
        versions = f"MLX {here['mlx']}, mlx-hla {here['mlx_hla']}"
        print(f"{here['chip']}, {here['system']}, {versions}: {len(cases)} cases")
        print(_line(HEAD), flush=True)
    results = []
    for case in cases:
        results.append(run_case(case, args.repeats))
        if not args.json:
            print(row(results[-1]), flush=True)
    failed = sum(not r.passed for r in results)
    if args.json:
        print(json.dumps({**here, "failed": failed, "results": [r.as_dict() for r in results]}))
    else:
        print(f"{len(results) - failed} passed, {failed} failed")
    return int(failed > 0 or not results)
