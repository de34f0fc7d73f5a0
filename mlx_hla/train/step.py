"""One optimisation step: float32 master weights, a forward and backward pass in the computation's dtype.

Where ranks train together, each takes its part of a batch, and the step exchanges one mean of losses and
gradients: every rank then takes the same step with all of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_map

from mlx_hla.devices import compiled, compute_dtype, on_gpu
from mlx_hla.losses import token_losses, weighted_sum
from mlx_hla.models import LanguageModel
from mlx_hla.train.presets import TrainConfig
from mlx_hla.train.team import ALONE, Team
from mlx_hla.trees import cast


class AdamW(optim.AdamW):
    """AdamW that leaves vectors (norms, biases) undecayed."""

    def apply_single(self, gradient, parameter, state):
        if parameter.ndim < 2:
            return optim.Adam.apply_single(self, gradient, parameter, state)
        return super().apply_single(gradient, parameter, state)


class Trainer:
    """The weights, the optimizer's state, and the compiled step between them.

    The model object lends its computation only, and keeps the weights that it came with: what is trained
    are `params`, in and out of pure functions. A batch is tokens [B, T + 1], or those and counts [B, T]: the
    loss is the mean over the tokens that count, all of them without counts.
    """

    def __init__(self, model: LanguageModel, settings: TrainConfig, team: Team = ALONE):
        self.settings = settings
        self.team = team
        self._model = model
        self._dtype = compute_dtype(settings.dtype)
        self._optimizer = AdamW(
            settings.lr,
            betas=[settings.beta1, settings.beta2],
            weight_decay=settings.weight_decay,
            bias_correction=True,
        )
        self.params = tree_map(lambda a: a.astype(mx.float32), model.trainable_parameters())
        self._optimizer.init(self.params)
        self.state = self._optimizer.state
        self._value_and_grad = mx.value_and_grad(self._loss)
        self._whole = compiled(self._one_batch)
        self._accumulate = compiled(self._one_of_many)
        self._update = compiled(self._apply)

    @property
    def waits(self) -> bool:
        """Whether a step is done when `step` returns: on a CPU a queue would delay a stop."""
        return not on_gpu()

    def _loss(self, params, part, key):
        s, (tokens, weights) = self.settings, part
        options = {"dropout": s.dropout, "key": key, "checkpoint": s.checkpoint_blocks}
        options |= {"group": self.team.sequence, "place": self.team.place(s.batch_size)}
        losses = token_losses(self._model, cast(params, self._dtype), tokens, **options)
        return weighted_sum(losses, weights)

    def _one_of_many(self, params, grads, part, key):
        loss, more = self._value_and_grad(params, part, key)
        return loss, tree_map(mx.add, grads, more)

    def _apply(self, params, state, grads, lr):
        grads = tree_map(lambda g: g / self.settings.accumulate, grads)
        grads, norm = optim.clip_grad_norm(grads, self.settings.clip)
        self._optimizer.state = {**state, "learning_rate": lr}
        params = self._optimizer.apply_gradients(grads, params)
        return norm, params, self._optimizer.state

    def _one_batch(self, params, state, part, key, lr):
        loss, grads = self._value_and_grad(params, part, key)
        return loss, *self._apply(params, state, grads, lr)

    def step(
        self, step: int, batches: Sequence[Any], between: Callable[[], None] = lambda: None
    ) -> tuple[mx.array, mx.array]:
        """Take step number `step` on `accumulate` batches; returns its loss and gradient norm, lazy on a GPU.

        Dropout's key follows from the seed and the step: a resumed run draws what the first would have.
        `between` is called between two batches, and may raise: then the step has not been taken.
        """
        lr = mx.array(self.settings.learning_rate(step), mx.float32)
        key = mx.random.key((self.settings.seed << 32) + step)
        evaluate = mx.eval if self.waits else mx.async_eval
        parts = [self.team.part(batch) for batch in batches]
        if self.settings.accumulate == 1 and self.team.alone:
            loss, norm, params, state = self._whole(self.params, self.state, parts[0], key, lr)
        else:
            losses: list[mx.array] = []
            grads = tree_map(mx.zeros_like, self.params)
            keys = [key] if len(parts) == 1 else mx.random.split(key, len(parts))
            for part, own in zip(parts, keys, strict=True):
                if losses:
                    between()
                with self.team.computing(f"step {step + 1}"):
                    one, grads = self._accumulate(self.params, grads, part, own)
                    evaluate(one, grads)  # else all batches' activations would live at once
                losses.append(one)
            loss, grads = self.team.mean((mx.stack(losses).mean(), grads), f"step {step + 1}")
            norm, params, state = self._update(self.params, self.state, grads, lr)
        self.params, self.state = params, state
        evaluate(loss, norm, params, state)
        return loss, norm
