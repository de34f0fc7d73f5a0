"""From logits to a token: pure functions on logits [B, V], and the settings that combine them."""

from __future__ import annotations

import math
import operator
import os
from dataclasses import dataclass

import mlx.core as mx

from mlx_hla.errors import InputError
from mlx_hla.settings import check_number, check_whole, option

# B batch, V vocabulary, W tokens of history

LEAST_TEMPERATURE = 1e-6  # below, logits over it would leave float32's range


def penalize_repetition(logits: mx.array, history: mx.array, penalty: float) -> mx.array:
    """Make the tokens of `history` [B, W] less likely: positive logits / penalty, negative ones · penalty.

    Entries of -1 stand for no token. How often a token occurs does not matter.
    """
    B, V = logits.shape
    index = mx.where(history < 0, V, history)  # column V catches the entries that are no token
    seen = mx.put_along_axis(mx.zeros((B, V + 1), mx.bool_), index, mx.array(True), axis=1)[:, :V]
    return mx.where(seen, mx.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: mx.array, k: int) -> mx.array:
    """All but the k largest become -inf."""
    if not 0 < check_whole("k", k, 0) < logits.shape[-1]:
        return logits
    rest = mx.argpartition(-logits, kth=k - 1, axis=-1)[:, k:]
    return mx.put_along_axis(logits, rest, mx.array(-math.inf, logits.dtype), axis=-1)


def keep_top_p(logits: mx.array, p: float) -> mx.array:
    """Keep the smallest set of most likely tokens whose probability reaches p; at least one."""
    if not 0 < check_number("p", p, 0, 1) < 1:
        return logits
    order = mx.argsort(-logits, axis=-1)
    probs = mx.softmax(mx.take_along_axis(logits, order, axis=-1).astype(mx.float32), axis=-1)
    before = mx.cumsum(probs, axis=-1) - probs
    keep = mx.put_along_axis(mx.zeros(logits.shape, mx.bool_), order, before < p, axis=-1)
    # Rounding must not drop the first.
    return mx.where(keep | (logits == logits.max(axis=-1, keepdims=True)), logits, -math.inf)


def keep_min_p(logits: mx.array, p: float) -> mx.array:
    """Keep the tokens at least p times as likely as the most likely one."""
    if check_number("p", p, 0, 1) == 0:
        return logits
    return mx.where(logits >= logits.max(axis=-1, keepdims=True) + math.log(p), logits, -math.inf)


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn, after repetition penalty, temperature, top-k, top-p and min-p in this order."""

    temperature: float = option(0.7, "0: always the most likely token")
    top_p: float = option(0.95, "keep the likeliest tokens that together reach this; 1: off")
    top_k: int = option(0, "keep this many of the likeliest tokens; 0: off")
    min_p: float = option(0.0, "drop tokens less likely than this times the likeliest; 0: off")
    repetition_penalty: float = option(1.0, "divide the logits of tokens seen lately; 1: off")
    repetition_window: int = option(64, "how many tokens back the penalty looks")
    seed: int | None = option(None, "none: another text each time")

    def __post_init__(self):
        check_number("temperature", self.temperature, 0, 100)
        if 0 < self.temperature < LEAST_TEMPERATURE:
            raise InputError(f"temperature must be 0 or at least {LEAST_TEMPERATURE}, got {self.temperature}")
        if check_number("top_p", self.top_p, 0, 1) == 0:
            raise InputError("top_p must be above 0 (1 turns it off), got 0")
        check_whole("top_k", self.top_k, 0)
        check_number("min_p", self.min_p, 0, 1)
        check_number("repetition_penalty", self.repetition_penalty, 0.01, 100)
        check_whole("repetition_window", self.repetition_window, 1, 1 << 20)
        if self.seed is not None:
            check_whole("seed", self.seed, 0, 2**63)

    @property
    def penalizes(self) -> bool:
        return self.repetition_penalty != 1

    def first_key(self) -> mx.array:
        if self.seed is None:
            return mx.random.key(int.from_bytes(os.urandom(7), "big"))
        return mx.random.key(operator.index(self.seed))

    def __call__(self, logits: mx.array, key: mx.array, history: mx.array | None = None) -> mx.array:
        """logits [B, V] to tokens [B], int32."""
        logits = logits.astype(mx.float32)
        if self.penalizes and history is not None:
            logits = penalize_repetition(logits, history, self.repetition_penalty)
        if self.temperature == 0:
            return mx.argmax(logits, axis=-1).astype(mx.int32)
        logits = keep_top_k(logits * (1 / self.temperature), self.top_k)
        logits = keep_min_p(keep_top_p(logits, self.top_p), self.min_p)
        return mx.random.categorical(logits, key=key).astype(mx.int32)
