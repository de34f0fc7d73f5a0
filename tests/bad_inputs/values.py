"""Values that are wrong for an argument, by what the argument takes."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np


class Odd:
    """An object of nobody's kind."""

    def __repr__(self) -> str:
        return "<odd>"


NAN, INF = math.nan, math.inf
# Of no kind that any argument takes.
STRANGE: tuple[Any, ...] = (b"bytes", [3], {"a": 1}, Odd(), 1j, {1, 2}, print)
NOT_TEXT: tuple[Any, ...] = (3, 1.5, True, None, *STRANGE)
NOT_BOOL: tuple[Any, ...] = ("false", "true", "", 0, 1, 1.0, None, mx.array(True), np.bool_(True), *STRANGE)
NOT_REAL: tuple[Any, ...] = (NAN, INF, -INF, "1", "x", "", True, None, 10**400, mx.array([1.0]), *STRANGE)
NOT_WHOLE: tuple[Any, ...] = (
    1.5,
    NAN,
    INF,
    "3",
    "",
    True,
    None,
    mx.array([3, 4]),
    mx.array(1.5),
    np.array([3, 4]),
    np.float32(2.5),
    -5,
    -(10**30),
    *STRANGE,
)
NOT_ARRAY: tuple[Any, ...] = (1.0, 3, "x", True, np.zeros((1, 4, 2, 8), np.float32), [[1.0]], b"x", Odd(), {})
NOT_PATH: tuple[Any, ...] = (3, 1.5, True, "", b"", b"bytes", [], {}, Odd())
DTYPES = (mx.int32, mx.uint8, mx.bool_, mx.complex64)


def without(values: tuple[Any, ...], *left_out: Any) -> list[Any]:
    """The values without some that an argument does take."""
    return [v for v in values if not any(v is x or (type(v) is type(x) and v == x) for x in left_out)]


def label(value: Any) -> str:
    """A value in a case's name: short, and without spaces or paths."""
    if isinstance(value, partial):
        return "-".join([value.func.__name__.strip("_"), *map(label, value.args)])
    if isinstance(value, mx.Dtype):
        return str(value).rpartition(".")[2]
    if hasattr(value, "_fields"):
        return "x".join(map(label, value))
    if isinstance(getattr(value, "key", None), str):
        return value.key
    if isinstance(value, mx.array | np.ndarray):
        kind = "mx" if isinstance(value, mx.array) else "np"
        return f"{kind}-{str(value.dtype).rpartition('.')[2]}{'x'.join(map(str, value.shape))}"
    text = value.__name__ if callable(value) and hasattr(value, "__name__") else ascii(value)
    text = re.sub(r"[^\w.+\-<>\[\](){}'\"=/,\\]", "_", text)
    return text if len(text) <= 40 else f"{text[:28]}..{len(text)}"
