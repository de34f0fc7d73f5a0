"""The process that tries cases: names come on its stdin, a line of JSON for each goes back."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx

ROOM = 2 * 2**30  # bytes that a case may take beyond what the process has when it starts


class Place:
    """What a case finds: a folder of its own, good files to break, and a command line to call."""

    def __init__(self, root: Path):
        self.root = root
        self.path = root

    def fresh(self) -> None:
        self.path = self.root / uuid.uuid4().hex[:8]
        self.path.mkdir()

    def clear(self) -> None:
        for folder, _, _ in os.walk(self.path):
            with contextlib.suppress(OSError):
                os.chmod(folder, 0o700)
        shutil.rmtree(self.path, ignore_errors=True)

    def good(self, name: str) -> Path:
        """A good model, corpus, run or file, made at its first use; not to be changed."""
        from . import good

        path = self.root / "good" / name
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            begun = path.with_name(f".{uuid.uuid4().hex[:8]}")
            getattr(good, name)(self, begun)
            begun.rename(path)
        return path

    def copy(self, name: str) -> Path:
        """A copy of something good in the case's own folder."""
        source, target = self.good(name), self.path / name
        if source.is_dir():
            return Path(shutil.copytree(source, target, dirs_exist_ok=True))
        return Path(shutil.copyfile(source, target))

    def command(self, *argv, stdin: bytes | str | None = None, stdout: str | None = None):
        """Call the command line in this process, with files for its streams.

        stdin: bytes, or the path of what to open, by default nothing. stdout: a path to open, or "gone" for a
        pipe that nobody reads.
        """
        from mlx_hla import cli

        from .case import Ended

        with _streams(self.path, stdin, stdout) as read:
            try:
                status = cli.main([str(a) for a in argv])
            except SystemExit as e:
                status = e.code if isinstance(e.code, int) else 1
        return Ended(status, *read())

    def process(self, *argv, redirect: str = "", stdin: bytes = b"", environment: dict | None = None):
        """Call the command line as a process; redirect: words for the shell, such as `<&-`."""
        from .case import Ended

        line = ["sh", "-c", f'exec "$@" {redirect}', "sh", sys.executable, "-m", "mlx_hla", *argv]
        where = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **(environment or {})}
        done = subprocess.run(line, input=stdin, capture_output=True, env=where, cwd=self.path)
        return Ended(
            done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        )


@contextlib.contextmanager
def _streams(folder: Path, stdin: bytes | str | None, stdout: str | None) -> Iterator:
    """Files in the place of the three standard streams, in Python and below it; yields what reads them."""
    names = [folder / f".stream{i}" for i in range(3)]
    names[0].write_bytes(stdin if isinstance(stdin, bytes) else b"")
    new = [os.open(stdin if isinstance(stdin, str) else names[0], os.O_RDONLY)]
    if stdout == "gone":
        reader, writer = os.pipe()
        os.close(reader)
        new.append(writer)
    else:
        new.append(os.open(stdout or names[1], os.O_WRONLY | os.O_CREAT))
    new.append(os.open(names[2], os.O_WRONLY | os.O_CREAT))
    kept, objects = [os.dup(i) for i in range(3)], (sys.stdin, sys.stdout, sys.stderr)
    for i, number in enumerate(new):
        os.dup2(number, i)
        os.close(number)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(i, "rw"[i > 0], closefd=False) for i in range(3))

    def read() -> list[str]:
        return [n.read_bytes().decode(errors="replace") if n.exists() else "" for n in names[1:]]

    try:
        yield read
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        sys.stdin, sys.stdout, sys.stderr = objects
        for i, number in enumerate(kept):
            os.dup2(number, i)
            os.close(number)


def most_memory() -> int:
    """The largest memory that this process has had, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # where getrusage begins with what the process had that started this one
        peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if peak:
            return int(peak[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _limit() -> None:
    """Let an allocation beyond bounds fail, where the system can: better than a machine that swaps."""
    pages = Path("/proc/self/statm")
    if pages.exists() and mx.default_device() == mx.cpu:
        now = int(pages.read_text().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (now + 2 * ROOM, hard))


def main(root: Path) -> None:
    words = os.fdopen(os.dup(0), "r", encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a case prints is not an answer
    from . import all_cases, canaries
    from .case import verdict

    cases = {**all_cases(), **{case.name: case for case in canaries.cases()}}
    place = Place(root)
    for name in ("model", "state", "corpus", "run"):
        place.good(name)  # now: it takes longer than a case may
    _limit()
    start = most_memory()
    print("ready", file=answers, flush=True)
    for line in words:
        name = json.loads(line)
        place.fresh()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            wrong = verdict(cases[name], place)
        wrong = wrong and wrong.encode(errors="backslashreplace").decode()  # a name may be no text
        place.clear()
        gc.collect()
        mx.clear_cache()
        more = most_memory() - start
        print(json.dumps({"name": name, "wrong": wrong, "memory": more}), file=answers, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
