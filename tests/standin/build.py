"""The tool chain: clang and lld out of the PyPI package `ziglang`, and a cache of what they made.

Everything lands in one folder of the machine's temporary directory (or $MLX_HLA_STANDIN_CACHE), under
names that hash what it was made from, so a second run compiles nothing and several processes may share it.
"""

import hashlib
import importlib.util
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from . import ir
from .errors import MetalCompileError

HERE = Path(__file__).parent

FRONT = shlex.split(
    "-x cl -cl-std=clc++2021 -cl-no-stdinc --target=x86_64-linux-gnu -march=x86-64-v3 -fPIC "
    "-Xclang -cl-ext=-all,+cl_khr_fp16,+__opencl_c_generic_address_space -Xclang -ffake-address-space-map "
    "-Xclang -fno-builtin -Xclang -fnative-half-arguments-and-returns -O1 -Xclang -disable-llvm-passes "
    "-ffp-contract=off -fno-math-errno -fno-strict-aliasing -Xclang -fbfloat16-excess-precision=none "
    "-Xclang -ffloat16-excess-precision=none -gline-tables-only -gcolumn-info -fno-discard-value-names "
    "-ferror-limit=8 -Wno-unknown-attributes -Wimplicit-float-conversion"
)
# The checked mode: private variables start as NaN patterns; array bounds and integer divisions are guarded.
# Without strict-flex-arrays clang takes an array that ends a struct, as a tile's fragments do, for one of any
# length.
WATCHED = shlex.split(
    "-ftrivial-auto-var-init=pattern -fsanitize=array-bounds,integer-divide-by-zero -fstrict-flex-arrays=3 "
    "-fsanitize-trap=all -fno-sanitize-merge"
)
BACK = [
    "-x",
    "ir",
    "--target=x86_64-linux-gnu",
    "-fPIC",
    "-Wno-override-module",
    "-fno-unroll-loops",
    "-fno-vectorize",
    "-fno-slp-vectorize",
]
RUNTIME = shlex.split(
    "-x c++ -std=c++17 -target x86_64-linux-gnu.2.17 -O2 -march=x86_64_v3 -fPIC -fno-exceptions -fno-rtti "
    "-fno-sanitize=undefined -fno-math-errno -fvisibility=hidden -Wall -Wextra -Werror"
)


def why_not():
    """Why the stand-in cannot run here, in words; None if it can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "the stand-in runs on x86-64 Linux only"
    if importlib.util.find_spec("ziglang") is None:
        return "the PyPI package ziglang is missing (pip install 'mlx-hla[dev]')"
    with open("/proc/cpuinfo") as f:
        if "avx2" not in f.read():
            return "the stand-in needs a CPU with AVX2"
    return None


@cache
def zig():
    if reason := why_not():
        raise RuntimeError(f"[standin] {reason}")
    return str(Path(importlib.util.find_spec("ziglang").origin).parent / "zig")


@cache
def folder():
    path = os.environ.get("MLX_HLA_STANDIN_CACHE") or os.path.join(tempfile.gettempdir(), "mlx-hla-standin")
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    return path


@cache
def _own_hash():
    """Changes with anything here that shapes what is compiled."""
    h = hashlib.sha256()
    for path in sorted([*HERE.glob("include/*.h"), *HERE.glob("runtime/*"), *HERE.glob("*.py")]):
        h.update(path.read_bytes())
    h.update(f"{zig()} {HERE}".encode())  # the precompiled prelude remembers paths
    return h.hexdigest()


def _run(*command):
    done = subprocess.run([zig(), *command], capture_output=True, text=True)
    if done.returncode:
        raise MetalCompileError(done.stderr.strip() or f"zig {command[0]} failed ({done.returncode})")
    return done.stderr


def _digest(*parts):
    return hashlib.sha256("\0".join([_own_hash(), *parts]).encode()).hexdigest()[:24]


@cache
def runtime():
    """The runtime as a shared library."""
    target = folder() / f"runtime-{_digest()}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=folder()) as work:
            objects = []
            for source in sorted(HERE.glob("runtime/*.cpp")):
                objects.append(os.path.join(work, source.stem + ".o"))
                _run("cc", *RUNTIME, "-c", str(source), "-o", objects[-1])
            _link(objects, target, work)
    return target


def _link(objects, target, work):
    made = os.path.join(work, "linked.so")
    _run("ld.lld", "-shared", *objects, "-o", made)
    os.replace(made, target)  # whoever comes second overwrites the same bytes


@cache
def _prelude(flags):
    """The prelude, parsed once."""
    target = folder() / f"prelude-{_digest(*flags)}.pch"
    if not target.exists():
        made = f"{target}.{os.getpid()}"
        header = str(HERE / "include" / "msl_prelude.h")
        _run(
            "clang",
            *flags,
            "-Wno-pragma-once-outside-header",
            "-c",
            "-Xclang",
            "-emit-pch",
            "-Xclang",
            "-fno-pch-timestamp",
            header,
            "-o",
            made,
        )
        os.replace(made, target)
    return target


def _front_flags(checked):
    return tuple(FRONT + (WATCHED if checked else []))


def compile_kernel(program, checked):
    """Compile a Program to a shared library; returns its path."""
    target = folder() / f"{_digest(program.text, str(checked))}.so"
    if target.exists():
        return target
    flags = _front_flags(checked)
    with tempfile.TemporaryDirectory(dir=folder()) as work:
        source, text, made = (os.path.join(work, n) for n in ("kernel.cl", "kernel.ll", "kernel.o"))
        Path(source).write_text(program.text)
        notes = _run(
            "clang", *flags, "-include-pch", str(_prelude(flags)), "-S", "-emit-llvm", source, "-o", text
        )
        _refuse_bfloat_conversions(notes)
        code = Path(text).read_text()
        ir.check(code)
        if checked:
            code = ir.instrument(code)
        Path(text).write_text(ir.erase_address_spaces(code))
        _run("clang", *BACK, "-O1" if checked else "-O2", "-c", text, "-o", made)
        target.with_suffix(".metal").write_text(program.metal)
        _link([made], target, work)
    return target


def _refuse_bfloat_conversions(notes):
    """Metal converts float to half silently but float to bfloat only when told to; clang merely warns."""
    for line in notes.split("\n"):
        if (
            line.startswith("kernel.metal:")
            and "implicit conversion" in line
            and "'bfloat" in line.split(" to ")[-1]
        ):
            raise MetalCompileError(f"{line}\nMetal has no implicit conversion to bfloat")
