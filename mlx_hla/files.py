"""Files: read with distrust, written whole or not at all.

Only regular files are read, only up to a stated size, each opened once. A device, a pipe or a link to one can
hang a reader or fill the memory, and what a check of the path saw need not be what a later open gets. So a
file is opened first, without waiting, and then asked what it is.
"""

from __future__ import annotations

import contextlib
import os
import stat
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from mlx_hla.errors import InputError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}

MAX_PATH_BYTES = 4096  # no system takes longer ones


def as_path(name: str, value: object) -> Path:
    """A path that somebody gave; "" would be the folder that one happens to be in."""
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    try:
        if isinstance(text, str) and "\0" not in text and 0 < len(os.fsencode(text)) <= MAX_PATH_BYTES:
            return Path(text)
    except UnicodeEncodeError:  # a lone surrogate
        pass
    raise InputError(f"{name} must be a path, got {repr(value)[:60]}")


@contextlib.contextmanager
def open_regular(path: str | Path, limit: int) -> Iterator[BinaryIO]:
    """Open a file to read; InputError if it is no regular file, has more than `limit` bytes, or fails."""
    if not isinstance(path, str | Path):  # a number would be an open file
        raise InputError(f"a file must be a path, got {repr(path)[:60]}")
    try:
        # Without O_NONBLOCK, opening a pipe would wait for its writer.
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as e:  # ValueError: a NUL in the name
        raise InputError(f"{path}: cannot read it ({getattr(e, 'strerror', None) or e})") from e
    try:
        found = os.fstat(number)
        if not stat.S_ISREG(found.st_mode):
            kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
            raise InputError(f"{path}: cannot read it (it is {kind}, no regular file)")
        if found.st_size > limit:
            raise InputError(f"{path}: larger than {limit} bytes")
        with os.fdopen(number, "rb", closefd=False) as file:
            yield file
    except OSError as e:
        raise InputError(f"{path}: cannot read it ({e.strerror or e})") from e
    finally:
        os.close(number)


def unchanged(file: BinaryIO) -> Callable[[], bool]:
    """A function that says whether an open file has been written to since this call."""

    def state():
        found = os.fstat(file.fileno())
        return found.st_size, found.st_mtime_ns

    before = state()
    return lambda: state() == before


def read_bytes(path: str | Path, limit: int) -> bytes:
    """All of a regular file of at most `limit` bytes."""
    with open_regular(path, limit) as file:
        data = file.read(limit + 1)
        if len(data) > limit:  # it has grown since it was opened
            raise InputError(f"{path}: larger than {limit} bytes")
        return data


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file beside `path`, bring it to the disk, then put it in place."""
    temporary = path.parent / f".{uuid.uuid4().hex[:8]}.{path.name}"
    try:
        if path.exists() and not path.is_file():  # a rename would put a file in the place of a device
            kind = _KINDS.get(stat.S_IFMT(path.stat().st_mode), "something else")
            raise InputError(f"{path}: cannot write it (it is {kind}, no regular file)")
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # MLX writes tensors, and has its own errors
        reason = getattr(e, "strerror", None) or " ".join(str(e).split())
        raise InputError(f"{path}: cannot write it ({reason})") from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
