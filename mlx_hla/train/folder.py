"""The folder of a run: one run at a time, and nothing half written that stays."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from mlx_hla.errors import InputError
from mlx_hla.train.team import Team

# As `write_atomic` and `new_folder` name what is not whole yet.
_UNFINISHED = re.compile(
    r"\.[0-9a-f]{8}\.(checkpoint|config\.json|tokenizer\.model|model\.safetensors|log\.jsonl|loss\.png"
    r"|hla\.py|tokenizer\.json|tokenizer_config\.json|adapters\.safetensors|adapter_config\.json)"
)


def new_folder(out: Path) -> Path:
    """A folder to fill, which a rename then puts in its place."""
    folder = out / f".{uuid.uuid4().hex[:8]}.checkpoint"
    folder.mkdir(parents=True)
    return folder


@contextlib.contextmanager
def held(out: Path) -> Iterator[None]:
    """Make the folder and keep other runs out of it; sweep what a killed run left half written."""
    out.mkdir(parents=True, exist_ok=True)
    number = os.open(out, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
        except OSError as e:
            if e.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
                raise InputError(f"{out}: another run is at work in this folder") from None
            # A file system without locks: it has to do without.
        _sweep(out)
        try:
            yield
        finally:
            _sweep(out)
    finally:
        os.close(number)


def held_by(team: Team, out: Path) -> contextlib.AbstractContextManager[None]:
    """`held` by the rank that writes, and nothing on the others."""
    return held(out) if team.first else contextlib.nullcontext()


def _sweep(out: Path) -> None:
    for path in out.iterdir():
        if not _UNFINISHED.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()
