"""A worker that is watched: one that hangs, crashes or eats memory is ended, and another takes its place."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .worker import ROOM

SECONDS = 20.0  # that a case may take
START_SECONDS = 120.0  # that a worker may take to import everything, on a busy machine
TESTS = Path(__file__).resolve().parent.parent


class Watched:
    """Tries cases, each in the worker of the moment."""

    def __init__(self, root: Path, seconds: float = SECONDS, room: int = ROOM):
        self._root, self._seconds, self._room = root, seconds, room
        self._process: subprocess.Popen | None = None
        self._rest = b""

    def wrong(self, name: str) -> str | None:
        """What is wrong with the library's answer to a case, or None."""
        process = self._worker()
        assert process.stdin is not None
        process.stdin.write(json.dumps(name).encode() + b"\n")
        process.stdin.flush()
        line = self._line(self._seconds)
        if line is None:
            code = process.poll()
            words = self.close()
            if code is None:
                return f"a hang: no answer in {self._seconds:g} s; {words}"
            return f"a crash: the process ended with {code}; {words}"
        answer = json.loads(line)
        assert answer["name"] == name
        if answer["memory"] > self._room:
            self.close()  # its high-water mark would count against the next
            return f"{answer['memory'] / 2**30:.1f} GB of memory"
        return answer["wrong"]

    def _worker(self) -> subprocess.Popen:
        if self._process is None:
            self._rest = b""
            paths = [str(TESTS), *sys.path]
            self._words = tempfile.TemporaryFile()  # noqa: SIM115
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bad_inputs.worker", str(self._root)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._words,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(os.path.abspath(p) for p in paths if p)},
                cwd=self._root,  # where a word that is taken for a path may leave a file
                start_new_session=True,  # so that what a case starts ends with it
            )
            if self._line(START_SECONDS) != b"ready":
                raise RuntimeError(f"the worker did not start: {self.close()}")
        return self._process

    def _line(self, seconds: float) -> bytes | None:
        """The next line of the worker; None if it ends or takes too long."""
        assert self._process is not None
        assert self._process.stdout is not None
        number, end = self._process.stdout.fileno(), time.monotonic() + seconds
        while b"\n" not in self._rest:
            left = end - time.monotonic()
            if left <= 0 or not select.select([number], [], [], left)[0]:
                return None
            data = os.read(number, 1 << 16)
            if not data:
                self._process.wait(10)
                return None
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def close(self) -> str:
        """End the worker and whatever it started; returns its last words."""
        if self._process is None:
            return ""
        process, self._process = self._process, None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        with self._words as words:
            words.seek(max(0, words.seek(0, os.SEEK_END) - 300))
            return f"its last words: {words.read().decode(errors='replace')!r}"
