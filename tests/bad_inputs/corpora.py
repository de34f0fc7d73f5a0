"""Corpora that are none: unreadable, empty, of another encoding, of the wrong fields, of odd files."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mlx_hla.data import load_corpus

from .case import ACCEPTED, EITHER, REFUSED, Case
from .commands import base
from .damage import JSON_TEXTS

SEED = 13
LINE = "def f(x):\n    return x + 1\n"

# name -> (bytes of a file, what comes of it alone)
TEXTS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", REFUSED),
    "a-character": (b"x", REFUSED),
    "a-newline": (b"\n", REFUSED),
    "spaces": (b"   \n\t\n" * 500, REFUSED),
    "odd-spaces": ("\u2003\u00a0\u3000\n".encode() * 200, REFUSED),
    "bom-only": (b"\xef\xbb\xbf", REFUSED),
    "latin-1": ("é = 'ü'\n".encode("latin-1") * 50, REFUSED),
    "utf-16": ((LINE * 20).encode("utf-16"), REFUSED),
    "utf-32": ((LINE * 20).encode("utf-32"), REFUSED),
    "late-latin-1": (LINE.encode() * 100 + b"\xe9", REFUSED),
    "half-a-character": (LINE.encode() * 20 + "é".encode()[:1], REFUSED),
    "surrogates": (b"x = '\xed\xa0\x80'\n" * 20, REFUSED),
    "noise": (random.Random(SEED).randbytes(20_000), REFUSED),
    "all-bytes": (bytes(range(256)) * 20, REFUSED),
    "elf": (b"\x7fELF\x02\x01\x01" + b"\0" * 3000 + b"\xff" * 100, REFUSED),
    "nuls": (b"\0" * 5000, EITHER),
    "nuls-between": (b"a\0b\0\n" * 500, EITHER),
    "bom": (b"\xef\xbb\xbf" + LINE.encode() * 50, EITHER),
    "carriage-returns": (b"x = 1\r" * 500, EITHER),
    "a-line": (b"x = 1 " * 300, EITHER),
    "a-long-line": (b"x" * 6_000_000, EITHER),
    "controls": (bytes(range(1, 32)) * 100, EITHER),
    "emoji": ("👩‍👩‍👧‍👦 = '🏳️‍🌈'\n".encode() * 100, EITHER),
    "combining": (("e" + "\u0301" * 3000 + "\n").encode() * 3, EITHER),
    "lower-blocks": ("\u2581\u2581x\n".encode() * 300, EITHER),
    "one-character": (b"x\n" * 2000, EITHER),
    "special-words": (b"<s> </s> <unk> <0x0A>\n" * 200, EITHER),
    "next-lines": ("x\u0085y\u2028z\u2029\n".encode() * 100, EITHER),
}
LINES: dict[str, bytes] = {
    "no-text": b'{"txt": "x"}',
    "null": b'{"text": null}',
    "number": b'{"text": 3}',
    "list": b'{"text": ["x"]}',
    "object": b'{"text": {"text": "x"}}',
    "array": b'["text"]',
    "string": b'"text"',
    "broken": b'{"text": "x"',
    "two": b'{"text": "x"} {"text": "y"}',
    "surrogate": b'{"text": "\\ud800"}',
    "nan": b'{"text": "x", "n": NaN}',
    "twice": b'{"text": "x", "text": "y"}',
    "deep": JSON_TEXTS["deep-list"],
    "too-long": b'{"text": "' + b"x" * 5_000_000 + b'"}',
    "latin-1": '{"text": "é"}'.encode("latin-1"),
    "binary": bytes(range(128, 256)),
    "python": b"{'text': 'x'}",
    "capital": b'{"Text": "x"}',
    "bom": b"\xef\xbb\xbf{}",
}


def _odd_folder(kind: str, folder: Path) -> None:
    """A folder with something in it that is no text."""
    file = folder / "f.py"
    if kind == "pipe":
        os.mkfifo(file)
    elif kind in ("zero", "random", "stdin", "tty"):
        file.symlink_to(f"/dev/{'urandom' if kind == 'random' else kind}")
    elif kind == "loop":
        file.symlink_to(file)
    elif kind == "dangling":
        file.symlink_to(folder / "nothing.py")
    elif kind == "circle":
        (folder / "a" / "b").mkdir(parents=True)
        (folder / "a" / "b" / "c").symlink_to(folder)
        (folder / "a" / "up.py").symlink_to("..")
    elif kind == "folder":
        file.mkdir()
    elif kind == "locked-file":
        file.write_text(LINE * 50)
        file.chmod(0)
    elif kind == "locked-folder":
        (folder / "a").mkdir()
        (folder / "a" / "f.py").write_text(LINE * 50)
        (folder / "a").chmod(0)
    elif kind == "sparse":
        file.touch()
        os.truncate(file, 100 * 2**30)
    elif kind == "other-suffix":
        (folder / "f.swift").write_text(LINE * 50)
        (folder / "noname").write_text(LINE * 50)
    elif kind == "hidden":
        for name in (".git", "__pycache__", "node_modules", "site-packages"):
            (folder / name).mkdir()
            (folder / name / "f.py").write_text(LINE * 50)
    elif kind == "deep":
        here = os.getcwd()
        os.chdir(folder)
        try:
            for _ in range(300):  # longer than any path may be, in the end
                os.mkdir("d" * 20)
                os.chdir("d" * 20)
            Path("f.py").write_text(LINE * 50)
        finally:
            os.chdir(here)
    elif kind == "names":
        for name in (b"\xff\xfe.py", b"a\nb.py", b"-.py", b" .py", b"\x1b[31m.py", "é.py".encode()):
            with contextlib.suppress(OSError):  # a file system may take no such name
                Path(os.fsdecode(os.path.join(os.fsencode(folder), name))).write_bytes(b"\xff" * 50)
    elif kind == "empty-files":
        for i in range(200):
            (folder / f"f{i}.py").touch()


ODD = ("pipe", "zero", "random", "loop", "dangling", "circle", "folder", "locked-file", "locked-folder")
ODD += ("sparse", "other-suffix", "hidden", "deep", "names", "empty-files", "nothing")
READERS = ("load_corpus", "load_corpus", "eval", "train")


def _read(place: Any, path: Path, how: str) -> Any:
    if how == "load_corpus":
        return load_corpus(path, 0.2)
    argv = base(place, how)
    if how == "train":  # with a tokenizer of its own, which it has to learn
        del argv[argv.index("--tokenizer") : argv.index("--tokenizer") + 2]
    return place.command(*argv, "--data", path)


def _made(make: Callable[[Path], Any], how: str, beside: bool, single: str | None, place: Any) -> Any:
    folder: Path = place.path / "corpus"
    if beside:
        place.copy("corpus")
    else:
        folder.mkdir()
    make(folder)
    return _read(place, folder / single if single else folder, how)


def _write(folder: Path, name: str, data: bytes) -> None:
    (folder / name).write_bytes(data)


def cases() -> Iterator[Case]:
    rng = random.Random(SEED)

    def both(name: str, make: Callable[[Path], Any], expect: str, single: str | None, locked=False):
        """The corpus alone, and beside good files, which must still be read."""
        how = rng.choice(READERS)
        yield Case(f"corpus:{name}-{how}", partial(_made, make, how, False, None), expect, locked)
        if single:
            how = rng.choice(READERS)
            yield Case(f"corpus:{name}-file-{how}", partial(_made, make, how, False, single), expect, locked)
        how = rng.choice(READERS)
        yield Case(f"corpus:{name}-beside-{how}", partial(_made, make, how, True, None), ACCEPTED, locked)

    for name, (data, expect) in TEXTS.items():
        yield from both(name, partial(_write, name="odd.py", data=data), expect, "odd.py")
    for name, line in LINES.items():
        for place_ in range(2):
            good = b'{"text": "x = 1\\ny = 2"}\n' * 5
            data = line + b"\n" + good if place_ else good + line
            yield from both(
                f"line-{name}-{place_}", partial(_write, name="odd.jsonl", data=data), REFUSED, "odd.jsonl"
            )
    for kind in ODD:
        locked = kind.startswith("locked")
        single = (
            "f.py"
            if kind in ("pipe", "zero", "random", "loop", "dangling", "sparse", "locked-file")
            else None
        )
        yield from both(f"with-{kind}", partial(_odd_folder, kind), REFUSED, single, locked)
