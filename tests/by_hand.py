"""Ranks started by hand, each with its own command: to differ, and to be killed."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from typing import NamedTuple

MLX_HLA = [sys.executable, "-m", "mlx_hla"]
LONG = 100  # seconds, on busy cores; what is under test takes a few


class Ended(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def error(self):
        """The one line that it said of what went wrong."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("mlx-hla: error: ")
        return lines[0].removeprefix("mlx-hla: error: ")


def free_ports(n):
    """n ports in a row, below those that systems give out, since `mlx.launch` counts up from the first."""
    while True:
        first = random.SystemRandom().randrange(20_000, 32_000)
        with contextlib.ExitStack() as held, contextlib.suppress(OSError):
            for port in range(first, first + n):
                held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return list(range(first, first + n))


def start(folder, commands, **env):
    """A process for each command, in order of rank; None: that rank never comes. They write to files."""
    hosts = folder / f"hosts-{time.monotonic_ns()}.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(len(commands))]))
    ranks = []
    for rank, command in enumerate(commands):
        if command is None:
            continue
        own = {
            **os.environ,
            "OPENBLAS_NUM_THREADS": "1",
            "MLX_RANK": str(rank),
            "MLX_HOSTFILE": str(hosts),
            **env,
        }
        said = [folder / f"{hosts.stem}.{rank}.{name}" for name in ("out", "err")]
        with said[0].open("w") as out, said[1].open("w") as err:
            ranks.append(subprocess.Popen(command, stdout=out, stderr=err, env=own))
        ranks[-1].said = said
    return ranks


def ended(process, timeout=LONG):
    """What a process did and said; it is killed if it has not ended in time."""
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise
    return Ended(process.returncode, *(path.read_text() for path in process.said))


def freeze(process):
    """Stop a rank, and the process beside that keeps its clock, as a machine that stands still would."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    frozen = [int(pid) for pid in found.stdout.split()] + [process.pid]
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    return frozen


def all_ended(processes, timeout=LONG):
    try:
        return [ended(p, timeout) for p in processes]
    finally:
        for p in processes:
            p.kill()


def until(there, processes, timeout=LONG):
    """Wait until `there()`; fail if the processes end before."""
    end = time.monotonic() + timeout
    while not there():
        assert all(p.poll() is None for p in processes), [ended(p) for p in processes if p.poll() is not None]
        assert time.monotonic() < end
        time.sleep(0.02)
