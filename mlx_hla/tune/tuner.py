"""The step and the validation of a fine-tuning run: the loss over the tokens that count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_hla.devices import compiled
from mlx_hla.losses import token_losses
from mlx_hla.models import LanguageModel
from mlx_hla.train.step import Trainer
from mlx_hla.trees import cast
from mlx_hla.tune.options import FinetuneConfig


class Tuner(Trainer):
    """A `Trainer` of what is not frozen; a batch is (tokens [B, T + 1], counts [B, T])."""

    def __init__(self, model: LanguageModel, settings: FinetuneConfig):
        alike: Any = settings  # it has the fields that a trainer needs
        super().__init__(model, alike)

    def _loss(self, params, batch, key):
        s = self.settings
        tokens, counts = batch
        weights = cast(params, self._dtype)
        losses = token_losses(
            self._model, weights, tokens, dropout=s.dropout, key=key, checkpoint=s.checkpoint_blocks
        )
        return masked_mean(losses, counts)


def masked_mean(losses: mx.array, counts: mx.array) -> mx.array:
    """The mean of the losses [B, T] that count."""
    return mx.where(counts, losses, 0).sum() / mx.maximum(counts.sum(), 1)


class Validation:
    """Nats of the held-out tokens that count, for the weights as they are at each call."""

    def __init__(
        self,
        model: LanguageModel,
        batches: Sequence[tuple[np.ndarray, np.ndarray]],
        token_sizes: np.ndarray,
        dtype: mx.Dtype,
    ):
        self._batches = [(mx.array(tokens), mx.array(counts)) for tokens, counts in batches]
        self.tokens = sum(int(counts.sum()) for _, counts in batches)
        self.bytes = max(1, sum(int(token_sizes[tokens[:, 1:][counts]].sum()) for tokens, counts in batches))

        def total(params, tokens, counts):
            return mx.where(counts, token_losses(model, cast(params, dtype), tokens), 0).sum()

        self._total = compiled(total)

    def __call__(self, params: dict, on_batch: Callable[[int, int], object] = lambda done, of: None) -> float:
        """Nats per byte; `on_batch` may raise to leave off."""
        nats = 0.0
        for done, batch in enumerate(self._batches):
            on_batch(done, len(self._batches))
            nats += self._total(params, *batch).item()
        return nats / self.bytes
