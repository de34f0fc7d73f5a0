"""Layers, models, training, text: every public call with values of a wrong type or range."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_hla import data, evaluate, generate, monoid, nn, sampling
from mlx_hla.losses import Scorer
from mlx_hla.models import LanguageModel, ModelConfig, load, save
from mlx_hla.nn.cache import KVCache
from mlx_hla.sampling import Sampling
from mlx_hla.tokenizer import Tokenizer, train_tokenizer
from mlx_hla.train import TrainConfig, preset, resume, train

from .case import Case
from .good import SIZES, TEXTS
from .values import (
    DTYPES,
    NAN,
    NOT_ARRAY,
    NOT_BOOL,
    NOT_PATH,
    NOT_REAL,
    NOT_TEXT,
    NOT_WHOLE,
    STRANGE,
    label,
    without,
)

SEED, AN_ARGUMENT = 11, 100  # cases for each argument
STREAM, TOKEN_SIZES = np.arange(100, dtype=np.uint16), np.ones(380)


@cache
def model() -> LanguageModel:
    return LanguageModel(ModelConfig(**SIZES))


@cache
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, SIZES["vocab_size"])


def _first(iterator):
    return next(iter(iterator))


def _all(iterator):
    return list(iterator)


# what is called -> how, with one argument of a given value; and that argument's bad values
Row = tuple[str, Callable[[Any], Any], Sequence[Any]]
COUNT = without(NOT_WHOLE, None)
IDS: tuple[Any, ...] = (
    [380],
    [-1],
    [1.5],
    [True],
    [],
    [[]],
    [[1], [2, 3]],
    ["1"],
    [None],
    [2**31],
    [2**63],
    [10**30],
    NAN,
    3,
    3.5,
    True,
    None,
    mx.array([1.0, 2.0]),
    mx.array([380]),
    mx.array([-1]),
    mx.array([2**32 - 1], mx.uint32),
    mx.array([True]),
    mx.array(3),
    mx.zeros((0,), mx.int32),
    mx.zeros((1, 0), mx.int32),
    np.array([1.0]),
    np.array([2**63], np.uint64),
    np.array(["a"]),
    np.zeros((2, 2, 2), np.int32),
    Ellipsis,
    b"ab",
    {"a": 1},
)
BATCHES: tuple[Any, ...] = (
    *(x for x in IDS if isinstance(x, mx.array)),
    [[1, 2]],
    np.array([[1, 2]]),
    "text",
    None,
    mx.zeros((1, 2, 3), mx.int32),
    mx.full((2, 3), 380),
    mx.full((2, 3), -3),
    mx.zeros((2, 3)),
    mx.zeros((1, 1), mx.bool_),
)
STOPS = ("", [""], [3], [None], 3, 1.5, True, None, b"x", [b"x"], {"a": 1}, [["x"]], print)
SAMPLINGS = without((0.5, "greedy", {"temperature": 1}, True, Sampling, *STRANGE))
HEADS = (0, -1, 3, *COUNT)


def _text_rows() -> Iterator[Row]:
    def stream(**options):
        return _all(generate.stream_generate(model(), tokenizer(), "x", **{"max_tokens": 2, **options}))

    def step(prompt=(1,), **options):
        return _all(generate.generate_step(model(), list(prompt), **{"max_tokens": 2, **options}))

    yield "generate_step.prompt", lambda x: _first(generate.generate_step(model(), x, max_tokens=2)), IDS
    yield "stream_generate.prompt", lambda x: _first(generate.stream_generate(model(), tokenizer(), x)), IDS
    yield (
        "generate.prompt",
        lambda x: generate.generate(model(), tokenizer(), x, max_tokens=2),
        ("", "\ud800", *IDS),
    )
    yield "prefill.tokens", lambda x: generate.prefill(model(), x, model().make_cache()), BATCHES
    yield "LanguageModel.tokens", lambda x: model()(x), BATCHES
    yield "stream_generate.max_tokens", lambda x: stream(max_tokens=x), (0, *COUNT)
    yield "generate_step.max_tokens", lambda x: step(max_tokens=x), (-2, *COUNT)
    yield "stream_generate.chunk", lambda x: stream(chunk=x), (0, *COUNT)
    yield "generate_step.chunk", lambda x: step(chunk=x), (0, *COUNT)
    yield "stream_generate.stop", lambda x: stream(stop=x), STOPS
    yield "StopWatch", generate.StopWatch, STOPS
    yield "stream_generate.sampling", lambda x: stream(sampling=x), SAMPLINGS
    yield "generate_step.sampling", lambda x: step(sampling=x), SAMPLINGS
    yield "generate_step.cache", lambda x: step(cache=x() if isinstance(x, partial) else x), _caches()
    yield (
        "LanguageModel.cache",
        lambda x: model()(mx.array([[1]]), x() if isinstance(x, partial) else x),
        _caches(),
    )
    yield (
        "stream_generate.model",
        lambda x: _first(generate.stream_generate(x, tokenizer(), "x")),
        (None, "model", 3),
    )
    yield (
        "stream_generate.tokenizer",
        lambda x: _first(generate.stream_generate(model(), x, "x")),
        (None, "t", 3),
    )
    yield "Tokenizer", Tokenizer, ("text", b"", b"no model", None, 3, [1], b"\0" * 100)
    yield "Tokenizer.load", Tokenizer.load, (*NOT_PATH, "/", "/no/such/file", "/dev/zero", "a\0b")
    yield "encode", lambda x: tokenizer().encode(x), (*NOT_TEXT, "\ud800", "a\udfffb")
    yield (
        "decode",
        lambda x: tokenizer().decode(x),
        [x for x in IDS if not isinstance(x, mx.array | bytes | list)]
        + [[380], [-1], [1.5], ["1"], [None], [[1]]],
    )
    yield "token_bytes", lambda x: tokenizer().token_bytes(x), (380, -1, *without(NOT_WHOLE, True))
    yield "detokenizer", lambda x: tokenizer().stream().add(x), (380, -1, 1.5, "1", None, [1])
    yield "train_tokenizer.vocab_size", lambda x: train_tokenizer(TEXTS, x), (0, 300, *COUNT)
    yield (
        "train_tokenizer.texts",
        lambda x: train_tokenizer(x, 380),
        (3, None, [3], [b"x"], b"x", True, print),
    )


def _caches() -> list[Any]:
    def of(config: dict, kind: type | None = None) -> list:
        other = LanguageModel(ModelConfig(**{**SIZES, **config}))
        cache = other.make_cache()
        other(mx.array([[1, 2]]), cache)
        return cache

    def garbage(state):
        cache = model().make_cache()
        cache[0].state = state
        return cache

    return [
        3,
        "cache",
        (),
        [],
        [None],
        [3],
        ["x"],
        {"a": 1},
        partial(lambda: model().make_cache()[0]),
        partial(lambda: model().make_cache() * 2),
        partial(lambda: [KVCache()]),
        partial(of, {"operator": "ahla"}),
        partial(of, {"operator": 3}),
        partial(of, {"head_dim": 4}),
        partial(of, {"num_heads": 4}),
        partial(of, {"operator": "softmax"}),
        partial(of, {"conv_size": 3}),
        partial(of, {"dims": 32}),
        partial(garbage, (1, 2, 3)),
        partial(garbage, ("x", None, None)),
        partial(garbage, (None, mx.zeros((1, 3)), None)),
        partial(garbage, (None, "x", None)),
        partial(garbage, (None, None)),
        partial(garbage, 3),
    ]


def _setting_rows() -> Iterator[Row]:
    ranges = {
        ModelConfig: {
            "operator": ("", "hla9", "HLA2", 0, 17, -1, 10**9),
            "decay": ("", "gates", "None"),
            "qk_norm": ("", "rmsnorm"),
            "conv_size": (1, 65),
            "norm_eps": (0, -1e-5, 1, 1e300),
            "rope_theta": (0.5, -1, 1e300),
        },
        TrainConfig: {
            "valid_fraction": (0, 1, 2, -0.5),
            "lr": (0, -1),
            "clip": (0, -1),
            "weight_decay": (-1,),
            "dtype": ("", "float16", "int32", "FLOAT32"),
            "suffix": ("", ",", "/", "a/b", "..", "a.b"),
            "out": ("",),
            "data": ("",),
            "extra": ("",),
            "tokenizer": ("",),
            "seed": (-1, 2**32),
        },
        Sampling: {
            "seed": (-1, 2**64),
            "temperature": (-1, 1e-40, 101),
            "top_p": (0, 1.1),
            "min_p": (-0.1, 1.5),
        },
    }
    pools = {"int": NOT_WHOLE, "float": NOT_REAL, "bool": NOT_BOOL, "str": NOT_TEXT, "str | int": NOT_REAL}
    pools["tuple[str, ...]"] = (*NOT_TEXT, "ahla", ["ahla"], (), ("hla9",), ("ahla", 2), ("ahla",) * 600)
    for cls, own in ranges.items():
        for field in dataclasses.fields(cls):
            kind = str(field.type)
            pool = list(pools[kind.removesuffix(" | None")])
            if kind == "str | int":
                pool = without(tuple(pool), "1", "x", "", 10**400)
            if kind.endswith("None"):
                pool = without(tuple(pool), None)
            if kind == "int" and field.name not in ("valid_batches", "top_k", "warmup", "seed", "conv_size"):
                pool.append(0)
            pool += own.get(field.name, ())
            yield f"{cls.__name__}.{field.name}", partial(_with, cls, field.name), pool
        yield f"{cls.__name__}.unknown", lambda x, cls=cls: cls(**{x: 1}), ("dim", "layer", "Steps", "")
    yield "ModelConfig.from_dict", ModelConfig.from_dict, (None, [], 3, "x", {"a": 1}, {3: 1}, {"dims": None})
    yield "ModelConfig.load", ModelConfig.load, (*NOT_PATH, "/", "/no/such", "/dev/zero", "a\0b")
    yield "preset.name", preset, ("", "large", "TINY", None, 3, ["tiny"], b"tiny", {})
    yield "preset.model", lambda x: preset("tiny", x), ({"a": 1}, {3: 1}, {"dims": "x"}, 3, "dims", [1], True)
    yield "preset.train", lambda x: preset("tiny", {}, x), ({"a": 1}, {"lr": NAN}, 3, "lr", [("lr", 1)], b"x")


def _with(cls: type, name: str, value: Any) -> Any:
    return cls(**{name: value})


def _model_rows() -> Iterator[Row]:
    config = ModelConfig(**SIZES)
    key = mx.random.key(0)
    yield "LanguageModel.config", LanguageModel, (None, {}, "tiny", 3, ModelConfig)
    yield "LanguageModel.seed", lambda x: LanguageModel(config, x), (-1, 2**64, *COUNT)
    yield (
        "LanguageModel.dropout",
        lambda x: model()(mx.array([[1]]), dropout=x, key=key),
        (1, 1.5, -0.1, *NOT_REAL),
    )
    yield (
        "LanguageModel.key",
        lambda x: model()(mx.array([[1]]), dropout=0.5, key=x),
        (None, 3, "key", mx.array([1.0, 2.0]), mx.zeros((3,), mx.uint32), [1, 2]),
    )
    masks = (1.0, "causal", [[True]], mx.ones((1, 3)), mx.ones((3,), mx.bool_), mx.ones((2, 2), mx.bool_))
    yield "LanguageModel.mask", lambda x: model()(mx.array([[1, 2, 3]]), mask=x), masks
    segments = (1, "a", [[0]], mx.zeros((1, 3)), mx.zeros((3,), mx.int32), mx.zeros((1, 4), mx.int32))
    yield "LanguageModel.segment_ids", lambda x: model()(mx.array([[1, 2, 3]]), segment_ids=x), segments
    yield "load", load, (*NOT_PATH, "/no/such", "/", "/dev/null", "a\0b", "x" * 5000, "\ud800")
    yield "load.dtype", lambda x: load(None, x), ("float32", mx.int32, 3, np.float32, True, mx.bool_)
    yield "save.folder", lambda x: save(x, model(), tokenizer()), (*NOT_PATH, None, "a\0b", "/dev/null/x")
    yield "save.model", lambda x: save("/nonexistent/x", x, tokenizer()), (None, 3, "model")
    yield "save.dtype", lambda x: save("/nonexistent/x", model(), tokenizer(), x), ("float32", mx.int32, 3)
    yield "resume", resume, (*NOT_PATH, None, "/no/such", "a\0b", "/dev/null", "x" * 5000)
    yield "resume.steps", lambda x: resume("/no/such", x), (0, -1, *COUNT)
    yield "train.config", lambda x: train(x, TrainConfig()), (None, "tiny", {}, 3, ModelConfig)
    yield "train.settings", lambda x: train(config, x), (None, "runs", {}, 3, TrainConfig)
    yield (
        "load_corpus",
        data.load_corpus,
        (*NOT_PATH, "/no/such", "a\0b", "/dev/null", "/dev/zero", "x" * 5000),
    )
    yield "load_corpus.fraction", lambda x: data.load_corpus("tests", x), (0, 1, -1, *NOT_REAL)
    yield "load_corpus.max_bytes", lambda x: data.load_corpus("tests", 0.1, x), (0, 2**62, *COUNT)
    yield (
        "load_corpus.suffix",
        lambda x: data.load_corpus("tests", suffix=x),
        ("", ",", "/", *without(NOT_TEXT, None)),
    )
    for name in ("batch_size", "context", "seed"):
        given = {"batch_size": 2, "context": 16, "seed": 0}
        yield f"Batches.{name}", lambda x, n=name, g=given: data.Batches(STREAM, **{**g, n: x})[0], COUNT
    streams = (None, "text", 3, [1, 2], np.zeros((0,)), np.zeros(3, np.uint16), np.zeros((50, 2), np.uint16))
    yield "Batches.stream", lambda x: data.Batches(x, 2, 16, 0)[0], (*streams, np.full(90, 0.5))
    for name in ("batch_size", "context", "max_batches"):
        yield f"Scorer.{name}", lambda x, n=name: _score(**{n: x}), COUNT
    yield "Scorer.dtype", lambda x: _score(dtype=x)(model().parameters()), ("float32", None, 3, mx.int32)
    yield "Scorer.stream", lambda x: _score(stream=x), (*streams[:5], streams[6])
    yield "Scorer.token_sizes", lambda x: _score(sizes=x), (None, "x", 3, [1], np.ones(3), np.zeros(380))
    headers = (None, [], "", 3, [3], [None], [b"def f():"], b"x")
    yield "parse_share.headers", lambda x: _parse(headers=x), headers
    for name in ("samples", "max_tokens"):
        yield f"parse_share.{name}", lambda x, n=name: _parse(**{n: x}), (0, *COUNT)
    yield "parse_share.sampling", lambda x: _parse(sampling=x), SAMPLINGS
    logits = mx.zeros((1, 9))
    yield "keep_top_k", lambda x: sampling.keep_top_k(logits, x), COUNT
    yield "keep_top_p", lambda x: sampling.keep_top_p(logits, x), (-0.1, 1.1, *NOT_REAL)
    yield "keep_min_p", lambda x: sampling.keep_min_p(logits, x), (-0.1, 1.1, *NOT_REAL)
    kinds = ("", "hla9", None, 3, ["first"], *STRANGE)
    yield "monoid.identity", lambda x: monoid.identity(x, 2, 2), kinds
    yield "monoid.from_token", lambda x: monoid.from_token(x, *(np.ones(2) for _ in "qkv")), kinds
    first = monoid.identity("first", 2, 2)
    yield (
        "monoid.combine",
        lambda x: monoid.combine(first, x),
        (None, 3, "x", (1, 2, 3), monoid.identity("hla2", 2, 2)),
    )
    yield (
        "monoid.combine-both",
        lambda x: monoid.combine(x, copy.copy(x)),
        (None, 3, "x", (1, 2, 3), first._asdict()),
    )


def _score(stream=STREAM, sizes=TOKEN_SIZES, **options):
    given = {"batch_size": 2, "context": 16, "dtype": mx.float32, **options}
    return Scorer(model(), stream, sizes, **given)


def _parse(headers=("def f():",), **options):
    return evaluate.parse_share(model(), tokenizer(), headers, **{"samples": 1, "max_tokens": 2, **options})


def _layer_rows() -> Iterator[Row]:
    def layer(**options):
        attention = nn.HLAttention(**{"dims": 16, "num_heads": 2, **options})
        mx.eval(attention.parameters())
        return attention(mx.zeros((1, 3, 16)))

    x = mx.zeros((2, 5, 16))
    sizes = {
        "dims": (0, 15),
        "num_heads": (0, 3),
        "num_kv_heads": (0, 3),
        "head_dim": (0,),
        "value_dim": (0,),
    }
    for name, more in sizes.items():
        optional = name not in ("dims", "num_heads")
        pool = [*(COUNT if optional else NOT_WHOLE), *more]
        yield f"HLAttention.{name}", lambda v, n=name: layer(**{n: v}), pool
    yield "HLAttention.conv_size", lambda v: layer(conv_size=v), [1, *without(NOT_WHOLE, None)]
    for name in ("output_norm", "normalize", "bias"):
        yield f"HLAttention.{name}", lambda v, n=name: layer(**{n: v}), NOT_BOOL
    yield "HLAttention.output_gate", lambda v: layer(output_gate=v), ["relu", *NOT_BOOL]
    yield "HLAttention.rope", lambda v: layer(rope=v), [0, -1, *without(NOT_REAL, None, True)]
    yield "HLAttention.rope-odd", lambda v: layer(rope=True, head_dim=v), (1, 7)
    for name in ("decay", "qk_norm", "backend"):
        yield (
            f"HLAttention.{name}",
            lambda v, n=name: layer(**{n: v}),
            ["x", "", True, 3, mx.array(1), *STRANGE],
        )
    yield (
        "HLAttention.operator",
        lambda v: layer(operator=v),
        ["hla9", "", 0, 17, -1, 1.5, True, None, *STRANGE],
    )
    yield "HLAttention.unknown", lambda v: layer(**{v: 1}), ("heads", "head_dims", "Bias")
    attention = cache(lambda: nn.HLAttention(16, 2))
    inputs = [
        *NOT_ARRAY,
        None,
        mx.zeros((2, 16)),
        mx.zeros((2, 5, 15)),
        mx.zeros((0, 5, 16)),
        mx.zeros((2, 0, 16)),
    ]
    inputs += [mx.zeros((2, 5, 16), t) for t in DTYPES]
    yield "HLAttention.x", lambda v: attention()(v), inputs
    masks = ["causal", 1.0, mx.ones((2, 5)), mx.ones((5,), mx.bool_), mx.ones((2, 5, 5), mx.bool_), *STRANGE]
    yield "HLAttention.mask", lambda v: attention()(x, v), [*masks, np.ones((2, 5), bool)]
    ids = ["a", 1, mx.zeros((2, 5)), mx.zeros((5,), mx.int32), mx.zeros((2, 5), mx.bool_), *STRANGE]
    yield "HLAttention.segment_ids", lambda v: attention()(x, segment_ids=v), ids
    yield (
        "HLAttention.cache",
        lambda v: attention()(x, cache=v() if isinstance(v, partial) else v),
        [3, "x", [], KVCache(), {}, True, *map(partial, [_cache] * 6, range(6))],
    )
    turned = cache(lambda: nn.HLAttention(16, 2, rope=True, conv_size=0))
    offsets = ["x", 3, 1.5, mx.zeros((3,), mx.int32), mx.zeros((2,)), np.zeros(2, np.int32), [1, 2], True]
    yield "HLACache.offset", lambda v: turned()(x, cache=nn.HLACache.from_state((None, None, v))), offsets
    memories = ["x", 3, (), [1, 2], (x, x), [x, x, x, x], mx.zeros((2,)), monoid.identity("hla2", 2, 2), {}]
    yield "HLACache.memory", lambda v: turned()(x, cache=nn.HLACache.from_state((v, None, None))), memories
    yield "KVCache.from_state", KVCache.from_state, [3, "x", None, (), (1, 2), (1, 2, 3, 4), mx.zeros((3,))]
    yield (
        "HLACache.from_state",
        nn.HLACache.from_state,
        [3, "x", None, (), (1, 2), (1, 2, 3, 4), mx.zeros((3,))],
    )
    yield "ShortConv.channels", lambda v: nn.ShortConv(v), [0, *NOT_WHOLE]
    yield "ShortConv.width", lambda v: nn.ShortConv(4, v), [0, 1, *NOT_WHOLE]
    conv = cache(lambda: nn.ShortConv(16))
    yield "ShortConv.x", lambda v: conv()(v), inputs[:-1]
    states = [3, "x", mx.zeros((2, 3)), mx.zeros((2, 4, 16)), mx.zeros((1, 3, 16)), np.zeros((2, 3, 16)), []]
    yield "ShortConv.state", lambda v: conv()(x, v), states
    yield (
        "ShortConv.lengths",
        lambda v: conv()(x, lengths=v),
        [3, "x", [5, 5], mx.zeros((3,), mx.int32), mx.ones((2,))],
    )
    yield "ShortConv.segment_ids", lambda v: conv()(x, segment_ids=v), ids
    for name in ("fixed_decay", "spread_memories"):
        f = getattr(nn, name)
        yield f"{name}.heads", f, [0, *NOT_WHOLE]
        yield f"{name}.shortest", lambda v, f=f: f(2, v), [0, -1, 1e9, *NOT_REAL]
        yield f"{name}.longest", lambda v, f=f: f(2, 8.0, v), [0, 1, *NOT_REAL]
    yield "DecayGate.dims", lambda v: nn.DecayGate(v, 2), [0, *NOT_WHOLE]
    yield "DecayGate.heads", lambda v: nn.DecayGate(16, v), [0, *NOT_WHOLE]
    yield (
        "DecayGate.x",
        lambda v: nn.DecayGate(16, 2)(v),
        [3, "x", None, mx.zeros((2, 5, 15)), np.zeros((2, 5, 16))],
    )
    yield "SelfAttentionAdapter", nn.SelfAttentionAdapter, [None, 3, "x", nn.HLAttention, nn.ShortConv(4)]
    adapter = cache(lambda: nn.SelfAttentionAdapter(attention()))
    yield "SelfAttentionAdapter.x", lambda v: adapter()(v, v, v, "causal"), inputs
    yield "SelfAttentionAdapter.keys", lambda v: adapter()(x, v, x, "causal"), [None, x + 1, 3]
    full = mx.zeros((5, 5))
    yield (
        "SelfAttentionAdapter.mask",
        lambda v: adapter()(x, x, x, v),
        [None, "full", 3, full, full[0], True, [[1]]],
    )


def _cache(kind: int) -> nn.HLACache:
    """A cache that another layer left, or that nobody did."""
    other = nn.HLAttention(
        16, 2, **[{"operator": "ahla"}, {"head_dim": 4}, {"conv_size": 3}, {"num_heads": 4}][kind % 4]
    )
    left = other.make_cache()
    other(mx.zeros((1 if kind >= 4 else 2, 2, 16)), cache=left)
    return left


def cases() -> Iterator[Case]:
    for rows in (_text_rows, _setting_rows, _model_rows, _layer_rows):
        for name, call, pool in rows():
            rng = random.Random(f"{SEED} {name}")
            count = AN_ARGUMENT if len(pool) < 30 else 2 * AN_ARGUMENT
            for value in rng.sample(list(pool), min(count, len(pool))):
                shown = label(value)
                yield Case(f"library:{name}={shown}", partial(_run, call, value))


def _run(call: Callable[[Any], Any], value: Any, place: Any) -> Any:
    result = call(value)
    if isinstance(result, mx.array):
        mx.eval(result)
    return result
