"""What was found out about the kernels on this machine, in one small file, so that it is found out once.

The file, `kernels.json` in the user's cache folder, holds a table of verdicts for each machine: a device, a
system, a version of MLX, and the kernels as they were. What it cannot say or keep (no file,
no room, a file that is damaged) is as if it were not there: then verdicts last as long as the process.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

from mlx_hla.errors import InputError
from mlx_hla.files import read_bytes, write_atomic
from mlx_hla.settings import parse_json

VERSION = 1
MAX_BYTES, MAX_MACHINES = 1 << 18, 8


class Verdict(NamedTuple):
    """trusted: whether the kernels are taken. why: if not, in words. error, allowed: the largest relative
    error and its bound; kernel_ms, ops_ms: how long the same took. seconds: of finding out. pid: of a process
    that is, or was, about to find out."""

    trusted: bool
    why: str = ""
    error: float | None = None
    allowed: float | None = None
    kernel_ms: float | None = None
    ops_ms: float | None = None
    seconds: float | None = None
    pid: int | None = None


def cache_file() -> Path:
    """Where the file is: MLX_HLA_CACHE, or the user's folder of caches."""
    own = os.environ.get("MLX_HLA_CACHE")
    if own:
        return Path(own) / "kernels.json"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mlx-hla" / "kernels.json"
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "mlx-hla" / "kernels.json"


def read(machine: str) -> dict[str, Verdict]:
    """The verdicts of a machine by what they are about."""
    found = _tables().get(machine, {})
    return {name: v for name, entry in found.items() if (v := _verdict(entry)) is not None}


def keep(machine: str, changes: dict[str, Verdict | None]) -> bool:
    """Change a machine's verdicts, None removing one; False where nothing can be kept."""
    try:
        path = cache_file()
        tables = _tables()
        table = tables.pop(machine, {})
        for name, verdict in changes.items():
            table.pop(name, None)
            if verdict is not None:
                table[name] = verdict._asdict()
        # The last machines that were used stay.
        tables = dict([*tables.items(), (machine, table)][-MAX_MACHINES:])
        data = json.dumps({"version": VERSION, "machines": tables}, indent=1).encode()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, lambda file: file.write(data))
    except (InputError, OSError, RuntimeError):  # RuntimeError: there is no home
        return False
    return True


def _tables() -> dict[str, dict[str, Any]]:
    with contextlib.suppress(InputError, OSError, RuntimeError):
        path = cache_file()
        values = parse_json(read_bytes(path, MAX_BYTES), str(path))
        if isinstance(values, dict) and values.get("version") == VERSION:
            machines = values.get("machines")
            if isinstance(machines, dict) and all(isinstance(t, dict) for t in machines.values()):
                return machines
    return {}


def _verdict(entry: object) -> Verdict | None:
    if not isinstance(entry, dict) or set(entry) != set(Verdict._fields):
        return None
    numbers = [entry[name] for name in ("error", "allowed", "kernel_ms", "ops_ms", "seconds")]
    sound = isinstance(entry["trusted"], bool) and isinstance(entry["why"], str)
    sound = sound and all(n is None or (isinstance(n, int | float) and type(n) is not bool) for n in numbers)
    return Verdict(**entry) if sound and (entry["pid"] is None or type(entry["pid"]) is int) else None
