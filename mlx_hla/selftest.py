"""`mlx-hla selftest`: every kernel on this machine's GPU, against float64 and against the plain MLX ops.

A case is one operator, what is run of it, dtype and shape. Its results (outputs and states, or each gradient)
are compared in the relative Frobenius norm, each on its own, the largest error counts:

- with the float64 reference on the same inputs; where that would take minutes, with the ops path in float32
  on the CPU;
- the ops path in the case's dtype takes the same measure.

A case passes if nothing is NaN and its error is at most four times the ops path's, within limits by dtype: an
error that is small for the dtype always passes, a large one never does, whatever the ops path has.
Times are medians with warm kernels; ratio is ops over kernel. Last, the verdicts by which `backend=None`
takes kernels on this machine are found anew and shown, see `ops.proof`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

import mlx_hla
from mlx_hla import kernels, reference
from mlx_hla.errors import InputError
from mlx_hla.ops import cases as cases_of
from mlx_hla.ops import proof
from mlx_hla.ops.cases import DTYPES, KINDS, Case, Shape
from mlx_hla.ops.operator import Operator, choices, find
from mlx_hla.verdicts import Verdict, cache_file

REFERENCE_WORK = 2**28  # tokens x heads x D x D above which float64 takes too long


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


def _in_float64(case: Case, arrays, given) -> list[np.ndarray]:
    """The case's results by the reference."""
    q, k, v, g, *state = (np.array(x.astype(mx.float32), np.float64) for x in arrays)
    operator, scale = case.operator, case.shape.D**-0.5
    kind = getattr(reference, operator.state.__name__)
    start = cases_of.state_from(operator, state, kind)
    if case.kind != "backward":
        serial = getattr(reference, f"serial_{operator.name}")
        o, last = serial(q, k, v, scale=scale, decay=g, initial_state=start)
        return [o, *(x for x in last if x is not None)]
    do, *dstate = (np.array(x.astype(mx.float32), np.float64) for x in given)
    vjp = getattr(reference, f"vjp_{operator.name}")
    d = vjp(q, k, v, g, start, do, cases_of.state_from(operator, dstate, kind), scale=scale)
    return [d["q"], d["k"], d["v"], d["decay"], *(x for x in d["initial_state"] if x is not None)]


def run_case(case: Case, repeats: int = 5) -> Result:
    s = case.shape
    exact = s.B * s.T * s.Hq * s.D * s.DV <= REFERENCE_WORK
    c = cases_of.compare(case, _in_float64(case, *cases_of.inputs(case)) if exact else None)
    kernel_ms = ops_ms = float("nan")
    if not math.isnan(c.error):
        kernel_ms, ops_ms = cases_of.times(case, repeats)
    return Result(case, c.passed, c.error, c.tolerance, c.ops_error, c.worst, kernel_ms, ops_ms)


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
    if kernels.gpu.here():
        return None
    if mx.metal.is_available() or mx.cuda.is_available():
        return f"MLX's default device here is not {' or '.join(device.chip for device in kernels.GPUS)}"
    return (
        "no GPU here; the kernels run on Apple and NVIDIA GPUs, and elsewhere the plain MLX ops serve every "
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


def verdict_row(subject: proof.Subject, v: Verdict) -> str:
    if v.trusted:
        return f"{subject}: taken, {v.kernel_ms:.3g} ms where the ops need {v.ops_ms:.3g}"
    return f"{subject}: not taken, {v.why}"


def run(args, cases: Sequence[Case] | None = None, subjects: Sequence[proof.Subject] | None = None) -> int:
    """Exit status: 0 if every case passes, 1 if one fails, 2 if there is no GPU."""
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
    found = {
        s: proof.verdict_of(s, renew=True, warn=False)
        for s in (proof.subjects() if subjects is None else subjects)
        if s.family in (args.family or choices()) and s.dtype in (args.dtype or DTYPES)
    }
    if args.json:
        about = {str(s): v._asdict() for s, v in found.items()}
        results_of = [r.as_dict() for r in results]
        print(json.dumps({**here, "failed": failed, "results": results_of, "verdicts": about}))
    else:
        print(f"{len(results) - failed} passed, {failed} failed")
        if found:
            least, wish = kernels.gpu.language().unasked_from, "backend=None"
            wish += f", from {least:,} tokens on, or MLX_HLA_BACKEND=cuda" if least > 1 else ""
            print(f"\nWhat {wish} takes here from now on ({cache_file()}):")
        for subject, verdict in found.items():
            print(verdict_row(subject, verdict))
    return int(failed > 0 or not results)
