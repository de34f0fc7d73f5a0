"""Patience with the other ranks: a process that hears nothing of them for too long ends, and says why.

MLX tells of a rank whose process has ended. It says nothing of one that is frozen, unreachable or never came,
and waits for it in calls that let no other Python code run, signal handlers included. So the clock is kept by
a small process beside: it is told the line to say in time, and says it and kills the waiting process when
nothing else comes for so many seconds. What is on the disk is whole at any moment.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import subprocess
import sys
import time

SECONDS = 600.0  # a rank may compile or read a large corpus while the others wait
VARIABLE = "MLX_HLA_PATIENCE"


def seconds_of(text: str | None) -> float:
    """What the environment asks for, or an error in words."""
    from mlx_hla.errors import InputError  # not at the top: as a script this file has no package around it

    try:
        value = SECONDS if not text else float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1e9:
        raise InputError(
            f"the environment variable {VARIABLE} must be seconds above 0, got {ascii(text)[:60]}"
        )
    return value


class Patience:
    """The clock of this process; nothing runs until `start`."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self.seconds, self.line = SECONDS, ""

    def start(self, seconds: float) -> None:
        self.seconds = seconds
        if self._process is None:
            command = [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(seconds)]
            # In a session of its own: Ctrl-C is for those that work.
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def expect(self, line: str) -> None:
        """Start the clock anew: `line` is what to say should it run out; "" lets it rest."""
        self.line = line
        if self._process is None or self._process.stdin is None:
            return
        with contextlib.suppress(OSError):  # a clock that somebody killed is none
            self._process.stdin.write(line.replace("\n", " ").encode(errors="replace")[:2000] + b"\n")
            self._process.stdin.flush()


PATIENCE = Patience()


def main(parent: int, seconds: float) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    line, rest, end = b"", b"", 0.0
    while True:
        ready, _, _ = select.select([0], [], [], max(0.0, end - time.monotonic()) if line else None)
        if not ready:
            os.write(2, b"mlx-hla: error: " + line + b"\n")
            os.kill(parent, signal.SIGKILL)  # it may be where it hears nothing else
            return
        data = os.read(0, 1 << 16)
        if not data:
            return  # the process that it kept the time for has ended
        *lines, rest = (rest + data).split(b"\n")
        if lines:
            line, end = lines[-1], time.monotonic() + seconds


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
