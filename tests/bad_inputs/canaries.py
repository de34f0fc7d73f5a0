"""Answers that must be called wrong: what the worker and its watch are tested by."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

from .case import ACCEPTED, Case, Ended

ERROR = "mlx-hla: error: "


def _raise(error: Exception):
    def run(place):
        raise error

    return run


def _eat(place):
    data = bytearray(1 << 29)
    data[:: os.sysconf("SC_PAGE_SIZE")] = b"x" * len(data[:: os.sysconf("SC_PAGE_SIZE")])
    raise ValueError("[hla2] it is all eaten up")


# What the verdict has to speak of, and what the case does.
CANARIES = {
    "hang": ("a hang", lambda place: time.sleep(600)),
    "crash": ("a crash: the process ended with -11", lambda place: os.kill(os.getpid(), signal.SIGSEGV)),
    "exit": ("a crash: the process ended with 3", lambda place: os._exit(3)),
    "memory": ("GB of memory", _eat),
    "TypeError": ("a bare TypeError", _raise(TypeError("'int' object is not iterable"))),
    "internal": ("a bare TypeError", _raise(TypeError("canonical() got an unexpected keyword argument 'x'"))),
    "AttributeError": ("a bare AttributeError", _raise(AttributeError("[hla2] has no attribute"))),
    "KeyError": ("a bare KeyError", _raise(KeyError("dims"))),
    "IndexError": ("a bare IndexError", _raise(IndexError("list index out of range"))),
    "OverflowError": ("a bare OverflowError", _raise(OverflowError("int too large"))),
    "MemoryError": ("a bare MemoryError", _raise(MemoryError())),
    "of-mlx": ("a bare ValueError", _raise(ValueError("[matmul] Last dimension must match"))),
    "lines": ("several lines", _raise(ValueError("[hla2] k must be\n[B, T], got an array"))),
    "silent": ("accepted", lambda place: 3),
    "refused": ("refused", _raise(ValueError("[hla2] k must be [B, T], got (3,)"))),
    "traceback": ("a traceback", lambda place: Ended(1, "", "Traceback (most recent call last):\n")),
    "no-word": ("no single line", lambda place: Ended(1, "", "")),
    "two-words": ("no single line", lambda place: Ended(1, "", 2 * f"{ERROR}the prompt is empty\n")),
    "bare-word": ("a bare status 1", lambda place: Ended(1, "", f"{ERROR}KeyError: 'dims' is not there\n")),
    "killed": ("an odd end", lambda place: Ended(137, "", "")),
    "both": ("an error with status 0", lambda place: Ended(0, "", f"{ERROR}the prompt is empty\n")),
}
# Answers that are as they should be.
GOOD = {
    "error": _raise(ValueError("[hla2] k must be [B, T], got (3,)")),
    "option": _raise(TypeError("[hla2] has no option 'sclae'; it takes scale")),
    "signature": _raise(TypeError("hla2() missing 1 required positional argument: 'v'")),
    "line": lambda place: Ended(1, "", f"{ERROR}the prompt is empty\n"),
}


def cases() -> Iterator[Case]:
    for name, (_, run) in CANARIES.items():
        yield Case(f"canary:{name}", run, ACCEPTED if name == "refused" else "refused")
    for name, run in GOOD.items():
        yield Case(f"canary:good-{name}", run)
