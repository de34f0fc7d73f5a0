"""The parent's side of the child process: launches have a time limit, a crash is an error like any other."""

import atexit
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from . import build
from .errors import MetalError, MetalTimeout


class Child:
    """A worker process, started when first needed and again after a crash."""

    def __init__(self):
        self.process = None
        self.owner = None

    def _start(self):
        self.words = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-I", str(Path(__file__).with_name("worker.py")), str(build.runtime())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.words,
        )  # fmt: skip
        self.owner = os.getpid()

    def stop(self):
        if self.process is not None and self.owner == os.getpid():
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()
            self.words.close()
        self.process = None

    def _last_words(self):
        """What the worker's signal handler, or Python, wrote before it ended; and the place in the source."""
        self.process.wait()
        self.words.seek(0)
        text = self.words.read().decode(errors="replace").strip()
        text, _, site = text.rpartition("\n@") if "\n@" in text else (text, "", "0")
        return text.split("\n")[-1] or f"exit status {self.process.returncode}", int(site)

    def _read(self, n, deadline):
        out = bytearray()
        fd = self.process.stdout.fileno()
        while len(out) < n:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([fd], [], [], left)[0]:
                self.process.send_signal(signal.SIGTERM)  # its handler says where it was
                try:
                    self.process.wait(2)
                except subprocess.TimeoutExpired:
                    self.process.kill()
                raise TimeoutError
            chunk = os.read(fd, min(n - len(out), 1 << 20))
            if not chunk:
                raise EOFError
            out += chunk
        return bytes(out)

    def launch(self, job, limit):
        """Run one job; returns (reply, None) or (None, (exception, site))."""
        if self.process is None or self.owner != os.getpid():
            self._start()
        data = pickle.dumps(job, protocol=5)
        try:
            self.process.stdin.write(struct.pack("<Q", len(data)) + data)
            self.process.stdin.flush()
            deadline = time.monotonic() + limit
            size = struct.unpack("<Q", self._read(8, deadline))[0]
            return pickle.loads(self._read(size, deadline + limit)), None
        except TimeoutError:
            words, site = self._last_words()
            error = MetalTimeout(f"the kernel did not finish in {limit:g} s: {words}")
        except (EOFError, BrokenPipeError):
            words, site = self._last_words()
            error = MetalError(f"the kernel killed its process: {words}")
        self.stop()
        return None, (error, site)


CHILD = Child()
atexit.register(CHILD.stop)
