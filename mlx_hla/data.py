"""Text to train on: files, their split, and batches of tokens.

The default corpus is the Python standard library of the interpreter that runs: nothing is downloaded. A file
belongs to the validation part by a hash of its path: the split is the same on every machine, and a file does
not change sides between versions of Python, so a model is never validated on what it was trained on.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_hla.errors import InputError
from mlx_hla.files import read_bytes
from mlx_hla.tokenizer import Tokenizer

# Never part of a corpus, wherever it is. Tests are left out: they would be a third of the library.
SKIPPED_FOLDERS = {"__pycache__", "node_modules", "site-packages", "dist-packages", "lib-dynload"}
TEST_FOLDERS = {"test", "tests", "idle_test", "testmock"}
# Generated files of the library: translation tables, help texts, and this machine's build settings.
GENERATED = ("encodings/", "pydoc_data/", "_sysconfigdata", "config-")
TEXT_SUFFIXES = {".py", ".pyi", ".txt", ".md", ".rst"}
MAX_FILE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Corpus:
    """Texts of the training and the validation part. `skipped` files are too large or no UTF-8."""

    name: str
    train: tuple[str, ...]
    valid: tuple[str, ...]
    skipped: int
    digest: str  # of every text and its side: equal digests mean equal corpora

    def describe(self) -> str:
        sizes = [sum(len(t.encode()) for t in part) / 1e6 for part in (self.train, self.valid)]
        line = (
            f"{self.name}: {len(self.train)} + {len(self.valid)} texts, "
            f"{sizes[0]:.2f} MB to train, {sizes[1]:.2f} MB to validate"
        )
        return line + (f"; {self.skipped} files left out as unreadable" if self.skipped else "")


def load_corpus(
    path: str | Path | None = None, valid_fraction: float = 0.05, max_bytes: int | None = None
) -> Corpus:
    """Read a folder or file, or the standard library, and split it by file.

    A corpus whose files all fall on one side (a single file, say) is split inside its texts: the last
    `valid_fraction` of the lines of each validate. `max_bytes` stops reading once that much is there.
    """
    if not 0 < valid_fraction < 1:
        raise InputError(f"the validation fraction must be between 0 and 1, got {valid_fraction}")
    if path is None:
        root, name = Path(sysconfig.get_path("stdlib")), "the Python standard library"
        files = [
            f for f in _walk(root, {".py"}, TEST_FOLDERS) if not _relative(f, root).startswith(GENERATED)
        ]
    else:
        root, name = Path(path), str(path)
        if not root.exists():
            raise InputError(f"{root}: no such file or folder")
        files = list(_walk(root, TEXT_SUFFIXES, set())) if root.is_dir() else [root]
    sides: tuple[list[str], list[str]] = ([], [])
    seen, skipped, total = set(), 0, 0
    # By hash, so that a corpus cut short by max_bytes is a fair sample and not the letters a to c.
    for key, file in sorted((_hash(_relative(f, root)), f) for f in files):
        if max_bytes is not None and total >= max_bytes:
            break
        try:
            text = _read(file)
        except InputError:
            if file == root:
                raise
            skipped += 1
            continue
        if text.strip() and text not in seen:
            seen.add(text)
            total += len(text.encode())
            # The side must not follow from the order, so it uses other bytes of the hash.
            sides[int.from_bytes(key[8:16], "big") < valid_fraction * 2**64].append(text)
    train, valid = sides
    if not train or not valid:
        train, valid = _split_inside(train + valid, valid_fraction)
    if not train or not valid:
        found = f"{len(files)} files, {skipped} of them unreadable" if files else "no files of text"
        raise InputError(f"{name}: the corpus is empty or too small to split ({found})")
    digest = hashlib.sha256()
    for part in (train, valid):
        for text in part:
            digest.update(hashlib.sha256(text.encode()).digest())
        digest.update(b"|")
    return Corpus(name, tuple(train), tuple(valid), skipped, digest.hexdigest())


def _walk(root: Path, suffixes: set[str], left_out: set[str]) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in SKIPPED_FOLDERS | left_out and not f.startswith(".")]
        yield from (Path(folder, n) for n in names if Path(n).suffix in suffixes)


def _relative(file: Path, root: Path) -> str:
    return file.relative_to(root).as_posix() if file != root else file.name


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def _read(file: Path) -> str:
    try:
        text = read_bytes(file, MAX_FILE_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise InputError(f"{file}: no UTF-8 (byte {e.start})") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _split_inside(texts: list[str], fraction: float) -> tuple[list[str], list[str]]:
    train, valid = [], []
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
