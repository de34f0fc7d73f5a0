"""Samplers as functions, and generation: the same tokens as the whole pass gives, streamed safely."""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlx_hla import generate, sampling
from mlx_hla.errors import InputError
from mlx_hla.generate import StopWatch, generate_step, stream_generate
from mlx_hla.models import LanguageModel, ModelConfig
from mlx_hla.sampling import Sampling
from mlx_hla.tokenizer import train_tokenizer

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["def add(a, b):\n    return a + b  # é\n" * 30], 380)


@pytest.fixture(scope="module", params=["hla2", "softmax", "window,readout", "softmax,ahla"])
def model(request):
    config = ModelConfig(
        layers=tuple(request.param.split(",")),
        window=5,
        vocab_size=380,
        dims=32,
        num_layers=2,
        num_heads=2,
        hidden_dims=48,
        context=64,
    )
    return LanguageModel(config, seed=3)


# --- samplers


def logits_of(probs):
    return mx.log(mx.array([probs]))


def kept(logits):
    return [i for i, x in enumerate(logits[0].tolist()) if x > -np.inf]


@pytest.mark.parametrize(
    ("k", "want"),
    [(1, [1]), (2, [1, 3]), (3, [0, 1, 3]), (4, [0, 1, 2, 3]), (0, [0, 1, 2, 3]), (9, [0, 1, 2, 3])],
)
def test_top_k(k, want):
    assert kept(sampling.keep_top_k(logits_of([0.2, 0.4, 0.1, 0.3]), k)) == want


def test_top_k_with_ties_keeps_k():
    assert len(kept(sampling.keep_top_k(mx.zeros((1, 10)), 3))) == 3


@pytest.mark.parametrize(
    ("p", "want"),
    [
        (1e-9, [1]),
        (0.39, [1]),
        (0.41, [1, 3]),
        (0.69, [1, 3]),
        (0.71, [0, 1, 3]),
        (0.95, [0, 1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ],
)
def test_top_p(p, want):
    assert kept(sampling.keep_top_p(logits_of([0.2, 0.4, 0.1, 0.3]), p)) == want


@pytest.mark.parametrize(("p", "want"), [(0.0, [0, 1, 2, 3]), (0.3, [0, 1, 3]), (0.7, [1, 3]), (1.0, [1])])
def test_min_p(p, want):
    assert kept(sampling.keep_min_p(logits_of([0.2, 0.4, 0.1, 0.3]), p)) == want


def test_repetition_penalty():
    logits = mx.array([[2.0, -2.0, 3.0, -3.0], [2.0, -2.0, 3.0, -3.0]])
    history = mx.array([[0, 1, 0], [-1, -1, 3]])
    out = sampling.penalize_repetition(logits, history, 2.0)
    assert out.tolist() == [[1.0, -4.0, 3.0, -3.0], [2.0, -2.0, 3.0, -6.0]]


def test_draws_follow_the_distribution():
    probs = [0.1, 0.2, 0.3, 0.4]
    logits = mx.repeat(logits_of(probs), 20000, axis=0)
    for temperature, want in ((1.0, np.array(probs)), (0.5, np.array(probs) ** 2)):
        sample = Sampling(temperature=temperature, top_p=1.0)
        counts = np.bincount(np.array(sample(logits, mx.random.key(0))), minlength=4) / 20000
        assert np.abs(counts - want / want.sum()).max() < 0.015


def test_greedy_takes_the_largest():
    assert GREEDY(logits_of([0.2, 0.5, 0.3]), mx.random.key(0)).tolist() == [1]


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"repetition_window": 0},
        {"seed": -1},
        {"top_k": True},
    ],
    ids=str,
)
def test_bad_settings_are_refused(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        Sampling(**bad)


# --- generation


def naive(model, prompt, count):
    """Greedy decoding with a whole pass per token."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(model(mx.array([tokens]))[0, -1].argmax().item())
    return tokens[len(prompt) :]


@pytest.mark.parametrize("prompt", [[7], [7, 9], list(range(3, 60))], ids=len)
@pytest.mark.parametrize("chunk", [1, 16, 512])
def test_greedy_matches_whole_passes(model, prompt, chunk):
    steps = generate_step(model, prompt, sampling=GREEDY, max_tokens=12, chunk=chunk)
    assert [t for t, _ in steps] == naive(model, prompt, 12)


def test_compiled_step_gives_the_same_tokens(monkeypatch):
    config = ModelConfig(vocab_size=60, dims=16, num_layers=1, num_heads=1, hidden_dims=16, context=64)
    model = LanguageModel(config, seed=3)
    options = {"sampling": Sampling(seed=5, repetition_penalty=1.2), "max_tokens": 10}
    plain = [t for t, _ in generate_step(model, [4, 5], **options)]
    monkeypatch.setattr(generate, "compiled", mx.compile)
    assert [t for t, _ in generate_step(model, [4, 5], **options)] == plain


def test_batch_gives_each_row_its_own_text(model):
    rows = [[4, 5, 6], [9, 8, 7]]
    steps = list(generate_step(model, mx.array(rows), sampling=GREEDY, max_tokens=6))
    got = [[t[i].item() for t, _ in steps] for i in range(2)]
    assert got == [naive(model, row, 6) for row in rows]
    assert steps[0][1].shape == (2, 380)


def test_seed_decides_the_text(model):
    def draw(seed):
        return [t for t, _ in generate_step(model, [4, 5], sampling=Sampling(seed=seed), max_tokens=20)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(None) != draw(None)


def test_a_cache_is_continued(model):
    prompt = list(range(5, 25))
    want = [t for t, _ in generate_step(model, prompt, sampling=GREEDY, max_tokens=4)]
    cache = model.make_cache()
    list(generate_step(model, prompt[:11], sampling=GREEDY, max_tokens=1, cache=cache))
    got = [t for t, _ in generate_step(model, prompt[11:], sampling=GREEDY, max_tokens=4, cache=cache)]
    assert got == want


def test_repetition_penalty_ends_repetition(model):
    def distinct(penalty):
        sample = Sampling(temperature=0, repetition_penalty=penalty, repetition_window=100)
        return len({t for t, _ in generate_step(model, [4, 5], sampling=sample, max_tokens=30)})

    assert distinct(100.0) == 30 > distinct(1.0)


MODEL = SimpleNamespace(config=SimpleNamespace(vocab_size=380))  # it only says what `script` lets it


def script(monkeypatch, ids):
    """Let "the model" write these tokens."""
    monkeypatch.setattr(
        generate, "generate_step", lambda *a, max_tokens, **k: ((i, None) for i in ids[:max_tokens])
    )


def test_stream_is_safe_and_counts(monkeypatch, tokenizer):
    text = "x = 'é日🎉'\n    return"
    ids = tokenizer.encode(text)
    script(monkeypatch, ids)
    chunks = list(stream_generate(MODEL, tokenizer, "def", max_tokens=len(ids)))
    assert "".join(c.text for c in chunks) == text
    assert all("\ufffd" not in c.text for c in chunks)
    assert [c.generation_tokens for c in chunks] == list(range(1, len(ids) + 1))
    assert chunks[-1].finish_reason == "length"
    assert chunks[0].finish_reason is None
    assert chunks[-1].prompt_tokens == len(tokenizer.encode("def")) + 1
    assert chunks[-1].generation_tps > 0


def test_half_a_character_at_the_end_is_shown_as_such(monkeypatch, tokenizer):
    ids = tokenizer.encode("日")
    script(monkeypatch, ids)
    assert generate.generate(MODEL, tokenizer, "def", max_tokens=len(ids) - 1) == "\ufffd"


def test_end_of_document_ends(monkeypatch, tokenizer):
    script(monkeypatch, [*tokenizer.encode("ab"), tokenizer.eos_id, *tokenizer.encode("cd")])
    chunks = list(stream_generate(MODEL, tokenizer, "def"))
    assert "".join(c.text for c in chunks) == "ab"
    assert chunks[-1].finish_reason == "end"


@pytest.mark.parametrize(
    ("text", "stops", "want"),
    [
        ("return a + b\n\ndef", ["\n\n"], "return a + b"),
        ("return a + b", ["urn a"], "ret"),
        ("aab aac", ["aac", "b a"], "aa"),
        ("abababc", ["ababc"], "ab"),
        ("no stop here", ["stops"], "no stop here"),
        ("ends with hal", ["half"], "ends with hal"),
        ("é日🎉x", ["🎉"], "é日"),
    ],
)
def test_stop_strings_across_tokens(monkeypatch, tokenizer, text, stops, want):
    script(monkeypatch, tokenizer.encode(text))
    count = len(tokenizer.encode(text))
    chunks = list(stream_generate(MODEL, tokenizer, "def", max_tokens=count, stop=stops))
    assert "".join(c.text for c in chunks) == want
    assert chunks[-1].finish_reason == ("length" if want == text else "stop")


def test_stop_watch_letter_by_letter():
    for text in ("xxENDyy", "xxEENDyy", "ENENDEND", "xxEN"):
        watch = StopWatch(["END"])
        out = "".join(map(watch.add, text))
        assert out + watch.finish() == text.split("END")[0]
        assert watch.stopped == ("END" in text)


def test_bad_prompts_are_refused(model, tokenizer):
    for prompt, match in (
        ("", "no tokens"),
        ([], "at least one token"),
        ([5000], "must be from 0 to 379, got 5000"),
        ([-1], "must be from 0 to 379, got -1"),
        ([2**40], "must be from 0 to 379, got 1099511627776"),
        ([2**32 + 5], "must be from 0 to 379"),
        ([380], "must be from 0 to 379"),
        ([1.0], "integers"),
        ([True], "integers"),
        (["def"], "integers"),
        ([None], "integers"),
        (mx.array([1.0]), "array of integers"),
        (mx.array([2**32 + 5], mx.int64), "must be from 0 to 379"),
        (mx.array([[1, 2]]), "one text"),
        (mx.array([], mx.int32), "B, T >= 1"),
    ):
        with pytest.raises(InputError, match=match):
            next(stream_generate(model, tokenizer, prompt))
        if prompt != "" and match != "one text":
            with pytest.raises(InputError, match=match):
                next(generate_step(model, prompt))
    with pytest.raises(InputError, match="same length"):
        next(generate_step(model, [[1, 2], [3]]))
    with pytest.raises(InputError, match="integers"):
        next(generate_step(model, "def"))
    small = train_tokenizer(["import os\nx = 1\n" * 30], 370)
    with pytest.raises(InputError, match="of which the tokenizer knows 370"):
        next(stream_generate(model, small, "x"))
    with pytest.raises(InputError, match="at least one token"):
        next(generate_step(model, []))
    with pytest.raises(InputError, match="max_tokens"):
        next(stream_generate(model, tokenizer, "x", max_tokens=0))
    with pytest.raises(InputError, match="stop string"):
        next(stream_generate(model, tokenizer, "x", stop=[""]))
