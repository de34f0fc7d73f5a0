"""The validation of a fine-tuning run: the loss over the held-out tokens that count."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from mlx_hla.devices import compiled
from mlx_hla.losses import token_losses
from mlx_hla.models import LanguageModel
from mlx_hla.train.team import ALONE, Team
from mlx_hla.trees import cast


class Validation:
    """Nats of the held-out tokens that count, for the weights as they are at each call."""

    def __init__(
        self,
        model: LanguageModel,
        batches: Sequence[tuple[np.ndarray, np.ndarray]],
        token_sizes: np.ndarray,
        dtype: mx.Dtype,
        team: Team = ALONE,
    ):
        self._batches = [team.cut(mx.array(tokens), mx.array(counts)) for tokens, counts in batches]
        self.tokens = sum(int(counts.sum()) for _, counts in batches)
        self.bytes = max(1, sum(int(token_sizes[tokens[:, 1:][counts]].sum()) for tokens, counts in batches))

        def total(params, tokens, counts):
            losses = token_losses(model, cast(params, dtype), tokens, group=team.sequence)
            return mx.where(counts, losses, 0).sum()

        self._total, self._team = compiled(total), team

    def __call__(self, params: dict, on_batch: Callable[[int, int], object] = lambda done, of: None) -> float:
        """Nats per byte; `on_batch` may raise to leave off."""
        nats = 0.0
        for done, batch in enumerate(self._batches):
            on_batch(done, len(self._batches))
            nats += self._total(params, *batch).item()
        return self._team.total(nats, "a validation") / self.bytes
