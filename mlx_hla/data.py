"""Text to train on: files, their split, and batches of tokens.

The default corpus is the Python standard library of the interpreter that runs: nothing is downloaded. A file
belongs to the validation part by a hash of its path, a line of JSON by a hash of its text: the split is the
same on every machine, and a file does not change sides between versions of Python, so a model is never
validated on what it was trained on.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import os
import sysconfig
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import mlx.core as mx
import numpy as np

from mlx_hla.errors import InputError
from mlx_hla.files import as_path, open_regular
from mlx_hla.losses import check_stream
from mlx_hla.settings import check_number, check_whole, parse_json
from mlx_hla.tokenizer import Tokenizer

# Never part of a corpus, wherever it is. Tests are left out: they would be a third of the library.
SKIPPED_FOLDERS = {"__pycache__", "node_modules", "site-packages", "dist-packages", "lib-dynload"}
TEST_FOLDERS = {"test", "tests", "idle_test", "testmock"}
# Generated files of the library: translation tables, help texts, and this machine's build settings.
GENERATED = ("encodings/", "pydoc_data/", "_sysconfigdata", "config-")
TEXT_SUFFIXES = (".py", ".pyi", ".txt", ".md", ".rst", ".jsonl")
PIECE_BYTES = 4 * 2**20  # a longer file is several texts, cut where a line ends
MAX_REPEAT = 1000
MAX_CORPUS_BYTES = 2 * 2**30  # it is held in memory, as text and as tokens


@dataclass(frozen=True)
class Corpus:
    """Texts of the training and the validation part. `skipped` files were not read; `why`, of the first."""

    name: str
    train: tuple[str, ...]
    valid: tuple[str, ...]
    skipped: int
    digest: str  # of every text and its side: equal digests mean equal corpora
    why: str = field(default="", compare=False)

    def describe(self) -> str:
        sizes = [sum(len(t.encode()) for t in part) / 1e6 for part in (self.train, self.valid)]
        line = (
            f"{self.name}: {len(self.train)} + {len(self.valid)} texts, "
            f"{sizes[0]:.2f} MB to train, {sizes[1]:.2f} MB to validate"
        )
        return line + (f"; {self.skipped} files left out ({self.why})" if self.skipped else "")


def load_corpus(
    path: str | Path | None = None,
    valid_fraction: float = 0.05,
    max_bytes: int | None = None,
    suffix: str | None = None,
    extra: str | Path | None = None,
    repeat: int = 1,
) -> Corpus:
    """Read a folder or file, or the standard library, and split it by file, JSON lines by line.

    A corpus whose texts all fall on one side (a single file, say) is split inside its texts: the last
    `valid_fraction` of the lines of each validate. `max_bytes` stops reading there, at the end of a line.
    `suffix`: of the files of a folder to read, several with commas; by default TEXT_SUFFIXES. Files that end
    in .jsonl hold a JSON object a line, of which the field "text" counts.

    `extra`: another folder or file, all of it for the training part, less the texts that validate. The split
    of the rest is the same with it and without, and `max_bytes` does not cut it. `repeat`: how often the rest
    stands in the training part, that it may count for more beside a larger `extra`.
    """
    check_whole("repeat", repeat, 1, MAX_REPEAT)
    if not 0 < check_number("the validation fraction", valid_fraction) < 1:
        raise InputError(f"the validation fraction must be between 0 and 1, got {valid_fraction}")
    if max_bytes is not None:
        check_whole("max_bytes", max_bytes, 1, MAX_CORPUS_BYTES)
    suffixes = parse_suffixes(suffix)
    if path is None:
        root, name = Path(sysconfig.get_path("stdlib")), "the Python standard library"
        files = [f for f in _walk(root, TEST_FOLDERS) if f.suffix == ".py"]
        files = [f for f in files if not _relative(f, root).startswith(GENERATED)]
    else:
        root, name = as_path("the corpus", path), str(path)
        files = _files(root, suffixes)
    texts, skipped, why = _read(name, root, files, max_bytes)
    sides: tuple[list[str], list[str]] = ([], [])
    for side, text in texts:
        # The side must not follow from the order, so it uses other bytes of the hash.
        sides[int.from_bytes(side[8:16], "big") < valid_fraction * 2**64].append(text)
    train, valid = sides
    if not train or not valid:
        train, valid = _split_inside(train + valid, valid_fraction)
    if not train or not valid:
        reason = _missing(root, files, suffixes, skipped, why)
        raise InputError(f"{name}: the corpus is empty or too small to split ({reason})")
    known = {text.strip() for text in train + valid}
    train = train * repeat
    if extra is not None:
        root = as_path("extra", extra)
        files = _files(root, suffixes)
        texts, more_skipped, more_why = _read(str(extra), root, files, None)
        more = [text for _, text in texts if text.strip() not in known]
        if not more:
            reason = _missing(root, files, suffixes, more_skipped, more_why)
            raise InputError(f"{extra}: no more text to train on ({reason})")
        train, name = train + more, f"{name}, to train with {extra}"
        skipped, why = skipped + more_skipped, why or more_why
    digest = hashlib.sha256()
    for chosen in (train, valid):
        for text in chosen:
            digest.update(hashlib.sha256(text.encode()).digest())
        digest.update(b"|")
    return Corpus(name, tuple(train), tuple(valid), skipped, digest.hexdigest(), why)


def _files(root: Path, suffixes: Collection[str]) -> list[Path]:
    """The files to read of a folder that somebody gave, or the one file."""
    if not root.exists() and not root.is_symlink():
        raise InputError(f"{root}: no such file or folder")
    return [f for f in _walk(root, set()) if f.suffix in suffixes] if root.is_dir() else [root]


def _read(
    name: str, root: Path, files: list[Path], max_bytes: int | None
) -> tuple[list[tuple[bytes, str]], int, str]:
    """The different texts of `files`, each with its hash; how many files were not read, why the first."""
    found, seen, skipped, why = [], set(), 0, ""
    left = MAX_CORPUS_BYTES if max_bytes is None else max_bytes
    # By hash, so that a corpus cut short by max_bytes is a fair sample and not the letters a to c.
    for key, file in sorted((_hash(_relative(f, root)), f) for f in files):
        if left <= 0:
            break
        try:
            texts = list(_texts(file, key, left if max_bytes else None))
        except InputError as e:
            if file == root:
                raise
            skipped, why = skipped + 1, why or str(e)
            continue
        for side, text in texts:
            if text.strip() and text not in seen and left > 0:
                found.append((side, text if len(text.encode()) <= left else _cut(text, left)))
                left -= len(text.encode())
                seen.add(text)
        if left < 0 and max_bytes is None:
            raise InputError(f"{name}: more than {MAX_CORPUS_BYTES} bytes; take a part with max_bytes")
    return found, skipped, why


def parse_suffixes(suffix: str | None) -> Collection[str]:
    """ ".swift,h" to .swift and .h."""
    if suffix is None:
        return TEXT_SUFFIXES
    if not isinstance(suffix, str):
        raise InputError(f"suffix must be text such as .swift,.h, got {repr(suffix)[:60]}")
    found = {"." + s.strip().lstrip(".") for s in suffix.split(",")}
    if "." in found or any("/" in s or "." in s[1:] for s in found):
        raise InputError(f"suffix must be ends of file names such as .swift,.h, got {suffix[:60]!r}")
    return found


def _missing(root: Path, files: list[Path], suffixes: Collection[str], skipped: int, why: str) -> str:
    """Why a corpus has no text, in words."""
    if skipped:
        return f"{skipped} of {len(files)} files left out: {why}"
    if files:
        return f"{len(files)} files"
    others = Counter(f.suffix for f in _walk(root, set()) if f.suffix)
    there = ", ".join(f"{s} ({n})" for s, n in others.most_common(4))
    asked = f"no files that end in {', '.join(sorted(suffixes))}"
    return asked + (f", but in {there}: choose with suffix" if there else "")


def _walk(root: Path, left_out: set[str]) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in SKIPPED_FOLDERS | left_out and not f.startswith(".")]
        yield from (Path(folder, n) for n in names)


def _relative(file: Path, root: Path) -> str:
    return file.relative_to(root).as_posix() if file != root else file.name


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def _texts(file: Path, key: bytes, most: int | None) -> Iterator[tuple[bytes, str]]:
    """The texts of a file, each with the hash that decides its side; it stops after `most` bytes or more."""
    with open_regular(file, MAX_CORPUS_BYTES if most is None else 1 << 62) as opened:
        got = 0
        for side, text in (_json_texts if file.suffix == ".jsonl" else _plain_texts)(opened, file):
            yield side or key, text
            got += len(text.encode())
            if most is not None and got >= most:
                return


def _plain_texts(opened: BinaryIO, file: Path) -> Iterator[tuple[bytes, str]]:
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    while True:
        raw = opened.read(PIECE_BYTES)
        raw += opened.readline(PIECE_BYTES)
        try:
            text = decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as e:
            place = opened.tell() - len(e.object) + e.start
            raise InputError(f"{file}: no UTF-8 (byte {place}), and no other encoding is read") from None
        if text:
            yield b"", text
        if not raw:
            return


def _json_texts(opened: BinaryIO, file: Path) -> Iterator[tuple[bytes, str]]:
    number = 0
    while line := opened.readline(PIECE_BYTES):
        number += 1
        if not line.strip():
            continue
        if len(line) == PIECE_BYTES:
            raise InputError(f"{file}: line {number} has more than {PIECE_BYTES} bytes")
        value = parse_json(line, f"{file}: line {number}")
        text = value.get("text") if isinstance(value, dict) else None
        try:
            if not isinstance(text, str):
                raise ValueError
            yield hashlib.sha256(text.encode()).digest(), text
        except ValueError:  # or a lone surrogate, which JSON can write and UTF-8 cannot
            raise InputError(f'{file}: line {number} is no object with a "text"') from None


def _cut(text: str, size: int) -> str:
    """The whole lines of `text` within `size` bytes; at least a part of the first."""
    part = text.encode()[:size].decode(errors="ignore")
    end = part.rfind("\n") + 1
    return part[:end] if end else part


def _split_inside(texts: list[str], fraction: float) -> tuple[list[str], list[str]]:
    train: list[str] = []
    valid: list[str] = []
    for text in texts:
        lines = text.splitlines(keepends=True)
        cut = len(lines) - max(1, round(fraction * len(lines)))
        for part, chosen in ((train, lines[:cut]), (valid, lines[cut:])):
            if "".join(chosen).strip():
                part.append("".join(chosen))
    return train, valid


def encode_texts(tokenizer: Tokenizer, texts: tuple[str, ...]) -> np.ndarray:
    """All texts as one stream of tokens, each between <s> and </s>."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    parts = [np.array(tokenizer.encode(t, bos=True, eos=True), dtype) for t in texts]
    return np.concatenate(parts) if parts else np.zeros(0, dtype)


def bytes_per_token(tokenizer: Tokenizer) -> np.ndarray:
    """How many bytes of text each token stands for, float32 [vocab_size]."""
    return np.array([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)], np.float32)


class Batches:
    """Windows of `context + 1` tokens at random places of a stream.

    The stream lies in the device's memory and a batch is one gather, so that the data never keeps a fast
    device waiting. Batch `step` depends on nothing but the seed and the step: a run resumes where it stopped.
    """

    def __init__(self, stream: np.ndarray, batch_size: int, context: int, seed: int):
        check_whole("batch_size", batch_size, 1)
        check_whole("context", context, 1)
        check_whole("seed", seed, 0)
        check_stream(stream)
        if len(stream) < context + 1:
            raise InputError(
                f"the corpus has {len(stream)} tokens, fewer than one window of {context} + 1; "
                "use more text or a smaller context"
            )
        self.batch_size, self.seed = batch_size, seed
        self.places = len(stream) - context
        self._stream = mx.array(stream)
        self._window = mx.arange(context + 1)

    def __getitem__(self, step: int) -> mx.array:
        """Tokens [batch_size, context + 1], int32."""
        starts = np.random.default_rng([self.seed, step]).integers(0, self.places, self.batch_size)
        index = mx.array(starts.astype(np.int32))[:, None] + self._window
        return self._stream[index].astype(mx.int32)
