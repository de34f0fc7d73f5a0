"""What a model has read, kept: in memory, in a file, taken back; and every file that is not such a state."""

import copy
import json
import os

import mlx.core as mx
import numpy as np
import pytest

from mlx_hla import cli, reading
from mlx_hla.errors import InputError
from mlx_hla.generate import generate_step, read, stream_generate
from mlx_hla.models import LanguageModel, ModelConfig, load
from mlx_hla.models.snapshot import LAST_TOKENS, digest, load_snapshot, save_snapshot
from mlx_hla.reading import Reading
from mlx_hla.sampling import Sampling
from mlx_hla.trees import cast

GREEDY = Sampling(temperature=0)
SIZES = {"vocab_size": 50, "dims": 32, "num_layers": 2, "num_heads": 4, "hidden_dims": 64, "context": 32}


def build(seed=3, **options):
    model = LanguageModel(ModelConfig(**SIZES | options), seed=seed)
    mx.eval(model.parameters())
    return model


@pytest.fixture(scope="module")
def model():
    return build()


def ids(n, seed=0):
    return np.random.default_rng(seed).integers(0, 50, n).tolist()


def continuation(model, start, count=12, sampling=GREEDY):
    return [t for t, _ in generate_step(model, start, sampling=sampling, max_tokens=count)]


@pytest.mark.parametrize("operator", ["first", "hla2", "readout", 4, "window", "window,ahla"])
@pytest.mark.parametrize("rope", [None, 10000.0])
def test_a_file_goes_on_where_the_prompt_ended(tmp_path, operator, rope):
    mixers = {"layers": tuple(operator.split(","))} if "," in str(operator) else {"operator": operator}
    model = build(**mixers, rope_theta=rope, window=20)
    prompt, more = ids(70), ids(9, 1)
    save_snapshot(tmp_path / "a", model, read(model, prompt))
    again = load_snapshot(tmp_path / "a", model)
    assert again.length == 70
    assert continuation(model, again) == continuation(model, prompt)
    assert continuation(model, read(model, more, again)) == continuation(model, prompt + more)


def test_the_file_has_one_size(model, tmp_path):
    sizes = set()
    for n in (1, 5, 2000):
        save_snapshot(tmp_path / "a", model, read(model, ids(n)))
        sizes.add(os.path.getsize(tmp_path / "a"))
    assert max(sizes) - min(sizes) <= 8  # the header counts digits
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_repetition_penalty_sees_what_was_read_before(model, tmp_path):
    sampling = Sampling(temperature=0, repetition_penalty=5.0, repetition_window=40)
    for n in (3, 39, 60):
        save_snapshot(tmp_path / "a", model, read(model, ids(n)))
        again = load_snapshot(tmp_path / "a", model)
        assert continuation(model, again, sampling=sampling) == continuation(model, ids(n), sampling=sampling)
    long = read(model, ids(LAST_TOKENS + 7))
    assert long.tokens.tolist() == ids(LAST_TOKENS + 7)[-LAST_TOKENS:]


def test_forks_do_not_meet(model):
    start = read(model, ids(20))
    before = continuation(model, start)
    for seed in (1, 2):
        continuation(model, read(model, ids(5, seed), start))
    assert continuation(model, start) == before


def test_the_digest_is_of_the_weights_not_of_their_dtype(model):
    rounded = copy.deepcopy(model)
    rounded.update(cast(model.parameters(), mx.bfloat16))
    wide = copy.deepcopy(model)
    wide.update(cast(rounded.parameters(), mx.float32))
    assert digest(rounded) == digest(wide)
    assert digest(build(seed=4)) != digest(model)


def refused(path, model, words):
    with pytest.raises(InputError, match=words) as error:
        load_snapshot(path, model)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_what_is_no_state_of_the_model(model, tmp_path):
    path = tmp_path / "a"
    save_snapshot(path, model, read(model, ids(9)))
    whole = path.read_bytes()
    refused(path, build(seed=4), "the state of other weights")
    refused(path, build(num_layers=3), "no state of this model .*missing")
    refused(path, build(dims=16), "no state of this model .*shape")
    refused(tmp_path / "none", model, "No such file")
    refused(tmp_path, model, "a folder")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", model, "a pipe")
    for cut in (0, 4, 100, len(whole) - 1):
        path.write_bytes(whole[:cut])
        refused(path, model, "no state of this model")
    path.write_bytes(whole + b"x")
    refused(path, model, "no state of this model")
    path.write_bytes(b"\0" * 5000)
    refused(path, model, "no state of this model")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "version 2; this reads 1"),
        ({"version": None}, "version None"),
        ({"model": "0" * 64}, "other weights"),
        ({"length": 0}, "makes no sense"),
        ({"length": 1.5}, "makes no sense"),
        ({"length": True}, "makes no sense"),
        ({"extra": 1}, "no state of a model"),
    ],
    ids=str,
)
def test_what_is_said_about_a_state_is_checked(model, tmp_path, change, words):
    path = tmp_path / "a"
    save_snapshot(path, model, read(model, ids(9)))
    tensors = mx.load(str(path), format="safetensors")
    about = json.loads(np.array(tensors["about"]).tobytes())
    tensors["about"] = mx.array(np.frombuffer(json.dumps(about | change).encode().ljust(512), np.uint8))
    mx.save_safetensors(str(tmp_path / "b.safetensors"), tensors)
    refused(tmp_path / "b.safetensors", model, words)


def test_numbers_that_cannot_be(model, tmp_path):
    path = tmp_path / "a"
    save_snapshot(path, model, read(model, ids(9)))
    for name, value, words in (
        ("cache.0", float("nan"), "NaN or infinity"),
        ("logits", float("inf"), "NaN or infinity"),
        ("tokens", 50, "tokens that the model has not"),
        ("about", ord("["), "no state of this model"),
    ):
        tensors = mx.load(str(path), format="safetensors")
        tensors[name] = mx.full(tensors[name].shape, value, tensors[name].dtype)
        mx.save_safetensors(str(tmp_path / "b.safetensors"), tensors)
        refused(tmp_path / "b.safetensors", model, words)


def test_growing_states_are_not_saved(tmp_path):
    model = build(operator="softmax")
    snapshot = read(model, ids(9))
    assert continuation(model, snapshot) == continuation(model, ids(9))
    for call in (lambda: save_snapshot(tmp_path / "a", model, snapshot), lambda: load_snapshot("a", model)):
        with pytest.raises(InputError, match="only constant states are saved"):
            call()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("operator", ["hla2", "softmax"])
def test_rewinding_is_reading_less(operator, monkeypatch):
    model, text = build(operator=operator), ids(100)
    counted = []

    def count(model, tokens, *rest):
        counted.append(len(tokens))
        return read(model, tokens, *rest)

    monkeypatch.setattr(reading, "read", count)
    a = Reading(model, every=16)
    for start, stop in ((0, 7), (7, 50), (50, 100)):
        snapshot = a.read(text[start:stop])
        assert len(a) == snapshot.length == stop
    assert continuation(model, snapshot) == continuation(model, text)
    for length in (99, 80, 79, 64, 33, 16, 3):
        counted.clear()
        snapshot = a.rewind(length)
        assert len(a) == snapshot.length == length
        assert sum(counted) <= 16
        assert continuation(model, snapshot) == continuation(model, text[:length])
    a.read(text[3:40])
    assert continuation(model, a.rewind(40)) == continuation(model, text[:40])
    for bad, words in ((0, "length must be"), (41, "at most the 40 tokens"), (1.0, "length must be")):
        with pytest.raises(InputError, match=words):
            a.rewind(bad)
    with pytest.raises(InputError, match=r"a reading takes tokens \[T\]"):
        a.read(mx.zeros((1, 3), mx.int32))
    with pytest.raises(InputError, match="every must be"):
        Reading(model, every=0)


def test_the_command_line(tmp_path, capsys):
    state = str(tmp_path / "fib.state")

    def text(*flags):
        flags = ["--temperature", "0", "--max-tokens", "8", "--json", *flags]
        assert cli.main(["generate", *flags]) == 0
        out, err = capsys.readouterr()
        return json.loads(out)["completion"], err

    whole, err = text("--prompt", "def fib(n):\n    return")
    assert err == ""
    saved, err = text("--prompt", "def fib(n):", "--save-state", state)
    assert err.startswith("mlx-hla: state after ")
    assert f"tokens in {state}, 2.44 MB" in err
    assert text("--load-state", state) == (saved, "")
    model, tokenizer = load()
    after = read(model, tokenizer.encode("\n    return"), load_snapshot(state, model))
    more = "".join(c.text for c in stream_generate(model, tokenizer, after, max_tokens=8, sampling=GREEDY))
    assert text("--load-state", state, "--prompt", "\n    return")[0] == more == whole
    for flags in (["--load-state", ""], ["--save-state", "", "--prompt", "x"], ["--load-state", os.devnull]):
        assert cli.main(["generate", *flags]) == 1
        assert capsys.readouterr().err.count("\n") == 1
