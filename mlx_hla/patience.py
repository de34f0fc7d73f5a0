"""Patience with the other ranks: a process that hears nothing of them for too long ends, and says why.

MLX waits for ever for a rank that is frozen, unreachable or never came, in calls that let no other Python
code run, signal handlers included. Of a rank whose process has ended it may tell in an exception; as often
it writes lines to stderr, and waits in the next exchange or gives out what was in memory. So a small process
beside keeps the clock and reads what MLX writes. It is told the line to say in time; when nothing else
comes for so many seconds, or connections have ended and the process has not after a moment, it says the line
and kills the process. What is on the disk is whole at any moment.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time

SECONDS = 600.0  # a rank may compile or read a large corpus while the others wait
VARIABLE = "MLX_HLA_PATIENCE"
MOMENT = 2.0  # for a process to end by itself once MLX has lost a connection
# What MLX's ring writes, a dozen lines in a row, and the last of them.
NOISE = (b"[ring] Socket ", b"[ring] Sending to socket ", b"[ring] Receiving from socket ")
FAILED = b"[ring] Too many send/recv errors"


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
    """The clock of this process; without `start` it has none."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self.seconds, self.line = SECONDS, ""

    def start(self, seconds: float) -> None:
        """Begin, before MLX connects: from here on what is written to file 2 goes through the process beside.

        Python's own stderr goes where it went.
        """
        self.seconds = seconds
        if self._process is not None:
            return
        reader, writer = os.pipe()
        own = os.dup(2)
        command = [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(seconds), str(reader)]
        # In a session of its own: Ctrl-C is for those that work.
        options = {"stdin": subprocess.PIPE, "stderr": own, "pass_fds": (reader,), "start_new_session": True}
        self._process = subprocess.Popen(command, **options)  # type: ignore[call-overload]
        sys.stderr.flush()
        sys.stderr = os.fdopen(own, "w", buffering=1, errors="replace")
        os.dup2(writer, 2)
        os.close(reader)
        os.close(writer)

    def expect(self, line: str) -> None:
        """Start the clock anew: `line` is what to say should it run out; "" lets it rest."""
        self.line = line
        self._tell("+" + line)

    def on_loss(self, line: str) -> None:
        """What to say where a connection has ended and this process does not say it."""
        self._tell("!" + line)

    def end(self) -> None:
        """This process ends by itself: a launcher that terminates it must not be faster than its line."""
        if self._process is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _tell(self, line: str) -> None:
        if self._process is None or self._process.stdin is None:
            return
        with contextlib.suppress(OSError):  # a clock that somebody killed is none
            self._process.stdin.write(line.replace("\n", " ").encode(errors="replace")[:2000] + b"\n")
            self._process.stdin.flush()


PATIENCE = Patience()


def _split(data: bytes) -> tuple[list[bytes], bytes]:
    *lines, rest = data.split(b"\n")
    return lines, rest


def main(parent: int, seconds: float, written: int) -> None:
    """Keep the clock of `parent`, told on stdin, and pass on what it writes to the pipe `written`."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    due: dict[bytes, float] = {}  # lines to say, and when
    loss, told, heard, lost = b"another rank has ended", b"", b"", False
    open_ends = [0, written]
    while open_ends:
        wait = max(0.0, min(due.values()) - time.monotonic()) if due else None
        ready, _, _ = select.select(open_ends, [], [], wait)
        if not ready:
            os.write(2, b"mlx-hla: error: " + min(due, key=lambda line: due[line]) + b"\n")
            os.kill(parent, signal.SIGKILL)  # it may be where it hears nothing else
            return
        data = os.read(ready[0], 1 << 16)
        if not data:  # the process has ended, or will in a moment; what it wrote is there to the last
            open_ends.remove(ready[0])
            due = {}
        elif ready[0] == 0:
            lines, told = _split(told + data)
            for line in lines:
                if line[:1] == b"!":
                    loss = line[1:]
                elif not lost:
                    due = {line[1:]: time.monotonic() + seconds} if line[1:] else {}
        else:
            lines, heard = _split(heard + data)
            for line in lines:
                if line.startswith(FAILED) and not lost:
                    lost, due = True, {loss: time.monotonic() + MOMENT}
                elif not line.startswith((*NOISE, FAILED)):
                    os.write(2, line + b"\n")
    os.write(2, heard)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
