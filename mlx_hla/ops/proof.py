"""Whether the kernels are to be trusted on this machine: tried once, before they are first taken.

A compiler, a GPU or a system that nobody tried can break a kernel, or make it slower than the plain ops. So
before `backend=None` takes kernels for the first time, the operator that is asked for is run by both on a few
small shapes, in the dtype and width that are asked for: a sequence forward and backward, or a step. If a
kernel does not compile, differs or is slower, MLX ops serve in its place, and one warning says so. The
verdict is kept for the machine, see `verdicts`. A process that dies meanwhile leaves word, and nobody tries
again. What is measured here goes before the rule `kernels.worthwhile`, which was reasoned from counts.

MLX_HLA_PROOF=0: kernels are taken unproved, by that rule. backend="metal" and "cuda" never ask.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import platform
import threading
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from mlx_hla import kernels, verdicts
from mlx_hla.errors import InputError
from mlx_hla.kernels.source import folder
from mlx_hla.verdicts import Verdict

from .cases import Case, Shape, compare, times
from .checks import Call
from .on_kernels import run_dtype
from .operator import Operator, choices, find

WIDTHS = (64, 128)  # a verdict is for heads up to one of these widths
SLOWER = 1.1  # of the ops' time; below that, noise decides
_lock = threading.Lock()
_known: dict[Subject, Verdict] = {}


class Subject(NamedTuple):
    """What a verdict is about."""

    family: str  # an operator's label
    kind: str  # "sequence" or "step"
    dtype: str
    width: int  # of WIDTHS

    def __str__(self) -> str:
        return f"{self.family} {self.kind} {self.dtype} D{self.width}"


def trusted(operator: Operator, call: Call) -> bool:
    """Whether the kernels serve this call well here, which is found out if nobody knows."""
    return verdict_of(subject_of(operator, call)).trusted


def asked_for() -> bool:
    """Whether kernels are to be proved before they are taken."""
    wish = os.environ.get("MLX_HLA_PROOF") or "1"
    if wish not in ("0", "1"):
        raise InputError(f"the environment variable MLX_HLA_PROOF must be 0, 1 or unset, got {wish[:60]!r}")
    return wish == "1"


def subject_of(operator: Operator, call: Call) -> Subject:
    # Variants and higher orders are passes of first order, as those of a label that stands for them.
    family = operator.label if operator.variant is None and operator.label in choices() else "first"
    dtype = str(run_dtype(operator, call) if call.q.ndim == 4 else call.q.dtype).removeprefix("mlx.core.")
    width = next(w for w in WIDTHS if max(call.dims.D, call.dims.Dv) <= w)
    return Subject(family, "step" if call.q.ndim == 3 else "sequence", dtype, width)


def subjects() -> list[Subject]:
    """All that `trusted` may ask about, but for float16."""
    return [
        Subject(family, kind, dtype, width)
        for family in choices()
        for kind in ("sequence", "step")
        if kind == "sequence" or kernels.steps(find(family).family, 1)
        for dtype in ("float32", "bfloat16")
        for width in WIDTHS
    ]


def verdict_of(subject: Subject, renew: bool = False, warn: bool = True) -> Verdict:
    """What is known of the kernels here, or found out now."""
    with _lock:
        if not renew and (known := _known.get(subject)) is not None:
            return known
        kept = None if renew else verdicts.read(machine()).get(str(subject))
        if kept is not None and kept.pid is None:
            _known[subject] = kept
            return kept
        if kept is not None and not _under_way(kept):
            verdict = kept._replace(why="the process that tried them first did not live to tell", pid=None)
            verdicts.keep(machine(), {str(subject): verdict})
        else:
            verdict = _find_out(subject)
        _known[subject] = verdict
    if warn and not verdict.trusted:
        warnings.warn(in_words(subject, verdict), RuntimeWarning, stacklevel=2)
    return verdict


def in_words(subject: Subject, verdict: Verdict) -> str:
    what = "a step" if subject.kind == "step" else "sequences"
    return (
        f"mlx-hla's {kernels.gpu.language().title} kernels of {subject.family} for {what} in "
        f"{subject.dtype}, heads up to {subject.width}, are not used on this machine ({_chip()}): "
        f"{verdict.why}. Plain MLX ops are. "
        "Please report it with the table of `mlx-hla selftest`, which also tries again; "
        "MLX_HLA_BACKEND=mlx avoids kernels without asking"
    )


def _find_out(subject: Subject) -> Verdict:
    start, name = time.perf_counter(), str(subject)
    # Word for the next process, in case this one dies.
    verdicts.keep(machine(), {name: Verdict(False, "it was being tried", pid=os.getpid())})
    try:
        found = prove(subject)
    except BaseException:  # Ctrl-C, or a fault of ours: nothing was found out
        verdicts.keep(machine(), {name: None})
        raise
    found = found._replace(seconds=round(time.perf_counter() - start, 3))
    verdicts.keep(machine(), {name: found})
    return found


def prove(subject: Subject) -> Verdict:
    """Compare the kernels with the ops on a few cases, then time both."""
    error = allowed = 0.0
    for case in cases_of(subject):
        c = compare(case)
        if not c.passed:
            size = f"error {c.error:.1e}, allowed {c.tolerance:.1e}"
            why = f"{case.kernel} differs on {case.shape} ({c.worst}: {size})"
            if ":" in c.worst:  # no result has such a name: it is what was raised
                why = f"{case.kernel} does not run ({c.worst})"
            return Verdict(False, why, None if math.isnan(c.error) else c.error, c.tolerance)
        if c.error > error:
            error, allowed = c.error, c.tolerance
    spent = [times(case, 3) for case in timed(subject)]
    kernel_ms, ops_ms = (round(sum(each), 4) for each in zip(*spent, strict=True))
    if kernel_ms > SLOWER * ops_ms:
        why = f"they are slower ({kernel_ms:.3g} ms, the ops {ops_ms:.3g})"
        return Verdict(False, why, error, allowed, kernel_ms, ops_ms)
    return Verdict(True, "", error, allowed, kernel_ms, ops_ms)


def cases_of(subject: Subject) -> list[Case]:
    """Small ones, with shared heads, odd widths, a rest of a chunk and a decay of zero."""
    family, kind, dtype, width = subject
    odd = (40, 24) if width == 64 else (104, 72)
    if kind == "step":
        shapes = [Shape(2, 1, 4, 2, *odd), Shape(1, 1, 8, 8, width, width)]
        return [Case(family, "step", dtype, shape) for shape in shapes]
    shapes = [Shape(2, 70, 4, 2, *odd), Shape(1, 257, 2, 2, width, width)]
    return [Case(family, part, dtype, shape) for shape in shapes for part in ("forward", "backward")]


def timed(subject: Subject) -> list[Case]:
    """What the kernels and the ops race on: a step of eight heads, or a thousand tokens there and back."""
    family, kind, dtype, width = subject
    if kind == "step":
        return [Case(family, "step", dtype, Shape(1, 1, 8, 8, width, width))]
    return [Case(family, part, dtype, Shape(1, 1024, 8, 8, width, width)) for part in ("forward", "backward")]


# ---- the machine, and processes that died


def _under_way(kept: Verdict) -> bool:
    """Whether another process is finding out just now: then this one finds out for itself."""
    if kept.pid is None or kept.pid == os.getpid():
        return False
    try:
        os.kill(kept.pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # it is there, and another user's
    return True


def _chip() -> str:
    return str(mx.device_info().get("device_name", "an unknown device"))


@functools.cache
def machine() -> str:
    """What a verdict holds for: the device, the system, MLX's version, and these very kernels."""
    sources = hashlib.sha256()
    files = [*folder().glob("*.metal"), *folder().glob("*.cuh"), *Path(kernels.__file__).parent.glob("*.py")]
    for path in sorted(files):
        sources.update(path.read_bytes())
    system = f"macOS {platform.mac_ver()[0]}" if platform.mac_ver()[0] else platform.platform(terse=True)
    version = mx.__version__  # type: ignore[attr-defined]
    return f"{_chip()}, {system}, MLX {version}, kernels {sources.hexdigest()[:12]}"
