"""The tasks: random batches with their answers, vectorised in NumPy, made afresh for every step.

A batch is x `[n, T]` (tokens) or `[n, T, F]` (real vectors), y `[n, T]` (classes) or `[n, T, O]`, and two
masks `[n, T]`: w, where the loss is taken, and s, where the score is.

    recall   "a v", a → v                    join      "a b", "a v", b → v
    alias    "x v", "y x", y → v             hop3      "x v", "y x", "z y", z → v
    match3   is there i < j ≤ t with x_i + x_j + x_t ≡ 0 mod M?
    regress  x_i, y_i = w·x_i + noise, x → w·x       copy      a string, then the same string again
    parity   of the bits so far                      s3, s5    product of the permutations so far

Each list of pairs, and the list of questions, comes in an order of its own; the names of a sequence are all
different, the values are drawn with replacement. Training draws the number of pairs from 1 to P for every
sequence: with one pair the only value seen is the answer, and with few the second hop is soon found.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

# n sequences, T time, F features, O outputs, P pairs of a list at most

BLANK = 0


class Batch(NamedTuple):
    x: np.ndarray
    y: np.ndarray
    w: np.ndarray
    s: np.ndarray


@dataclass(frozen=True)
class Task:
    """inputs: tokens of the vocabulary, or features; outputs: classes, or numbers.

    make(rng, n, size): a batch; size: pairs of a list, `[n]` or a number, None for the task's own.
    sizes: those that are tested one by one. baselines(batch): scores of what needs no learning.
    layers: depth that the study uses. real: vectors in and out, scored by the mean squared error.
    """

    name: str
    T: int
    inputs: int
    outputs: int
    make: Callable[..., Batch]
    baselines: Callable[[Batch], dict[str, Any]]
    layers: int = 2
    sizes: tuple[int, ...] = ()
    real: bool = False
    about: dict[str, Any] = field(default_factory=dict)


# ---- pairs and questions

# The lists of a task, as (left, right) columns of the names a, b, c of one item; -1 is its value.
_LISTS = {
    "recall": ([(0, -1)], 0),
    "alias": ([(0, -1), (1, 0)], 1),
    "join": ([(0, 1), (0, -1)], 1),
    "hop3": ([(0, -1), (1, 0), (2, 1)], 2),
}


def _pairs(kind: str, P: int, names: int, values: int) -> Task:
    """The number of pairs of every sequence is drawn from 1 to P, unless the batch has a size."""
    lists, asked = _LISTS[kind]
    columns = 1 + max(max(pair) for pair in lists)
    if columns * P > names:
        raise ValueError(f"[{kind}] names must be at least {columns * P} for {P} pairs, got {names}")
    T = (2 * len(lists) + 1) * P

    def make(rng: np.random.Generator, n: int, size: Any = None) -> Batch:
        size = rng.integers(1, P + 1, n) if size is None else size
        size = np.broadcast_to(np.asarray(size), (n,))[:, None]
        chosen = 1 + np.argsort(rng.random((n, names)), axis=1)[:, : columns * P].reshape(n, columns, P)
        value = rng.integers(0, values, (n, P))
        item = [*np.moveaxis(chosen, 1, 0), 1 + names + value]
        real = np.arange(P) < size
        x, y = np.full((n, T), BLANK), np.zeros((n, T), np.int64)
        w = np.zeros((n, T), np.float32)
        for i in range(len(lists) + 1):
            # A random order of the items that are there; the blanks come after them.
            order = np.argsort(rng.random((n, P)) + ~real, axis=1)
            at = 2 * P * i
            if i < len(lists):
                for j, column in enumerate(lists[i]):
                    shown = np.where(real, np.take_along_axis(item[column], order, 1), BLANK)
                    x[:, at + j : at + 2 * P : 2] = shown
            else:
                x[:, at:] = np.where(real, np.take_along_axis(item[asked], order, 1), BLANK)
                y[:, at:] = np.take_along_axis(value, order, 1) * real
                w[:, at:] = real
        # The blanks to the front, so that what belongs together is as near with few pairs as with many.
        place = np.argsort(x != BLANK, axis=1, kind="stable")
        x, y, w = (np.take_along_axis(a, place, axis=1) for a in (x, y, w))
        return Batch(x.astype(np.int32), y.astype(np.int32), w, w)

    def baselines(batch: Batch) -> dict[str, Any]:
        """`chance`: always one value. `seen`: the value that is shown most often in the sequence."""
        counts = (batch.x[:, :, None] == 1 + names + np.arange(values)).sum(1)
        best = np.argmax(counts, axis=1)[:, None]
        seen = ((batch.y == best) * batch.s).sum() / batch.s.sum()
        return {"chance": 1 / values, "seen": float(seen)}

    about = {"pairs": P, "names": names, "values": values}
    layers = 1 if kind in ("alias", "join") else 2
    sizes = tuple(p for p in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64) if p <= P)
    return Task(kind, T, 1 + names + values, values, make, baselines, layers, sizes, about=about)


def recall(P: int = 32, names: int = 64, values: int = 32) -> Task:
    return _pairs("recall", P, names, values)


def alias(P: int = 4, names: int = 12, values: int = 8) -> Task:
    return _pairs("alias", P, names, values)


def join(P: int = 4, names: int = 12, values: int = 8) -> Task:
    return _pairs("join", P, names, values)


def hop3(P: int = 4, names: int = 12, values: int = 8) -> Task:
    return _pairs("hop3", P, names, values)


# ---- answers at every token


def _by_place(batch: Batch) -> float:
    """Accuracy of the best answer that looks at the place in the sequence only."""
    right = [(batch.y == c).mean(0) for c in np.unique(batch.y)]
    best = np.max(right, axis=0)
    return float((best * batch.s.mean(0)).sum() / batch.s.mean(0).sum())


def match3(T: int = 24, M: int = 97) -> Task:
    def make(rng: np.random.Generator, n: int, size: Any = None) -> Batch:
        x = rng.integers(0, M, (n, T))
        # pairs[r] at t: is there i < j ≤ t with x_i + x_j ≡ r?
        pairs, y = np.zeros((n, M), bool), np.zeros((n, T), np.int32)
        rows = np.arange(n)
        for t in range(T):
            for i in range(t):
                pairs[rows, (x[:, i] + x[:, t]) % M] = True
            y[:, t] = pairs[rows, -x[:, t] % M]
        ones = np.ones((n, T), np.float32)
        score = ones * (np.arange(T) >= T // 4)
        return Batch(x.astype(np.int32), y, score, score)

    return Task("match3", T, M, 2, make, lambda b: {"chance": _by_place(b)}, about={"modulus": M})


def _products(elements: int) -> np.ndarray:
    """table[a, b] of the permutations of `elements` things: first a, then b."""
    group = np.array(list(itertools.permutations(range(elements))))
    number = {tuple(p): i for i, p in enumerate(group)}
    return np.array([[number[tuple(b[a])] for b in group] for a in group])


def _running(name: str, table: np.ndarray, T: int) -> Task:
    """y_t = y_{t-1} · x_t in the group of this table, y_0 = x_0; the score is that of the second half."""
    size = len(table)

    def make(rng: np.random.Generator, n: int, _: Any = None) -> Batch:
        x = rng.integers(0, size, (n, T))
        y = x.copy()
        for t in range(1, T):
            y[:, t] = table[y[:, t - 1], x[:, t]]
        w = np.ones((n, T), np.float32)
        return Batch(x.astype(np.int32), y.astype(np.int32), w, w * (np.arange(T) >= T // 2))

    return Task(name, T, size, size, make, lambda _: {"chance": 1 / size})


def parity(T: int = 32) -> Task:
    return _running("parity", np.array([[0, 1], [1, 0]]), T)


def s3(T: int = 32) -> Task:
    return _running("s3", _products(3), T)


def s5(T: int = 32) -> Task:
    return _running("s5", _products(5), T)


def copy(L: int = 24, values: int = 32) -> Task:
    """L tokens, a blank, and the L tokens again but the last: at each the next one is asked for."""
    T = 2 * L

    def make(rng: np.random.Generator, n: int, size: Any = None) -> Batch:
        string = rng.integers(0, values, (n, L))
        x = np.concatenate([1 + string, np.full((n, 1), BLANK), 1 + string[:, :-1]], axis=1)
        y = np.concatenate([np.zeros_like(string), string], axis=1)
        w = np.broadcast_to(np.arange(T) >= L, (n, T)).astype(np.float32)
        return Batch(x.astype(np.int32), y.astype(np.int32), w, w)

    return Task("copy", T, 1 + values, values, make, lambda _: {"chance": 1 / values}, about={"length": L})
