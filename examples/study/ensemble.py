"""Many small models trained at once: K members' parameters as rows of one matrix, `mx.vmap` of the gradient.

Small models are launch-bound, so K of them cost little more than one. Every member has its own start, data
and learning rate; the rest is shared:

    m ← β₁ m + (1 − β₁) c g ,  v ← β₂ v + (1 − β₂) c² g² ,  c = min(1, clip / ‖g‖)
    θ ← θ − η_t lr (m̂ / (√v̂ + ε) + λ θ)          η_t: warm-up, then a half cosine to 0
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_hla.losses import lent

# K members, P parameters, B batch, T time


@dataclass(frozen=True)
class Settings:
    steps: int
    warmup: float = 0.05
    clip: float = 1.0
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8


class Rows(NamedTuple):
    """Parameters and AdamW's moments, `[K, P]`."""

    params: mx.array
    m: mx.array
    v: mx.array


class Ensemble:
    """build(): a fresh model, drawn from MLX's random state; seeds and rates: one for each member.

    loss(outputs, y, w): a number. mapped=False walks over the members instead of `mx.vmap`.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        seeds: Sequence[int],
        rates: Sequence[float],
        loss: Callable[..., mx.array],
        settings: Settings,
        *,
        mapped: bool = True,
        compiled: bool = False,
    ):
        self.settings, self.loss, self.mapped = settings, loss, mapped
        self.rates = mx.array(rates)[:, None]
        rows = []
        for seed in seeds:
            mx.random.seed(seed)
            self.model = build()
            rows.append(_row(self.model))
        self.names = [(name, x.shape, x.size) for name, x in tree_flatten(self.model.trainable_parameters())]
        params = mx.stack(rows)
        self.rows = Rows(params, mx.zeros_like(params), mx.zeros_like(params))
        mx.eval(self.rows)
        self._step = mx.compile(self.step) if compiled else self.step

    def tree(self, rows: mx.array) -> dict:
        """Parameters `[K, ..]` from rows `[K, P]`."""
        ends = [0]
        for _, _, size in self.names:
            ends.append(ends[-1] + size)
        parts = mx.split(rows, ends[1:-1], axis=1)
        named = zip(self.names, parts, strict=True)
        return tree_unflatten([(name, x.reshape(len(x), *shape)) for (name, shape, _), x in named])

    def _outputs(self, params: dict, x: mx.array) -> mx.array:
        with lent(self.model, params):
            return self.model(x)

    def gradients(self, params: mx.array, x, y, w) -> tuple[mx.array, mx.array]:
        """(losses `[K]`, gradients `[K, P]`) on batches x, y, w `[K, B, T, ..]`."""
        one = mx.value_and_grad(lambda p, x, y, w: self.loss(self._outputs(p, x), y, w))
        tree = self.tree(params)
        if self.mapped:
            losses, grads = mx.vmap(one)(tree, x, y, w)
        else:
            each = [one(_member(tree, i), x[i], y[i], w[i]) for i in range(len(params))]
            losses = mx.stack([loss for loss, _ in each])
            flats = [tree_flatten(g) for _, g in each]
            grads = tree_unflatten([(name, mx.stack([dict(f)[name] for f in flats])) for name, _ in flats[0]])
        grads = dict(tree_flatten(grads))
        return losses, mx.concatenate([grads[n].reshape(len(params), -1) for n, _, _ in self.names], axis=1)

    def step(self, rows: Rows, t: mx.array, x, y, w) -> tuple[Rows, mx.array]:
        """One step of AdamW, t = 1, 2, .."""
        s = self.settings
        params, m, v = rows
        losses, g = self.gradients(params, x, y, w)
        norm = mx.sqrt((g * g).sum(axis=1, keepdims=True))
        g = g * mx.minimum(1.0, s.clip / (norm + 1e-12))
        m = s.beta1 * m + (1 - s.beta1) * g
        v = s.beta2 * v + (1 - s.beta2) * g * g
        warm = max(1.0, s.warmup * s.steps)
        rest = mx.clip((t - warm) / max(1.0, s.steps - warm), 0.0, 1.0)
        rate = self.rates * mx.minimum(t / warm, 0.5 + 0.5 * mx.cos(mx.pi * rest))
        unbiased = mx.sqrt(v / (1 - s.beta2**t)) + s.eps
        update = m / (1 - s.beta1**t) / unbiased + s.weight_decay * params
        return Rows(params - rate * update, m, v), losses

    def train(self, t: int, x, y, w) -> mx.array:
        """Move on by one step, in the background; the members' losses `[K]`."""
        rows, losses = self._step(tuple(self.rows), mx.array(float(t)), x, y, w)
        self.rows = Rows(*rows)
        mx.async_eval(self.rows, losses)
        return losses

    def outputs(self, x: mx.array, members: slice = slice(None)) -> mx.array:
        """`[K, B, T, outputs]` of the members for the same x `[B, T, ..]`."""
        rows = self.rows.params[members]
        tree = self.tree(rows)
        if self.mapped:
            return mx.vmap(self._outputs, in_axes=(0, None))(tree, x)
        return mx.stack([self._outputs(_member(tree, i), x) for i in range(len(rows))])


def _row(model: nn.Module) -> mx.array:
    return mx.concatenate([x.reshape(-1) for _, x in tree_flatten(model.trainable_parameters())])


def _member(tree: dict, i: int) -> dict:
    return tree_unflatten([(name, x[i]) for name, x in tree_flatten(tree)])


def class_loss(outputs: mx.array, y: mx.array, w: mx.array) -> mx.array:
    """Cross-entropy in nats, averaged over the answers."""
    right = (outputs * (y[..., None] == mx.arange(outputs.shape[-1]))).sum(axis=-1)
    nats = mx.logsumexp(outputs, axis=-1) - right
    return (nats * w).sum() / mx.maximum(w.sum(), 1.0)


def square_loss(outputs: mx.array, y: mx.array, w: mx.array) -> mx.array:
    return (((outputs - y) ** 2).mean(axis=-1) * w).sum() / mx.maximum(w.sum(), 1.0)
