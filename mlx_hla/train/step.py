"""One optimisation step: float32 master weights, a forward and backward pass in the computation's dtype."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_map

from mlx_hla.devices import compiled, compute_dtype, on_gpu
from mlx_hla.losses import token_losses
from mlx_hla.models import LanguageModel
from mlx_hla.train.presets import TrainConfig
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
    are `params`, in and out of pure functions.
    """

    def __init__(self, model: LanguageModel, settings: TrainConfig):
        self.settings = settings
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

    def _loss(self, params, tokens, key):
        s = self.settings
        weights = cast(params, self._dtype)
        losses = token_losses(
            self._model, weights, tokens, dropout=s.dropout, key=key, checkpoint=s.checkpoint_blocks
        )
        return losses.mean()

    def _one_of_many(self, params, grads, tokens, key):
        loss, more = self._value_and_grad(params, tokens, key)
        return loss, tree_map(mx.add, grads, more)

    def _apply(self, params, state, grads, lr):
        grads = tree_map(lambda g: g / self.settings.accumulate, grads)
        grads, norm = optim.clip_grad_norm(grads, self.settings.clip)
        self._optimizer.state = {**state, "learning_rate": lr}
        params = self._optimizer.apply_gradients(grads, params)
        return norm, params, self._optimizer.state

    def _one_batch(self, params, state, tokens, key, lr):
        loss, grads = self._value_and_grad(params, tokens, key)
        return loss, *self._apply(params, state, grads, lr)

    def step(
        self, step: int, batches: list[mx.array], between: Callable[[], None] = lambda: None
    ) -> tuple[mx.array, mx.array]:
        """Take step number `step` on `accumulate` batches; returns its loss and gradient norm, lazy on a GPU.

        Dropout's key follows from the seed and the step: a resumed run draws what the first would have.
        `between` is called between two batches, and may raise: then the step has not been taken.
        """
        lr = mx.array(self.settings.learning_rate(step), mx.float32)
        key = mx.random.key((self.settings.seed << 32) + step)
        evaluate = mx.eval if self.waits else mx.async_eval
        if self.settings.accumulate == 1:
            loss, norm, params, state = self._whole(self.params, self.state, batches[0], key, lr)
        else:
            losses: list[mx.array] = []
            grads = tree_map(mx.zeros_like, self.params)
            for tokens, part in zip(batches, mx.random.split(key, len(batches)), strict=True):
                if losses:
                    between()
                one, grads = self._accumulate(self.params, grads, tokens, part)
                evaluate(one, grads)  # else all batches' activations would live at once
                losses.append(one)
            loss = mx.stack(losses).mean()
            norm, params, state = self._update(self.params, self.state, grads, lr)
        self.params, self.state = params, state
        evaluate(loss, norm, params, state)
        return loss, norm
