"""Ways to break a file."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from .case import EITHER, REFUSED

Break = Callable[[Path], None]


class Damage(NamedTuple):
    name: str
    apply: Break
    expect: str = REFUSED
    as_user: bool = False


def _replaced(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def _link(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _sparse(path: Path, size: int) -> None:
    os.truncate(path, size)


def flipped(path: Path, seed: int, most: int = 4) -> None:
    rng, data = random.Random(seed), bytearray(path.read_bytes())
    for _ in range(rng.randint(1, most)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    path.write_bytes(data)


def _cut(path: Path, share: float) -> None:
    os.truncate(path, int(share * path.stat().st_size))


def anything(rng: random.Random, forgiving: bool = False) -> Iterator[Damage]:
    """What can befall any file. forgiving: a part of it may be good as well."""
    part = EITHER if forgiving else REFUSED
    yield Damage("missing", Path.unlink)
    yield Damage("empty", partial(_replaced, data=b""))
    yield Damage("folder", _folder)
    yield Damage("pipe", _pipe)
    yield Damage("zero", partial(_link, target="/dev/zero"))
    yield Damage("null", partial(_link, target="/dev/null"))
    yield Damage("loop", lambda p: _link(p, str(p)))
    yield Damage("dangling", partial(_link, target="nothing"))
    yield Damage("locked", lambda p: p.chmod(0), as_user=True)
    yield Damage("sparse", partial(_sparse, size=200 * 2**30))
    yield Damage("zeros", lambda p: _replaced(p, b"\0" * p.stat().st_size))
    for size in (1, 7, 8, 9, 100, 5000):
        yield Damage(f"noise-{size}", partial(_replaced, data=rng.randbytes(size)))
    for _ in range(4):
        share = rng.random()
        yield Damage(f"cut-{share:.3f}", partial(_cut, share=share), part)
    for _ in range(4):
        seed = rng.randrange(10**6)
        yield Damage(f"flipped-{seed}", partial(flipped, seed=seed), EITHER)
    yield Damage("longer", lambda p: p.write_bytes(p.read_bytes() + b"\x00}"), part)
    yield Damage("text", partial(_replaced, data=b"not what you think\n" * 20))


JSON_TEXTS: dict[str, bytes] = {
    "list": b"[]",
    "null": b"null",
    "number": b"3",
    "string": b'"x"',
    "true": b"true",
    "spaces": b"   \n",
    "open": b"{",
    "comment": b"{} // no",
    "single-quotes": b"{'dims': 16}",
    "trailing-comma": b'{"dims": 16,}',
    "nan": b'{"norm_eps": NaN}',
    "infinity": b'{"norm_eps": -Infinity}',
    "twice": b'{"dims": 16, "dims": 16}',
    "bom": b"\xef\xbb\xbf{}",
    "utf-16": '{"dims": 16}'.encode("utf-16"),
    "latin-1": '{"é": 1}'.encode("latin-1"),
    "deep-list": b"[" * 100_000,
    "deep-object": b'{"a":' * 50_000,
    "deep-and-closed": b"[" * 900 + b"]" * 900,
    "long-number": b'{"dims": ' + b"9" * 10_000 + b"}",
    "long-key": b'{"' + b"k" * 500_000 + b'": 1}',
    "too-large": b'{"a": "' + b"x" * 2_000_000 + b'"}',
    "control": b'{"a\x01": 1}',
    "surrogate": b'{"\\ud800": 1}',
    "nul": b'{"a": "\\u0000"}\0',
    "newline-key": b'{"a\\nb\\u2028c": 1}',
}
# By what a field's annotation says: values of another type, or out of range in any case.
STRANGE: tuple[Any, ...] = ([], {}, [1], {"a": 1}, "x" * 70_000, "\u0000", "\ud800")
WRONG: dict[str, tuple[Any, ...]] = {
    "int": (None, True, "3", "", 1.5, 16.0, -1, -(10**30), 10**400, 1e300, *STRANGE),
    "int | None": (True, "3", 1.5, -1, 10**400, *STRANGE),
    "float": (None, True, "0.1", "", 10**400, -1.0, *STRANGE),
    "float | None": (True, "0.1", 10**400, -1.0, *STRANGE),
    "bool": (None, 0, 1, "true", "", 1.0, *STRANGE),
    "str": (None, 3, True, 1.5, *STRANGE[:4]),
    "str | None": (3, True, 1.5, *STRANGE[:4]),
    "tuple[str, ...] | None": (True, 3, "ahla", [""], ["hla9"], ["ahla", None], ["ahla"] * 600, *STRANGE),
    "str | int": (None, True, 1.5, "", "hla9", 0, -1, 99, 10**30, *STRANGE),
}


def json_texts() -> Iterator[Damage]:
    for name, text in JSON_TEXTS.items():
        yield Damage(f"json-{name}", partial(_replaced, data=text))


def set_field(path: Path, keys: tuple[str, ...], value: Any) -> None:
    """Write a value into a JSON file; a function changes what is there."""
    whole = json.loads(path.read_bytes())
    at = whole
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = value(at[keys[-1]]) if callable(value) else value
    path.write_text(json.dumps(whole))


def without_field(path: Path, keys: tuple[str, ...]) -> None:
    whole = json.loads(path.read_bytes())
    at = whole
    for key in keys[:-1]:
        at = at[key]
    del at[keys[-1]]
    path.write_text(json.dumps(whole))


# ---- safetensors


def _parts(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _write(path: Path, header: Any, data: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def _header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    header, data = _parts(path)
    _write(path, change(header) or header, data)


def _entry(path: Path, seed: int, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the entry of one of the tensors."""
    header, data = _parts(path)
    names = sorted(n for n in header if n != "__metadata__")
    change(header[random.Random(seed).choice(names)])
    _write(path, header, data)


def _length(path: Path, length: int) -> None:
    header, data = _parts(path)
    _write(path, header, data, length)


def _lengthened(path: Path, text: bytes) -> None:
    _write(path, text, _parts(path)[1])


def _filled(path: Path, pattern: bytes) -> None:
    """NaN or infinity, in any float type, in the last tensor."""
    data = path.read_bytes()
    path.write_bytes(data[: -len(pattern)] + pattern)


def safetensors(rng: random.Random) -> Iterator[Damage]:
    """Headers that lie, and numbers that are none."""
    for length in (0, 1, 2**60, 2**63, 2**64 - 1, 2**31, 17 * 2**20, 100):
        yield Damage(f"length-{length}", partial(_length, length=length))
    fields: dict[str, tuple[Any, ...]] = {
        "dtype": (["F32"], "F64", "F8_E4M3", "I64", "f32", "", None, 3, {"a": 1}, "BOOL", "x" * 5000),
        "shape": (None, [], [-1, 2], [2**60, 2**60], [0], [1.5], "x", {}, [True], [[1]], [10**30], [1] * 200),
        "data_offsets": (None, [], [0], [0, 2**60], [-4, 0], [8, 0], [1.5, 2], ["0", "4"], [0, 4, 8], 7, {}),
    }
    for field, values in fields.items():
        for value in values:
            change = partial(_put, field=field, value=value)
            yield Damage(f"{field}={str(value)[:20]}", partial(_entry, seed=rng.randrange(99), change=change))
        yield Damage(f"no-{field}", partial(_entry, seed=1, change=partial(_drop, field=field)))
    yield Damage("overlap", partial(_header, change=_overlapping))
    yield Damage("swapped", partial(_header, change=_swapped_shapes))
    yield Damage("one-missing", partial(_header, change=_one_less))
    yield Damage("one-more", partial(_header, change=lambda h: {**h, "extra": _empty_tensor(h)}))
    yield Damage("renamed", partial(_header, change=_renamed))
    yield Damage("long-name", partial(_header, change=lambda h: {**h, "n" * 100_000: _empty_tensor(h)}))
    yield Damage("odd-name", partial(_header, change=lambda h: {**h, "a\nb\ud800": _empty_tensor(h)}))
    yield Damage(
        "many", partial(_header, change=lambda h: {**h, **{f"t{i}": _empty_tensor(h) for i in range(20_000)}})
    )
    yield Damage("entry-list", partial(_header, change=lambda h: {**h, "extra": [1, 2]}))
    yield Damage("entry-null", partial(_header, change=lambda h: {**h, "extra": None}))
    yield Damage("no-tensors", partial(_header, change=lambda h: {"__metadata__": {}}))
    yield Damage("metadata-only", lambda p: _write(p, {"__metadata__": {"a": 3}}, b""))
    for name in ("list", "null", "deep-list", "nan", "latin-1", "twice", "open"):
        yield Damage(f"header-{name}", partial(_lengthened, text=JSON_TEXTS[name]))
    for name, pattern in {"nan": b"\xff" * 4, "infinity": b"\x80\x7f" * 2 + b"\x00\x00\x80\x7f"}.items():
        yield Damage(name, partial(_filled, pattern=pattern))


def _put(entry: dict[str, Any], field: str, value: Any) -> None:
    entry[field] = value


def _drop(entry: dict[str, Any], field: str) -> None:
    del entry[field]


def _tensors(header: dict[str, Any]) -> list[str]:
    return sorted((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])


def _end(header: dict[str, Any]) -> int:
    return max(header[n]["data_offsets"][1] for n in _tensors(header))


def _empty_tensor(header: dict[str, Any]) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [0], "data_offsets": [_end(header)] * 2}


def _overlapping(header: dict[str, Any]) -> None:
    first, second = _tensors(header)[:2]
    a, b = header[first]["data_offsets"], header[second]["data_offsets"]
    header[second]["data_offsets"] = [a[0], a[0] + b[1] - b[0]]


def _swapped_shapes(header: dict[str, Any]) -> None:
    name = next(n for n in _tensors(header) if len(set(header[n]["shape"])) > 1)
    header[name]["shape"].reverse()


def _one_less(header: dict[str, Any]) -> None:
    del header[_tensors(header)[-1]]


def _renamed(header: dict[str, Any]) -> None:
    name = _tensors(header)[0]
    header[f"{name}.x"] = header.pop(name)
