"""What a fine-tuning run learns from: rows of tokens, and which of them count.

Text is read as `mlx-hla train` reads it. A file of JSON lines may instead hold examples, one a line:

    {"prompt": "...", "completion": "..."}
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

of which only the completion, or what the assistant says, counts for the loss. These models have no chat
format of their own: messages are written as "role:\\ncontent\\n", one after the other, and a prompt for the
adapted model ends with "assistant:\\n". A folder that has a valid.jsonl validates on that; else the
split is by a hash of the line.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_hla import data
from mlx_hla.errors import InputError
from mlx_hla.files import as_path, open_regular
from mlx_hla.losses import windows
from mlx_hla.settings import parse_json
from mlx_hla.tokenizer import Tokenizer
from mlx_hla.tune.options import FinetuneConfig

# B batch, T time

PADDED_TO = 32  # lengths of batches, so that few shapes are compiled
MAX_LINE = data.PIECE_BYTES
Segments = tuple[tuple[str, bool], ...]  # (text, whether it counts)


class Row(NamedTuple):
    """A document as the model sees it: tokens [T], and for each whether its prediction counts."""

    tokens: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True)
class Material:
    """Both parts, of plain texts or of examples."""

    name: str
    train: tuple[Segments, ...]
    valid: tuple[Segments, ...]
    examples: bool
    digest: str  # of every text, its side and what counts of it
    about: str

    @property
    def prompt(self) -> str:
        """The head of a held-out text, or the whole prompt of an example."""
        if self.examples:
            return self.valid[0][0][0]
        head = self.valid[0][0][0].lstrip().splitlines(keepends=True)[:3]
        return "".join(head)[:200] or "\n"


def read_material(settings: FinetuneConfig) -> Material:
    if settings.data is None:
        raise InputError("no data: give --data, a folder or a file to learn from")
    path = as_path("data", settings.data)
    files = _example_files(path, settings.suffix)
    if files:
        return _read_examples(path, files, settings)
    corpus = data.load_corpus(path, settings.valid_fraction, settings.max_bytes, settings.suffix)
    train, valid = (tuple(((text, True),) for text in part) for part in (corpus.train, corpus.valid))
    return Material(corpus.name, train, valid, False, corpus.digest, corpus.describe())


def _example_files(path: Path, suffix: str | None) -> list[Path]:
    """The files of JSON lines, if the first of them holds examples; else none.

    A folder counts if it has a train.jsonl, or no other text: examples beside code are part of the code.
    """
    files = [path] if path.suffix == ".jsonl" else []
    if path.is_dir() and suffix is None:
        texts = [p for p in path.iterdir() if p.suffix in data.TEXT_SUFFIXES and not p.is_dir()]
        files = sorted(p for p in texts if p.suffix == ".jsonl" and p.name != "test.jsonl")
        if "train.jsonl" not in {p.name for p in files} and any(p.suffix != ".jsonl" for p in texts):
            return []
    try:
        first = next(_lines(files[0]), None) if files else None
    except InputError:
        return []  # whoever reads it as text will say what is wrong, or leave it out
    return files if isinstance(first, dict) and ("messages" in first or "prompt" in first) else []


def _lines(file: Path) -> Iterator[Any]:
    with open_regular(file, data.MAX_CORPUS_BYTES) as opened:
        number = 0
        while line := opened.readline(MAX_LINE):
            number += 1
            if len(line) == MAX_LINE:
                raise InputError(f"{file}: line {number} has more than {MAX_LINE} bytes")
            if line.strip():
                yield parse_json(line, f"{file}: line {number}")


def _read_examples(path: Path, files: list[Path], settings: FinetuneConfig) -> Material:
    sides: tuple[list[Segments], list[Segments]] = ([], [])
    named = {f.name for f in files}
    left = data.MAX_CORPUS_BYTES if settings.max_bytes is None else settings.max_bytes
    seen = set()
    for file in files:
        for number, value in enumerate(_lines(file), 1):
            example = _segments(value, f"{file}: example {number}")
            key = hashlib.sha256(repr(example).encode()).digest()
            left -= sum(len(text.encode()) for text, _ in example)
            if left < 0:
                break
            if key in seen:
                continue
            seen.add(key)
            if "valid.jsonl" in named:
                held = file.name == "valid.jsonl"
            else:
                held = int.from_bytes(key[8:16], "big") < settings.valid_fraction * 2**64
            sides[held].append(example)
    train, valid = sides
    if not valid and len(train) > 1:
        valid = [train.pop()]
    if not train or not valid:
        raise InputError(
            f"{path}: {len(train)} + {len(valid)} examples are too few to learn from and to validate"
        )
    digest = hashlib.sha256(repr((train, valid)).encode()).hexdigest()
    about = f"{path}: {len(train)} + {len(valid)} examples to train and to validate; only answers count"
    return Material(str(path), tuple(train), tuple(valid), True, digest, about)


def _segments(value: Any, where: str) -> Segments:
    try:
        if "messages" in value:
            parts = []
            for message in value["messages"]:
                role, content = message["role"], message["content"]
                parts += [(f"{role}:\n", False), (f"{content}\n", role == "assistant")]
                if not isinstance(role, str) or not isinstance(content, str):
                    raise TypeError
        else:
            parts = [(value["prompt"], False), (value["completion"], True)]
        "".join(text for text, _ in parts).encode()  # fails for a lone surrogate, which JSON can write
    except (TypeError, KeyError, ValueError):
        raise InputError(
            f'{where} has neither "prompt" and "completion" nor "messages" of "role" and "content", all text'
        ) from None
    if not any(counts and text.strip() for text, counts in parts):
        raise InputError(f"{where} has no answer to learn")
    joined: list[tuple[str, bool]] = []
    for text, counts in parts:
        if joined and joined[-1][1] == counts:
            text = joined.pop()[0] + text
        joined.append((text, counts))
    return tuple(joined)


def encode(tokenizer: Tokenizer, segments: Segments) -> Row:
    """<s>, the segments, </s>. Each is encoded alone, as a prompt is when the model goes on from it."""
    ids, counts = [tokenizer.bos_id], [False]
    for text, learned in segments:
        part = tokenizer.encode(text)
        ids += part
        counts += [learned] * len(part)
    return Row(np.array([*ids, tokenizer.eos_id], np.int32), np.array([*counts, segments[-1][1]], bool))


def pieces(row: Row, context: int) -> list[Row]:
    """Windows of at most `context` + 1 tokens, of those that have something to learn.

    A text is cut where a window is full. An example stays one window: what is too long loses the beginning of
    its prompt, but not more than leaves half of a window, and then its end.
    """
    tokens, counts = row
    if counts[1:].all():
        starts = range(0, len(tokens) - 1, context)
        return [Row(tokens[s : s + context + 1], counts[s : s + context + 1]) for s in starts]
    first = int(np.argmax(counts))
    start = max(0, min(len(tokens) - context - 1, first - context // 2))
    kept = Row(tokens[start : start + context + 1], counts[start : start + context + 1])
    return [kept] if kept.counts[1:].any() else []


def padded(rows: Sequence[Row], context: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [B, T + 1], counts [B, T]); padding does not count, and comes after all that does."""
    longest = max(len(r.tokens) for r in rows) - 1
    T = min(context, -(-longest // PADDED_TO) * PADDED_TO)
    tokens, counts = np.zeros((len(rows), T + 1), np.int32), np.zeros((len(rows), T), bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row.tokens)] = row.tokens
        counts[i, : len(row.tokens) - 1] = row.counts[1:]
    return tokens, counts


class Windows:
    """Batches of rows, each row once a round, in an order that depends on the seed and the round alone."""

    def __init__(self, rows: Sequence[Row], batch_size: int, context: int, seed: int):
        if not rows:
            raise InputError("the data has nothing to learn: no window holds a token that counts")
        self._rows, self._batch_size, self._context, self._seed = rows, batch_size, context, seed
        self.tokens = sum(len(r.tokens) - 1 for r in rows) / len(rows)  # of a window, on average
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, int))

    def __getitem__(self, step: int) -> tuple[mx.array, mx.array]:
        """Batch number `step`: tokens [B, T + 1], counts [B, T]."""
        first = step * self._batch_size
        rows = [self._row(i) for i in range(first, first + self._batch_size)]
        tokens, counts = padded(rows, self._context)
        return mx.array(tokens), mx.array(counts)

    def _row(self, number: int) -> Row:
        turn, place = divmod(number, len(self._rows))
        if self._order[0] != turn:
            self._order = (turn, np.random.default_rng([self._seed, turn]).permutation(len(self._rows)))
        return self._rows[self._order[1][place]]


class Packed(data.Batches):
    """Windows at random places of all texts in one row; everything counts."""

    @property
    def tokens(self) -> int:
        return self._window.size - 1

    def __getitem__(self, step: int) -> Any:
        tokens = super().__getitem__(step)
        return tokens, mx.ones((tokens.shape[0], tokens.shape[1] - 1), mx.bool_)


def train_batches(material: Material, tokenizer: Tokenizer, settings: FinetuneConfig, context: int) -> Any:
    rows = [encode(tokenizer, s) for s in material.train]
    if settings.pack and not material.examples:
        stream = np.concatenate([r.tokens for r in rows])
        return Packed(stream, settings.batch_size, context, settings.seed)
    cut = [piece for row in rows for piece in pieces(row, context)]
    return Windows(cut, settings.batch_size, context, settings.seed)


def valid_batches(
    material: Material, tokenizer: Tokenizer, settings: FinetuneConfig, context: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """All batches of a validation, in order: (tokens [B, T + 1], counts [B, T])."""
    rows = [encode(tokenizer, s) for s in material.valid]
    size, most = settings.batch_size, settings.valid_batches or None
    if settings.pack and not material.examples:
        found = list(windows(np.concatenate([r.tokens for r in rows]), size, context))
    else:
        cut = [piece for row in rows for piece in pieces(row, context)]
        cut.sort(key=lambda row: len(row.tokens))  # batches of like lengths have little padding
        # A short validation is of every length, not of the shortest.
        found = [padded(cut[i : i + size], context) for i in range(0, len(cut), size)]
        if most is not None and len(found) > most:
            found = [found[i * len(found) // most] for i in range(most)]
    if not found:
        raise InputError(
            "the held-out examples have nothing to validate: no window holds a token that counts"
        )
    return found[:most]
