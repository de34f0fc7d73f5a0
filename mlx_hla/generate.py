"""Text from a language model, one token at a time, at a cost per token that does not grow with the text."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_hla.devices import compiled
from mlx_hla.errors import InputError
from mlx_hla.models import LanguageModel
from mlx_hla.models.lm import check_tokens
from mlx_hla.models.snapshot import LAST_TOKENS, Snapshot
from mlx_hla.nn.cache import arrays, eval_cache, fill
from mlx_hla.patience import PATIENCE
from mlx_hla.ranks import agree, exchange, fingerprint, gathered, waiting
from mlx_hla.sampling import Sampling
from mlx_hla.settings import check_whole
from mlx_hla.tokenizer import Tokenizer
from mlx_hla.trees import flat

# B batch, V vocabulary, W tokens of history

PREFILL_TOKENS = 512


def prefill(
    model: LanguageModel,
    tokens: mx.array,
    cache: list,
    chunk: int = PREFILL_TOKENS,
    group: Any = None,
) -> mx.array:
    """Read tokens [B, T] into the cache, `chunk` at a time; returns the logits [B, V] after the last.

    group: an `mx.distributed` group whose ranks read side by side, each with the same arguments: a rank reads
    its part of every `chunk` tokens a rank, and all end with the cache and the logits of the whole.
    """
    check_whole("chunk", chunk, 1)
    check_tokens("the prompt's tokens", tokens, model.config.vocab_size)
    T, ranks = tokens.shape[1], 1 if group is None else group.size()
    for start in range(0, T, ranks * chunk):
        part = tokens[:, start : start + ranks * chunk]
        if ranks > 1:  # the last rank has the last token, whatever remains
            n, rank = part.shape[1], group.rank()
            part = part[:, n * rank // ranks : n * (rank + 1) // ranks]
        x = model.features(part, cache, group=group)
        if start + ranks * chunk < T:
            eval_cache(cache)  # so that one chunk's activations live at a time
            PATIENCE.expect(PATIENCE.line)
    logits = (
        model.embedding.as_linear(x[:, -1]) if x.shape[1] else mx.zeros((len(x), model.config.vocab_size))
    )
    if ranks == 1:
        return logits
    eval_cache(cache)  # what is exchanged next does not wait for it
    return gathered(logits.astype(mx.float32), group)[-1].astype(logits.dtype)


def read(
    model: LanguageModel,
    tokens: Sequence[int] | mx.array,
    after: Snapshot | None = None,
    chunk: int = PREFILL_TOKENS,
    group: Any = None,
) -> Snapshot:
    """What the model holds of tokens [T], read at the beginning or `after` what it read before.

    group: as `prefill` takes it; every rank gets the whole Snapshot, and one may go on alone. Ranks with
    another model, prompt or chunk are told of in an InputError on all of them, and so is a rank that ends.
    """
    if not isinstance(model, nn.Module) or not (after is None or isinstance(after, Snapshot)):
        got = f"{type(model).__name__} and {type(after).__name__}"
        raise InputError(f"read takes a LanguageModel and a Snapshot or None, got {got}")
    ids = as_tokens(tokens)
    cache = model.make_cache() if after is None else after.fork()
    rows = ids[None] if ids.ndim == 1 else ids
    if group is None or group.size() == 1:
        logits = prefill(model, rows, cache, chunk)
    else:
        _alike(model, rows, after, chunk, group)
        with waiting(group, "reading the prompt"):
            logits = prefill(model, rows, cache, chunk, group)
            mx.eval(logits)
        exchange(group, b"", "the end of the prompt")  # else it may be what a lost rank left in memory
    if logits.shape[0] != 1:
        raise InputError(f"a snapshot is of one text, got {logits.shape[0]}")
    mx.eval(logits)
    eval_cache(cache)
    ids = ids.flatten().astype(mx.int32)
    seen = ids if after is None else mx.concatenate([after.tokens, ids])
    return Snapshot(cache, logits, seen[-LAST_TOKENS:], ids.size + (0 if after is None else after.length))


def _alike(model: LanguageModel, tokens: mx.array, after: Snapshot | None, chunk: int, group: Any) -> None:
    """InputError on every rank unless all read the same tokens into the same model."""
    before = {} if after is None else {"logits": after.logits, "tokens": after.tokens}
    about = {
        "chunk": chunk,
        "the model": fingerprint(flat(model.parameters())) + model.config.to_json(),
        "the prompt": fingerprint({"tokens": tokens}),
        "what was read before": fingerprint(before),
    }
    agree(group, "reading a prompt", about)


def _sampling(sampling: Sampling | None) -> Sampling:
    if sampling is None:
        return Sampling()
    if not isinstance(sampling, Sampling):
        raise InputError(f"sampling must be a Sampling, got {repr(sampling)[:60]}")
    return sampling


def as_tokens(prompt: Sequence[int] | np.ndarray | mx.array) -> mx.array:
    """Ids as they were given: no dtype may wrap or round them before they are checked."""
    if isinstance(prompt, mx.array):
        return prompt
    try:
        ids = np.asarray(prompt)
    except ValueError:
        raise InputError("the prompts of a batch must have the same length") from None
    if ids.size == 0:
        raise InputError("the prompt must have at least one token")
    if ids.dtype.kind not in "iu":
        raise InputError(f"the prompt must be tokens, which are integers, got {repr(prompt)[:60]}")
    return mx.array(ids)


def make_decoder(model: LanguageModel, sampling: Sampling, cache: list):
    """A function (token [B], history [B, W], key) -> (next token, logits [B, V], history, key) over `cache`.

    With states of constant size the whole step, sampling included, is one graph to compile. A key-value cache
    changes shape at every token, so there nothing is compiled.
    """

    def draw(logits, history, key):
        key, now = mx.random.split(key)
        token = sampling(logits, now, history)
        if history is not None:
            history = mx.concatenate([history[:, 1:], token[:, None]], axis=1)
        return token, history, key

    if not all(c.constant for c in cache):

        def step(token, history, key):
            logits = model.logits(token[:, None], cache)[:, -1]
            return draw(logits, history, key), logits

    else:
        template = [c.state for c in cache]

        @compiled
        def pure(token, history, key, state):
            work = [type(c)() for c in cache]
            for c, s in zip(work, fill(template, state), strict=True):
                c.state = s
            logits = model.logits(token[:, None], work)[:, -1]
            return draw(logits, history, key), logits, arrays([c.state for c in work])

        state = arrays(template)

        def step(token, history, key):
            nonlocal state
            drawn, logits, state = pure(token, history, key, state)
            for c, s in zip(cache, fill(template, state), strict=True):
                c.state = s
            return drawn, logits

    return draw, step


def generate_step(
    model: LanguageModel,
    prompt: Sequence[int] | mx.array | Snapshot,
    *,
    sampling: Sampling | None = None,
    max_tokens: int = -1,
    cache: list | None = None,
    chunk: int = PREFILL_TOKENS,
) -> Iterator[tuple[Any, mx.array]]:
    """Yield (tokens, logits) for ever, or `max_tokens` times.

    A prompt [T] yields tokens as ints and logits [V]; a batch of prompts of equal length [B, T] yields arrays
    [B] and [B, V]. A cache of earlier calls is continued, and holds all but the last token afterwards. A
    `Snapshot` in the place of the prompt is a prompt that was read before.
    """
    check_whole("max_tokens", max_tokens, -1)
    sampling = _sampling(sampling)
    if isinstance(prompt, Snapshot):
        history = _history(sampling, prompt.tokens[None])
        yield from _decode(model, sampling, prompt.fork(), prompt.logits, history, max_tokens, True)
        return
    ids = as_tokens(prompt)
    single = ids.ndim == 1
    tokens = ids[None] if single else ids
    cache = model.make_cache() if cache is None else cache
    logits = prefill(model, tokens, cache, chunk)
    tokens = tokens.astype(mx.int32)
    eval_cache(cache)
    yield from _decode(model, sampling, cache, logits, _history(sampling, tokens), max_tokens, single)


def _history(sampling: Sampling, tokens: mx.array) -> mx.array | None:
    """The tokens [B, W] that a repetition penalty looks back at; -1 where there was none."""
    if not sampling.penalizes:
        return None
    W = sampling.repetition_window
    blank = mx.full((tokens.shape[0], max(0, W - tokens.shape[1])), -1, mx.int32)
    return mx.concatenate([blank, tokens[:, -W:]], axis=1)


def _decode(model, sampling, cache, logits, history, max_tokens, single):
    draw, step = make_decoder(model, sampling, cache)
    token, history, key = draw(logits, history, sampling.first_key())
    mx.async_eval(token)
    count = 0
    while count != max_tokens:
        count += 1
        if count != max_tokens:
            # The next step is under way while the caller looks at this token.
            (upcoming, history, key), next_logits = step(token, history, key)
            mx.async_eval(upcoming)
        yield (token.item(), logits[0]) if single else (token, logits)
        if count != max_tokens:
            token, logits = upcoming, next_logits


class StopWatch:
    """Passes text on until one of the stop strings appears, however they fall across the pieces.

    Text that may be the beginning of a stop string is held back until that is decided.
    """

    def __init__(self, stops: str | Sequence[str]):
        several = (stops,) if isinstance(stops, str) else stops
        if not isinstance(several, list | tuple) or any(not isinstance(s, str) or not s for s in several):
            raise InputError(f"a stop string must be text and not empty, got {repr(stops)[:60]}")
        self._stops = tuple(several)
        self._held = ""
        self.stopped = False

    def add(self, text: str) -> str:
        """The text that is certain to come before any stop string."""
        if self.stopped:
            return ""
        held = self._held + text
        found = [at for at in (held.find(s) for s in self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return held[: min(found)]
        keep = max((_overlap(held, s) for s in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0


@dataclass(frozen=True)
class Chunk:
    """A piece of the text, and where the generation stands. The last has a `finish_reason`."""

    text: str
    token: int
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: float  # GB
    finish_reason: str | None = (
        None  # "length", "end" (the model closed the document) or "stop" (a stop string)
    )


def stream_generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int] | mx.array | Snapshot,
    *,
    max_tokens: int = 256,
    sampling: Sampling | None = None,
    stop: str | Sequence[str] = (),
    chunk: int = PREFILL_TOKENS,
) -> Iterator[Chunk]:
    """Continue `prompt` (a text that begins a document, tokens, a `Snapshot`) and yield the text as it comes.

    `stop`: a text, or several, before which to end.
    """
    check_whole("max_tokens", max_tokens, 1)
    if not hasattr(model, "config") or not hasattr(tokenizer, "vocab_size"):
        got = f"{type(model).__name__} and {type(tokenizer).__name__}"
        raise InputError(f"stream_generate takes a LanguageModel and its Tokenizer, got {got}")
    if isinstance(prompt, str):
        if not prompt:
            raise InputError("the prompt has no tokens: give some text to continue")
        prompt = mx.array(tokenizer.encode(prompt, bos=True))
    if not isinstance(prompt, Snapshot):
        prompt = as_tokens(prompt)
        if prompt.ndim != 1:
            raise InputError(f"the prompt must be one text or its tokens [T], got {prompt.shape}")
    prompt_tokens = prompt.length if isinstance(prompt, Snapshot) else prompt.size
    if tokenizer.vocab_size < model.config.vocab_size:
        raise InputError(
            f"the model writes {model.config.vocab_size} tokens, of which the tokenizer knows "
            f"{tokenizer.vocab_size}"
        )
    detokenizer, watch = tokenizer.stream(), StopWatch(stop)
    start = time.perf_counter()
    prompt_time, begun, reason = 0.0, start, None
    steps = generate_step(model, prompt, sampling=sampling, max_tokens=max_tokens, chunk=chunk)
    for count, (token, _) in enumerate(steps, 1):
        now = time.perf_counter()
        if count == 1:
            prompt_time, begun = now - start, now
        if token == tokenizer.eos_id:
            reason = "end"
        text = watch.add(detokenizer.add(token))
        if watch.stopped:
            reason = "stop"
        elif reason is None and count == max_tokens:
            reason = "length"
        if reason in ("end", "length"):
            text += watch.add(detokenizer.finish())
            text += watch.finish()
            reason = "stop" if watch.stopped else reason
        yield Chunk(
            text,
            token,
            prompt_tokens=prompt_tokens,
            prompt_tps=prompt_tokens / max(prompt_time, 1e-9),
            generation_tokens=count,
            # The first token comes out of the prompt's pass: the rate counts what came after it.
            generation_tps=(count - 1) / max(now - begun, 1e-9) if count > 1 else 0.0,
            peak_memory=mx.get_peak_memory() / 1e9,
            finish_reason=reason,
        )
        if reason:
            return


def generate(model: LanguageModel, tokenizer: Tokenizer, prompt: str, **options) -> str:
    """The whole continuation of `prompt`; options as `stream_generate` takes them."""
    return "".join(chunk.text for chunk in stream_generate(model, tokenizer, prompt, **options))
