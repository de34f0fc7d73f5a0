"""The process that a command runs in: its standard streams and its BLAS."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import warnings
from pathlib import Path

OPENBLAS = ("libopenblas.so.0", "libopenblasp.so.0", "libopenblaso.so.0")


def open_standard_streams() -> None:
    """Where stdin, stdout or stderr was closed, the next file would get its number, and what is printed."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            if getattr(sys, name) is None and number:
                setattr(sys, name, os.fdopen(number, "w"))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character is no error


def warn_in_a_line() -> None:
    """Show this package's warnings from now on as its commands show errors."""
    usual = warnings.showwarning

    def show(message, category, filename, lineno, file=None, line=None):
        if str(message).startswith("mlx-hla"):
            sys.stderr.write(f"mlx-hla: warning: {' '.join(str(message).split())}\n")
        else:
            usual(message, category, filename, lineno, file, line)

    warnings.showwarning = show


def give_up_stdout() -> None:
    """Python would complain once more when it closes a stdout that takes nothing."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def prefer_openblas() -> bool:
    """Let the MLX that is imported later use the system's OpenBLAS, if there is one.

    MLX's Linux wheels bring the reference BLAS, whose products take some 30 times as long. What is loaded for
    all before MLX answers to the same names first, as with LD_PRELOAD. MLX_HLA_OPENBLAS=0 turns this off.
    """
    if sys.platform != "linux" or "mlx.core" in sys.modules or os.environ.get("MLX_HLA_OPENBLAS") == "0":
        return False
    for name in OPENBLAS:
        with contextlib.suppress(OSError):
            if hasattr(ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL), "cblas_sgemm"):
                return True
    return False


def hint_at_openblas() -> None:
    """On a terminal, say what would make long work on a Linux CPU several times as fast."""
    if sys.platform != "linux" or not sys.stderr.isatty():
        return
    import mlx.core as mx

    loaded = Path("/proc/self/maps").read_text(errors="replace")
    if mx.default_device() == mx.cpu and "openblas" not in loaded and "libmkl" not in loaded:
        sys.stderr.write(
            "mlx-hla: hint: with OpenBLAS, long prompts and training are several times as fast here: "
            "apt-get install libopenblas0-pthread\n"
        )
