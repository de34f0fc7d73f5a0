"""Results on disk: a JSON file for each job, written whole or not at all, and bundles of many."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def key(task: str, arm: str, head_dim: int) -> str:
    """The name of a job: of its file, and in a bundle."""
    return f"{task}-d{head_dim}-{arm}"


def write(path: Path, value: dict[str, Any]) -> None:
    """One line for each key; a process that is ended here leaves the old file, or the whole new one."""
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(one)}" for key, one in value.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    os.replace(part, path)


def read(*paths: Path) -> dict[str, Any]:
    """The results of folders and bundles by key; where a job is in several, the last path's."""
    out: dict[str, Any] = {}
    for path in paths:
        if path.is_dir():
            for file in sorted(path.glob("*.json")):
                value = json.loads(file.read_text(encoding="utf-8"))
                out |= {file.stem: value} if "task" in value else value
        elif path.exists():
            out |= json.loads(path.read_text(encoding="utf-8"))
    return out


def bundle(folder: Path, path: Path) -> None:
    """All results of a folder in one file."""
    found = {f.stem: json.loads(f.read_text(encoding="utf-8")) for f in sorted(folder.glob("*-d*-*.json"))}
    write(path, {name: value for name, value in found.items() if "task" in value})
