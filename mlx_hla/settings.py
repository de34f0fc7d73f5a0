"""Settings: dataclasses whose fields are flags of the command line and keys of JSON files, all checked."""

from __future__ import annotations

import dataclasses
import json
import math
import operator
from pathlib import Path
from typing import Any, TypeVar

from mlx_hla.errors import InputError
from mlx_hla.files import read_bytes

MAX_JSON_BYTES = 1 << 20
T = TypeVar("T")


def option(default: Any, help: str) -> Any:
    """A field of a dataclass that is also a flag of the command line."""
    return dataclasses.field(default=default, metadata={"help": help})


_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "int | None": (int, type(None)),
    "float": (int, float),
    "float | None": (int, float, type(None)),
    "str": (str,),
    "str | None": (str, type(None)),
    "str | int": (str, int),
    "bool": (bool,),
    "tuple[str, ...] | None": (tuple, type(None)),
}


def check_types(settings: Any) -> None:
    """Check every field of a dataclass instance against its annotation; numbers must be finite."""
    for field in dataclasses.fields(settings):
        value: Any = getattr(settings, field.name)
        kind = str(field.type)
        allowed = _TYPES[kind]
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            raise InputError(f"{field.name} must be {kind}, got {repr(value)[:60]}")
        if isinstance(value, tuple) and not all(isinstance(part, str) for part in value):
            raise InputError(f"{field.name} must be {kind}, got {repr(value)[:60]}")
        if isinstance(value, int | float) and "float" in kind and not _is_finite(value):
            raise InputError(f"{field.name} must be finite, got {repr(value)[:60]}")


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond every float
        return False


def check_number(name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> float:
    """`value`, or an error unless it is a finite number from `least` to `most`."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not _is_finite(value):
        raise InputError(f"{name} must be a finite number, got {repr(value)[:60]}")
    if not least <= value <= most:
        raise InputError(f"{name} must be a number from {least} to {most}, got {value}")
    return value


def check_whole(name: str, value: Any, least: float, most: float = math.inf) -> int:
    """`value` as an int, or an error: True, 1.5 and NaN are no whole numbers."""
    try:
        if isinstance(value, bool):
            raise TypeError
        whole = operator.index(value)
    except TypeError:
        raise InputError(f"{name} must be a whole number, got {repr(value)[:60]}") from None
    if not least <= whole <= most:
        bounds = f"at least {least}" if most == math.inf else f"from {least} to {most}"
        raise InputError(f"{name} must be {bounds}, got {repr(value)[:60]}")
    return whole


def from_dict(cls: type[T], values: object, name: str) -> T:
    """Build a dataclass from a JSON object; keys that it does not have are an error, not a surprise later."""
    if not isinstance(values, dict):
        raise InputError(f"{name}: must be a JSON object, got {type(values).__name__}")
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - known, key=str)
    if unknown:
        shown = ", ".join(repr(k)[:42] for k in unknown[:5])
        raise InputError(f"{name}: unknown keys {shown}; known are {', '.join(sorted(known))}")
    # JSON has lists for tuples.
    tuples = {f.name for f in dataclasses.fields(cls) if str(f.type).startswith("tuple")}  # type: ignore[arg-type]
    values = {k: tuple(v) if k in tuples and isinstance(v, list) else v for k, v in values.items()}
    try:
        return cls(**values)
    except InputError as e:
        raise InputError(f"{name}: {e}") from None


def read_json(path: str | Path) -> object:
    """Parse a small JSON file, strictly: no NaN, no repeated keys, no bomb."""
    return parse_json(read_bytes(path, MAX_JSON_BYTES), str(path))


def parse_json(data: bytes, name: str) -> object:
    def constant(text):
        raise ValueError(f"{text} is not JSON")

    def number(text):
        if math.isfinite(value := float(text)):
            return value
        raise ValueError(f"{text[:20]} is beyond the numbers")

    def unique(pairs):
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key is repeated")
        return result

    try:
        return json.loads(
            data.decode(), parse_constant=constant, parse_float=number, object_pairs_hook=unique
        )
    except (ValueError, RecursionError) as e:  # a decode error is a ValueError too
        raise InputError(f"{name}: not valid JSON ({' '.join(str(e).split())[:100]})") from None
