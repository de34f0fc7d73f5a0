"""Progress bars, and the other packages that not everybody has installed."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from mlx_hla.errors import InputError


def require(name: str) -> Any:
    """Import a package of the `train` extra."""
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise InputError(f"{name} is missing: pip install 'mlx-hla[train]'") from e


@contextlib.contextmanager
def progress(total: int, unit: str) -> Iterator[Callable[..., None]]:
    """A function that counts one more done: a bar on a terminal, nothing elsewhere."""
    bar = None
    if sys.stderr.isatty():
        try:
            bar = require("tqdm").tqdm(total=total, unit=unit, dynamic_ncols=True, leave=False)
        except InputError as e:
            sys.stderr.write(f"mlx-hla: no progress bar: {e}\n")
    try:
        yield lambda *_: None if bar is None else bar.update(1)
    finally:
        if bar is not None:
            bar.close()
