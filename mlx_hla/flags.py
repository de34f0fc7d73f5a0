"""Flags of a command line from the fields of dataclasses, one to one."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any


def _number_or_text(text: str) -> int | str:
    return int(text) if text.isascii() and text.isdigit() else text


def _texts(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


_PARSERS: dict[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "str": str,
    "str | int": _number_or_text,
    "tuple[str, ...]": _texts,
}
_METAVARS = {"str | int": "NAME", "tuple[str, ...]": "NAME,..."}


def _optional(parse: Callable[[str], Any], name: str) -> Callable[[str], Any]:
    def parser(text: str) -> Any:
        return None if text.lower() == "none" else parse(text)

    parser.__name__ = name  # argparse names it in its errors
    return parser


def add_fields(parser: Any, cls: type, defaults: object | None = None) -> None:
    """Add a flag per field of a dataclass. Only the flags that are given end up in the namespace."""
    defaults = cls() if defaults is None else defaults
    for field in dataclasses.fields(cls):
        kind = str(field.type)
        value = getattr(defaults, field.name)
        shown = ",".join(value) if isinstance(value, tuple) else str(value).lower()
        options: dict[str, Any] = {
            "default": argparse.SUPPRESS,
            "help": f"{field.metadata['help']} (default: {shown})",
        }
        if kind == "bool":
            options["action"] = argparse.BooleanOptionalAction
        else:
            name = kind.removesuffix(" | None")
            parse = _PARSERS[name]
            options["type"] = _optional(parse, name) if kind.endswith("None") else parse
            options["metavar"] = _METAVARS.get(name, name.upper())
        parser.add_argument("--" + field.name.replace("_", "-"), **options)


def given(args: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The fields of the dataclass that flags were given for."""
    return {f.name: getattr(args, f.name) for f in dataclasses.fields(cls) if hasattr(args, f.name)}
