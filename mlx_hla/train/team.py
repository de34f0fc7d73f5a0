"""The ranks that train one model together: who takes which part of a batch, and what they tell each other.

A batch of the settings is that of all ranks. R ranks are R / K groups with a part of its rows each, and the K
ranks of a group have a part of every row's tokens each (`sequence_parallel`; 1: every rank has whole rows).
A rank's loss is the sum over its tokens with weights that, over all ranks, have the mean 1 / tokens that
count: so the mean over the ranks of losses and gradients is that of one process with the whole batch,
however the tokens that count fall on the ranks. Dropout is drawn for the whole batch and each rank takes its
part, so it too is that of one process (with K > 1, if K divides the tokens of a row).

In a step of P parameters a rank sends 8 P (R - 1) / R bytes and receives as many: `nn.average_gradients` in
messages of 32 MB, exact here because the weights above make a sum of a mean. For the 5.9 million of the model
that ships, two ranks and 4 GB/s that is 6 ms. Beside it come two exchanges of a few bytes: whether to stop,
and whether all are there still. With K > 1 come what the layers exchange (`ops.parallel`), around all ranks
where R > K (`Part`).
"""

# R ranks, K ranks of a sequence, B batch, T time, b and t a rank's part of them

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlx_hla.errors import InputError
from mlx_hla.launched import join
from mlx_hla.models import ModelConfig
from mlx_hla.models.lm import Place
from mlx_hla.ranks import Part, agree, blobs_of_first, exchange, fingerprint, summed, waiting
from mlx_hla.settings import check_whole
from mlx_hla.trees import flat

MAX_BLOB = 1 << 26
PATHS = ("out", "data", "extra", "tokenizer", "init_from", "model")  # a machine may have its own


class Share(NamedTuple):
    """A rank's part of the batch: of `rows` equal parts the one at `row`, and of its tokens likewise."""

    row: int = 0
    rows: int = 1
    column: int = 0
    columns: int = 1


ONE = Share()


class Team:
    """The ranks of a group, or the one process that there is without."""

    def __init__(self, group: mx.distributed.Group | None = None, sequence_parallel: int = 1):
        self._group = group
        self.rank, self.size = (0, 1) if group is None else (group.rank(), group.size())
        K = check_whole("sequence_parallel", sequence_parallel, 1)
        if self.size % K:
            raise InputError(f"sequence_parallel must divide the number of ranks, {self.size}, got {K}")
        self.share = Share(self.rank // K, self.size // K, self.rank % K, K)
        self.sequence: Any = None  # the group that tokens are split over
        if group is not None and K > 1:
            self.sequence = group if self.size == K else Part(group, K)

    @property
    def first(self) -> bool:
        """Whether this rank is the one that reads checkpoints, writes and tells."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.size == 1

    def part(self, batch: Any) -> tuple[mx.array, mx.array]:
        """This rank's tokens [b, t + 1] and weights [b, t] of a batch: tokens, or tokens and counts."""
        tokens, counts = batch if isinstance(batch, tuple) else (batch, None)
        shape = (tokens.shape[0], tokens.shape[1] - 1)
        counts = mx.ones(shape) if counts is None else counts.astype(mx.float32)
        return self.cut(tokens, counts * (self.size / mx.maximum(counts.sum(), 1)))

    def place(self, batch_size: int) -> Place | None:
        """Where this rank's part is in a batch."""
        row, rows, column, columns = self.share
        b = -(-batch_size // rows)
        return None if self.alone else Place(row * b, batch_size, column, columns)

    def check_split(self, config: ModelConfig, settings: Any) -> None:
        """InputError where such a run cannot be split so."""
        _, rows, _, K = self.share
        if settings.batch_size < rows:
            raise InputError(
                f"batch_size is that of all ranks together: it must be at least {rows}, one row for each "
                f"{'rank' if K == 1 else f'{K} ranks'}, got {settings.batch_size}"
            )
        if K == 1:
            return
        if settings.checkpoint_blocks:
            raise InputError("checkpoint_blocks does not go with sequence_parallel: leave out one of them")
        if not config.constant_state:
            raise InputError("sequence_parallel needs constant states: softmax attention sees every token")
        if config.context < K:
            raise InputError(f"sequence_parallel must be at most the context, {config.context}, got {K}")

    def __str__(self) -> str:
        """For the line that a run begins with."""
        K = self.share.columns
        return "" if self.alone else f", {self.size} ranks" + (f", {K} to a sequence" if K > 1 else "")

    def cut(self, tokens: mx.array, weights: mx.array) -> tuple[mx.array, mx.array]:
        """Of tokens [B, T + 1] and weights [B, T] the part [b, t + 1] and [b, t] of this rank.

        Rows and columns that would be missing for equal parts are padding, of weight 0.
        """
        row, rows, column, columns = self.share
        B, T = weights.shape
        b, t = -(-B // rows), -(-T // columns)
        missing = [(0, b * rows - B), (0, t * columns - T)]
        own, start = slice(row * b, (row + 1) * b), column * t
        tokens, weights = mx.pad(tokens, missing), mx.pad(weights, missing)
        return tokens[own, start : start + t + 1], weights[own, start : start + t]

    def mean(self, tree: Any, what: str) -> Any:
        """The mean of arrays over the ranks, of the same bits on all of them."""
        if self._group is None:
            return tree
        with self.waiting(what):
            mx.eval(tree)  # what its graph exchanges comes before
            out = nn.average_gradients(tree, self._group)
            mx.eval(out)
        self.meet(what)  # else the mean may be of what a lost rank left in memory
        return out

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        if self._group is None:
            yield
            return
        with waiting(self._group, what):
            yield

    def computing(self, what: str) -> AbstractContextManager[None]:
        """`waiting`, where a pass through the model waits for the other ranks of the sequence."""
        return self.waiting(what) if self.sequence is not None else nullcontext()

    def agree(self, what: str, about: dict[str, object]) -> None:
        if self._group is not None:
            agree(self._group, what, about)

    def any(self, flag: bool, what: str) -> bool:
        """Whether the flag is set on any rank."""
        if self._group is None:
            return flag
        return any(each != b"\0" for each in exchange(self._group, bytes([flag]), what))

    def total(self, number: float, what: str) -> float:
        """The sum of a number over the ranks, the same on all of them."""
        if self._group is None:
            return number
        return sum(
            struct.unpack("<d", each)[0] for each in exchange(self._group, struct.pack("<d", number), what)
        )

    def number_of_first(self, number: float | None, what: str) -> float | None:
        """What rank 0 has: a number or None."""
        if self._group is None:
            return number
        own = struct.pack("<?d", number is not None, number or 0.0)
        there, value = struct.unpack("<?d", exchange(self._group, own, what)[0])
        return value if there else None

    def blobs_of_first(self, make: Callable[[], Sequence[bytes]], count: int, what: str) -> list[bytes]:
        """`count` pieces of bytes that rank 0 makes, on every rank."""
        own = list(make()) if self.first else None
        if self._group is None:
            return own or []
        return blobs_of_first(self._group, own, count, MAX_BLOB, what)

    def tree_of_first(self, tree: Any, what: str) -> Any:
        """Rank 0's arrays, of the shapes that all have."""
        if self._group is None:
            return tree
        group = self._group
        words = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint32}

        def sent(a: mx.array) -> mx.array:
            bits = a.flatten().view(words[a.dtype.size])
            every = summed(bits if self.first else mx.zeros_like(bits), group)  # of whole numbers: exact
            mx.eval(every)
            return every.view(a.dtype).reshape(a.shape)

        with self.waiting(what):
            out = tree_map(sent, tree)
        self.meet(what)
        return out

    def meet(self, what: str) -> None:
        """No rank goes on before all are here."""
        self.any(False, what)


ALONE = Team()


def assemble(command: str, sequence_parallel: int = 1) -> Team:
    """The ranks that `mlx.launch` started for a command, or this process alone."""
    return Team(join(command), sequence_parallel)


def check_alike(team: Team, what: str, *settings: Any) -> None:
    """InputError on every rank unless all have the same settings, but for the places of things."""
    if not isinstance(team, Team):
        raise InputError(f"team must be a Team, got {repr(team)[:60]}")
    values: dict[str, object] = {"sequence_parallel": team.share.columns}
    for each in settings:
        values |= each if isinstance(each, dict) else dataclasses.asdict(each)
    team.agree(what, {name: value for name, value in values.items() if name not in PATHS})


def check_weights(team: Team, what: str, params: dict) -> None:
    """InputError on every rank unless all have read the same weights."""
    if not team.alone:
        team.agree("the weights", {what: fingerprint(flat(params))})
