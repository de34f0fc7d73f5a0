"""A text that is read piece by piece and can be taken back: a recurrence cannot forget, but can start again.

A state is kept after every `every` tokens, so that going back to any length reads at most that many again. A
kept state costs what one state costs (2.4 MB for the shipped model), and the tokens 4 bytes each.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_hla.errors import InputError
from mlx_hla.generate import as_tokens, read
from mlx_hla.models import LanguageModel
from mlx_hla.models.snapshot import Snapshot
from mlx_hla.settings import check_whole


class Reading:
    """What `model` has read so far, as a `Snapshot` after any number of its tokens.

    `Reading(model).read(tokens)` reads; `rewind(length)` takes back what came after `length` tokens. Both
    return the snapshot of where the reading then stands, which `stream_generate` takes as a prompt.
    """

    def __init__(self, model: LanguageModel, every: int = 256):
        check_whole("every", every, 1)
        self._model, self._every = model, every
        self._tokens = mx.zeros((0,), mx.int32)
        self._kept: list[Snapshot] = []  # after `every`, 2 · `every`, .. tokens
        self._now: Snapshot | None = None

    def __len__(self) -> int:
        return self._tokens.size

    def read(self, tokens: Sequence[int] | mx.array) -> Snapshot:
        """Read tokens [T], at least one, after those that were read before."""
        ids = as_tokens(tokens)
        if ids.ndim != 1 or not ids.size:
            raise InputError(f"a reading takes tokens [T], at least one, got {ids.shape}")
        start = 0
        while start < ids.size:
            piece = ids[start : start + self._every - len(self) % self._every]
            self._now = read(self._model, piece, self._now)
            self._tokens = mx.concatenate([self._tokens, piece.astype(mx.int32)])
            start += piece.size
            if len(self) % self._every == 0:
                self._kept.append(self._now)
        assert self._now is not None
        return self._now

    def rewind(self, length: int) -> Snapshot:
        """Take back all but the first `length` tokens, at least one; reads at most `every` of them again."""
        check_whole("length", length, 1)
        if length > len(self):
            raise InputError(f"length must be at most the {len(self)} tokens that were read, got {length}")
        # The logits after the last token are part of a snapshot, so one at `length` itself will do.
        del self._kept[length // self._every :]
        self._now = self._kept[-1] if self._kept else None
        start = 0 if self._now is None else self._now.length
        again, self._tokens = self._tokens[start:length], self._tokens[:start]
        if self._now is None or again.size:
            return self.read(again)
        return self._now
