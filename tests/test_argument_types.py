"""A value of a wrong type or size is refused in one line, wherever Python takes one."""

import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_hla import data, evaluate, sampling
from mlx_hla.errors import InputError
from mlx_hla.generate import StopWatch, generate, generate_step, prefill, stream_generate
from mlx_hla.losses import Scorer
from mlx_hla.models import LanguageModel, ModelConfig, load, save
from mlx_hla.sampling import Sampling
from mlx_hla.tokenizer import Tokenizer, train_tokenizer
from mlx_hla.train import TrainConfig, preset, resume, train

CONFIG = {"vocab_size": 380, "dims": 16, "num_layers": 2, "num_heads": 2, "hidden_dims": 24, "context": 32}
MODEL = LanguageModel(ModelConfig(**CONFIG))
TOKENIZER = train_tokenizer(["def f(x):\n    return x\nimport os, sys\n" * 30], 380)
STREAM = np.arange(100, dtype=np.uint16)
NUMBERS = [1.5, math.nan, math.inf, "3", None, True, [3], mx.array(1.5), -5]


def first(iterator):
    return next(iter(iterator))


def score(**options):
    given = {"batch_size": 2, "context": 16, "dtype": mx.float32, **options}
    return Scorer(MODEL, STREAM, np.ones(380), **given)


WHOLE = {
    "generate_step.max_tokens": lambda n: first(generate_step(MODEL, [1], max_tokens=n)),
    "generate_step.chunk": lambda n: first(generate_step(MODEL, [1], chunk=n)),
    "prefill.chunk": lambda n: prefill(MODEL, mx.array([[1]]), MODEL.make_cache(), n),
    "stream_generate.max_tokens": lambda n: first(stream_generate(MODEL, TOKENIZER, "x", max_tokens=n)),
    "generate.max_tokens": lambda n: generate(MODEL, TOKENIZER, "x", max_tokens=n),
    "top_k": lambda n: Sampling(top_k=n),
    "repetition_window": lambda n: Sampling(repetition_window=n),
    "keep_top_k": lambda n: sampling.keep_top_k(mx.zeros((1, 9)), n),
    "Batches.batch_size": lambda n: data.Batches(STREAM, n, 16, 0),
    "Batches.context": lambda n: data.Batches(STREAM, 2, n, 0),
    "Batches.seed": lambda n: data.Batches(STREAM, 2, 16, n),
    "Scorer.batch_size": lambda n: score(batch_size=n),
    "Scorer.context": lambda n: score(context=n),
    "Scorer.max_batches": lambda n: score(max_batches=n),
    "parse_share.samples": lambda n: evaluate.parse_share(MODEL, TOKENIZER, ["def f():"], samples=n),
    "parse_share.max_tokens": lambda n: evaluate.parse_share(
        MODEL, TOKENIZER, ["def f():"], samples=1, max_tokens=n
    ),
    "LanguageModel.seed": lambda n: LanguageModel(MODEL.config, n),
    "train_tokenizer": lambda n: train_tokenizer(["x"], n),
    "steps": lambda n: TrainConfig(steps=n),
    "dims": lambda n: ModelConfig(dims=n),
    "token_bytes": lambda n: TOKENIZER.token_bytes(n) if n is not True else TOKENIZER.token_bytes("x"),
}
REAL = {
    "temperature": lambda x: Sampling(temperature=x),
    "top_p": lambda x: Sampling(top_p=x),
    "min_p": lambda x: Sampling(min_p=x),
    "repetition_penalty": lambda x: Sampling(repetition_penalty=x),
    "keep_top_p": lambda x: sampling.keep_top_p(mx.zeros((1, 9)), x),
    "keep_min_p": lambda x: sampling.keep_min_p(mx.zeros((1, 9)), x),
    "load_corpus": lambda x: data.load_corpus("tests", x),
    "dropout": lambda x: MODEL(mx.array([[1]]), dropout=x, key=mx.random.key(0)),
    "lr": lambda x: TrainConfig(lr=x),
    "norm_eps": lambda x: ModelConfig(norm_eps=x),
}


def refused(call, *given):
    with pytest.raises(InputError) as e:
        call(*given)
    assert "\n" not in str(e.value)
    assert 10 < len(str(e.value)) < 300


@pytest.mark.parametrize("value", NUMBERS, ids=str)
@pytest.mark.parametrize("name", WHOLE)
def test_whole_numbers(name, value):
    if name == "LanguageModel.seed" and value is None:
        return
    refused(WHOLE[name], value)


@pytest.mark.parametrize("value", [v for v in NUMBERS if v != 1.5] + [10**400], ids=lambda v: str(v)[:9])
@pytest.mark.parametrize("name", REAL)
def test_real_numbers(name, value):
    refused(REAL[name], value)


OTHERS = {
    "stop letter by letter": lambda: StopWatch([3]),
    "stop empty": lambda: StopWatch(""),
    "stop bytes": lambda: StopWatch([b"x"]),
    "sampling dict": lambda: first(generate_step(MODEL, [1], sampling={"temperature": 1})),
    "sampling number": lambda: first(stream_generate(MODEL, TOKENIZER, "x", sampling=0.5)),
    "seed": lambda: Sampling(seed=1.0),
    "tiny temperature": lambda: Sampling(temperature=1e-38),
    "tinier temperature": lambda: Sampling(temperature=5e-324),
    "cache of another": lambda: MODEL(mx.array([[1]]), MODEL.make_cache()[:1]),
    "cache object": lambda: MODEL(mx.array([[1]]), MODEL.make_cache()[0]),
    "prompt number": lambda: first(stream_generate(MODEL, TOKENIZER, 3)),
    "prompt bytes": lambda: first(stream_generate(MODEL, TOKENIZER, b"x")),
    "prompt None": lambda: first(stream_generate(MODEL, TOKENIZER, None)),
    "config": lambda: LanguageModel({"dims": 16}),
    "load number": lambda: load(3),
    "load empty": lambda: load(""),
    "load dtype": lambda: load(None, "float32"),
    "load integers": lambda: load(None, mx.int32),
    "save number": lambda: save(3, MODEL, TOKENIZER),
    "save dtype": lambda: save("never", MODEL, TOKENIZER, mx.uint32),
    "proto": lambda: Tokenizer("text"),
    "encode": lambda: TOKENIZER.encode(b"x"),
    "decode": lambda: TOKENIZER.decode([380]),
    "decode negative": lambda: TOKENIZER.decode([-1]),
    "decode float": lambda: TOKENIZER.decode([1.5]),
    "corpus": lambda: data.load_corpus(b"x"),
    "preset": lambda: preset(["tiny"]),
    "preset field": lambda: preset("tiny", {"width": 3}),
    "preset field of train": lambda: preset("tiny", {}, {"epochs": 3}),
    "train": lambda: train("tiny", "runs"),
    "train settings": lambda: train(MODEL.config, {"steps": 3}),
    "resume": lambda: resume(None),
    "resume empty": lambda: resume(""),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_values(name):
    refused(OTHERS[name])


def test_one_stop_string_is_one():
    watch = StopWatch("return")
    assert "".join(map(watch.add, "runner, turn, ret")) == "runner, turn, "
    assert watch.add("urn x") == ""
    assert watch.stopped


def test_whole_numbers_of_numpy_are_whole_numbers():
    steps = generate_step(MODEL, np.array([1, 2]), max_tokens=np.int64(3), chunk=np.uint8(2))
    assert len(list(steps)) == 3
    assert Sampling(temperature=1e-6, seed=np.int64(4), top_k=np.int32(3)).first_key() is not None


def test_the_least_temperature_takes_the_likeliest():
    logits = mx.array([[0.0, 30.0, 29.0, -1e4]])
    for n in range(20):
        assert Sampling(temperature=1e-6, top_p=1.0)(logits, mx.random.key(n)).item() == 1
