"""The loss that training and evaluation share, and its mean over the bytes of a whole text.

The stream of tokens is cut into windows of the context's length; every token is predicted once, from those
before it in its window; the sum of the losses, those of the document ends included, is divided by the bytes
of text that the predicted tokens stand for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_hla.devices import compiled
from mlx_hla.errors import InputError
from mlx_hla.settings import check_whole
from mlx_hla.trees import cast

# B batch, T time


@contextlib.contextmanager
def lent(module: nn.Module, params: dict) -> Iterator[None]:
    """`module` computes with `params` in here, and has its own weights again afterwards, whatever happens.

    Inside a gradient or a compiled function `params` are traced arrays: none of them may stay in the module.
    """
    own = module.parameters()
    try:
        module.update(params)
        yield
    finally:
        module.update(own)


def token_losses(model: nn.Module, params: dict, tokens: mx.array, **options) -> mx.array:
    """Nats for each next token, [B, T - 1], float32, of the model with `params` for its weights."""
    with lent(model, params):
        logits = model(tokens[:, :-1], **options)
    return nn.losses.cross_entropy(logits.astype(mx.float32), tokens[:, 1:], reduction="none")


def weighted_sum(losses: mx.array, weights: mx.array) -> mx.array:
    """Σ weights · losses; what a loss of weight 0 is does not matter."""
    return mx.where(weights > 0, weights * losses, 0).sum()


def check_stream(stream: object) -> None:
    """Tokens in one row, as `data.encode_texts` gives them."""
    if not isinstance(stream, np.ndarray) or stream.ndim != 1 or stream.dtype.kind not in "iu":
        got = f"{stream.dtype} {stream.shape}" if isinstance(stream, np.ndarray) else repr(stream)[:60]
        raise InputError(f"a stream of tokens must be integers [T] of NumPy, got {got}")


def windows(stream: np.ndarray, batch_size: int, context: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The stream in order, every token predicted once: (tokens [B, context + 1], real [B, context]).

    `real` is False on the padding of the last batch. Every batch has the same shape, so nothing recompiles.
    """
    if len(stream) < 2:
        raise InputError(f"the validation text has {len(stream)} tokens: too few to predict one from another")
    # Rows and columns of padding alone would be memory and work for nothing.
    context = min(context, len(stream) - 1)
    starts = range(0, len(stream) - 1, context)
    batch_size = min(batch_size, len(starts))
    for first in range(0, len(starts), batch_size):
        tokens = np.zeros((batch_size, context + 1), np.int32)
        real = np.zeros((batch_size, context), bool)
        for row, start in enumerate(starts[first : first + batch_size]):
            part = stream[start : start + context + 1]
            tokens[row, : len(part)] = part
            real[row, : len(part) - 1] = True
        yield tokens, real


class Scorer:
    """Nats per byte of one stream of tokens, for the weights as they are at each call.

    team: a `train.team.Team` whose ranks have a part of every batch each.
    """

    def __init__(
        self,
        model: nn.Module,
        stream: np.ndarray,
        token_sizes: np.ndarray,
        *,
        batch_size: int,
        context: int,
        dtype: mx.Dtype,
        max_batches: int = 0,
        team: Any = None,
    ):
        check_whole("batch_size", batch_size, 1)
        check_whole("context", context, 1)
        check_whole("max_batches", max_batches, 0)
        check_stream(stream)
        if not isinstance(token_sizes, np.ndarray) or len(token_sizes) <= stream.max(initial=0):
            got = f"{len(token_sizes)}" if isinstance(token_sizes, np.ndarray) else repr(token_sizes)[:60]
            raise InputError(f"token_sizes must be an array with a size for every token, got {got}")
        if not isinstance(dtype, mx.Dtype) or not mx.issubdtype(dtype, mx.floating):
            raise InputError(f"dtype must be a float type of mlx.core, got {repr(dtype)[:60]}")
        self._batches: list[tuple[mx.array, mx.array]] = []
        self.bytes = 0
        for tokens, real in windows(stream, batch_size, context):
            if max_batches and len(self._batches) == max_batches:
                break
            batch = mx.array(tokens), mx.array(real)
            self._batches.append(batch if team is None else team.cut(*batch))
            self.bytes += int(token_sizes[tokens[:, 1:][real]].sum())
        if not self.bytes:
            raise InputError("the validation text has no bytes to predict")

        group = {} if team is None else {"group": team.sequence}

        def total(params, tokens, real):
            return (token_losses(model, cast(params, dtype), tokens, **group) * real).sum()

        self._total, self._team = compiled(total), team

    @property
    def batches(self) -> int:
        return len(self._batches)

    def __call__(self, params: dict, on_batch: Callable[[int, int], object] = lambda done, of: None) -> float:
        """`on_batch` hears of each batch before it is computed, and may raise to leave off."""
        nats = 0.0
        for done, (tokens, real) in enumerate(self._batches):
            on_batch(done, len(self._batches))
            nats += self._total(params, tokens, real).item()
        return (nats if self._team is None else self._team.total(nats, "a validation")) / self.bytes
