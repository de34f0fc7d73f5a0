"""Training: the schedule, the step, and runs that stop and go on as if they had not."""

import dataclasses
import itertools
import json
import os
import shutil
import signal

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_hla import progress
from mlx_hla.data import Batches, bytes_per_token, encode_texts, load_corpus
from mlx_hla.errors import InputError
from mlx_hla.evaluate import Scorer, cut_function, function_headers, next_statement, parse, parse_share
from mlx_hla.models import LanguageModel, ModelConfig, load, save
from mlx_hla.sampling import Sampling
from mlx_hla.tokenizer import train_tokenizer
from mlx_hla.train import PRESETS, TrainConfig, loop, preset, resume, train
from mlx_hla.train.checkpoint import find_checkpoints
from mlx_hla.train.step import Trainer

MODEL = {"vocab_size": 380, "dims": 16, "num_layers": 2, "num_heads": 2, "hidden_dims": 24, "context": 16}
SETTINGS = {
    "steps": 9,
    "batch_size": 2,
    "warmup": 2,
    "valid_every": 4,
    "save_every": 4,
    "valid_fraction": 0.2,
}


def configs(corpus, out, model=None, **settings):
    settings = {**SETTINGS, "data": str(corpus), "out": str(out), **settings}
    return preset("tiny", {**MODEL, **(model or {})}, settings)


def events(out, kind="step"):
    lines = (out / "log.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if e["event"] == kind]


# --- settings


def test_schedule():
    s = TrainConfig(lr=1.0, warmup=10, steps=110, final_lr=0.1)
    rates = [s.learning_rate(i) for i in range(110)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert max(rates) == 1.0
    assert rates[59] == pytest.approx(0.55, abs=0.02)
    assert rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert TrainConfig(warmup=0, steps=1).learning_rate(0) > 0


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": 0},
        {"batch_size": -1},
        {"lr": 0.0},
        {"clip": float("inf")},
        {"dropout": 1.0},
        {"seed": 2**32},
        {"seed": -1},
        {"valid_fraction": 0.0},
        {"dtype": "int8"},
        {"max_bytes": 0},
        {"steps": "9"},
        {"warmup": True},
    ],
    ids=str,
)
def test_bad_settings_are_refused(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        TrainConfig(**bad)


def test_settings_refuse_unknown_keys():
    with pytest.raises(InputError, match="unknown keys 'stepz'"):
        TrainConfig.from_dict({"stepz": 3})
    with pytest.raises(InputError, match="preset must be"):
        preset("huge")
    with pytest.raises(InputError, match="operator and layers exclude each other"):
        preset("small", {"operator": "ahla", "layers": ("window", "ahla")})
    assert TrainConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(TrainConfig())))) == TrainConfig()
    assert set(PRESETS) == {"small", "tiny"}
    assert preset("small")[0].mixers == ("window", "hla2") * 3
    assert preset("small", {"operator": "ahla"})[0].mixers == ("ahla",) * 6
    assert preset("small", {"layers": ("window", "ahla", "ahla")})[0].mixers == ("window", "ahla", "ahla") * 2


# --- the step


def trainer(**settings):
    return Trainer(
        LanguageModel(ModelConfig(**MODEL)), TrainConfig(**{**SETTINGS, "dropout": 0.0, **settings})
    )


def tokens(rows, seed=0):
    return mx.random.randint(0, 380, (rows, 17), key=mx.random.key(seed))


def test_accumulated_batches_are_one_large_batch():
    whole, parts = trainer(), trainer(accumulate=2)
    batch = tokens(4)
    loss, norm = whole.step(0, [batch])
    loss2, norm2 = parts.step(0, [batch[:2], batch[2:]])
    assert loss2.item() == pytest.approx(loss.item(), rel=1e-5)
    assert norm2.item() == pytest.approx(norm.item(), rel=1e-4)
    other = dict(tree_flatten(parts.params))
    for name, w in tree_flatten(whole.params):
        assert mx.allclose(w, other[name], atol=3e-4), name


def test_vectors_do_not_decay_and_gradients_are_clipped():
    light, heavy = trainer(weight_decay=0.0, lr=0.1), trainer(weight_decay=0.9, lr=0.1)
    clipped = trainer(weight_decay=0.0, lr=0.1, clip=1e-12)
    for t in (light, heavy, clipped):
        t.step(0, [tokens(2)])
    a, b, c = (dict(tree_flatten(t.params)) for t in (light, heavy, clipped))
    before = dict(tree_flatten(trainer().params))
    for name in a:
        assert mx.array_equal(a[name], b[name]) == (a[name].ndim < 2 or not mx.any(before[name]).item()), name
        # Adam divides by the gradient's size, but its epsilon stands out against 1e-12.
        assert mx.abs(c[name] - before[name]).max() < 1e-4, name


def test_bfloat16_computes_and_float32_keeps():
    t = trainer(dtype="bfloat16", lr=1e-3)
    losses = [t.step(i, [tokens(2)])[0] for i in range(8)]
    assert losses[-1].item() < losses[0].item()
    assert all(w.dtype == mx.float32 for _, w in tree_flatten(t.params))
    assert losses[0].dtype == mx.float32
    exact = trainer(dtype="float32").step(0, [tokens(2)])[0].item()
    assert exact != losses[0].item() == pytest.approx(exact, rel=1e-2)


def test_dropout_follows_seed_and_step():
    def first(step, seed=0):
        return trainer(dropout=0.3, seed=seed).step(step, [tokens(2)])[0].item()

    assert first(0) == first(0)
    assert len({first(0), first(1), first(0, seed=1)}) == 3


# --- runs


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """A run that nothing interrupts."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    result = train(*configs(corpus, out, dropout=0.2, accumulate=2))
    assert result.finished
    return out


def test_a_run_learns_and_leaves_everything(whole):
    losses = [e["loss"] for e in events(whole)]
    assert [e["step"] for e in events(whole)] == list(range(1, 10))
    assert losses[-1] < losses[0]
    assert [e["step"] for e in events(whole, "valid")] == [4, 8, 9]
    assert [p.name for p in find_checkpoints(whole)] == ["checkpoint-00000009"]
    assert (whole / "loss.png").read_bytes()[:4] == b"\x89PNG"
    model, tokenizer = load(whole)
    assert tokenizer.vocab_size == model.config.vocab_size == 380
    start = events(whole, "start")[0]
    assert start["parameters"] == model.num_parameters
    assert start["settings"]["dropout"] == 0.2


@pytest.mark.parametrize("stop_after", [1, 4, 6])  # in the middle of the step that follows
def test_a_resumed_run_repeats_the_losses_exactly(corpus, whole, tmp_path, monkeypatch, stop_after):
    out = tmp_path / "run"
    step = Trainer.step

    def interrupted(self, number, *rest):
        if number == stop_after:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, number, *rest)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as m:
        m.setattr(Trainer, "step", interrupted)
        result = train(*configs(corpus, out, dropout=0.2, accumulate=2))
    assert (result.finished, result.step) == (False, stop_after)
    assert signal.getsignal(signal.SIGINT) is before
    assert not (out / "model.safetensors").exists()
    assert resume(out).finished
    for kind in ("step", "valid"):
        assert events(out, kind) == events(whole, kind)
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert len(events(out, "resume")) == 1


def test_a_killed_run_goes_on_from_its_last_checkpoint(corpus, whole, tmp_path, monkeypatch):
    out = tmp_path / "run"
    step = Trainer.step

    def killed(self, number, *rest):
        if number == 6:
            raise MemoryError
        return step(self, number, *rest)

    with monkeypatch.context() as m:
        m.setattr(Trainer, "step", killed)
        with pytest.raises(MemoryError):
            train(*configs(corpus, out, dropout=0.2, accumulate=2))
    with (out / "log.jsonl").open("a") as log:
        log.write('{"event": "step", "st')
    assert [p.name for p in find_checkpoints(out)] == ["checkpoint-00000004"]
    assert resume(out).finished
    assert events(out) == events(whole)


def test_a_run_is_not_overwritten(corpus, whole):
    before = (whole / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="holds a run already"):
        train(*configs(corpus, whole))
    assert (whole / "model.safetensors").read_bytes() == before


def test_resume_refuses_what_does_not_fit(corpus, whole, tmp_path):
    with pytest.raises(InputError, match="no checkpoint"):
        resume(tmp_path)
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    folder = find_checkpoints(out)[0]
    progress = json.loads((folder / "progress.json").read_text())

    def attempt(match, **changes):
        (folder / "progress.json").write_text(json.dumps({**progress, **changes}))
        with pytest.raises(InputError, match=match):
            resume(out)

    attempt("corpus .* is not the one", corpus="0")
    attempt("not a checkpoint's", extra=1)
    attempt("make no sense", step=-1)
    attempt("unknown keys", settings={"x": 1})
    (folder / "progress.json").write_text(json.dumps(progress))
    for name in ("weights.safetensors", "optimizer.safetensors"):
        path = folder / name
        content = path.read_bytes()
        path.write_bytes(content[:-10])
        with pytest.raises(InputError, match=f"{name}.*cut short"):
            resume(out)
        path.write_bytes(content)


def test_resuming_a_finished_run_changes_nothing(whole):
    before = (whole / "model.safetensors").read_bytes()
    losses = events(whole)
    assert resume(whole).finished
    assert (whole / "model.safetensors").read_bytes() == before
    assert events(whole) == losses


def test_a_finished_run_is_lengthened(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for steps in (8, 9, 0, True, "12"):
        with pytest.raises(InputError, match="steps must be"):
            resume(out, steps)
    assert events(out) == events(whole)
    result = resume(out, 12)
    assert (result.finished, result.step) == (True, 12)
    assert events(out)[:9] == events(whole)
    rates = [e["lr"] for e in events(out)]
    longer = TrainConfig(**{**SETTINGS, "steps": 12, "lr": PRESETS["tiny"].train.lr})
    assert rates[9:] == [longer.learning_rate(n) for n in (9, 10, 11)]
    assert (out / "model.safetensors").read_bytes() != (whole / "model.safetensors").read_bytes()
    assert resume(out).finished


def test_extra_text_is_part_of_the_run(corpus, whole, tmp_path, monkeypatch):
    extra, out = tmp_path / "extra", tmp_path / "run"
    extra.mkdir()
    (extra / "more.py").write_text("while True:\n    print('more')\n" * 9)
    monkeypatch.chdir(tmp_path)
    assert train(*configs(corpus, out, steps=2, extra="extra")).finished
    start, other = events(out, "start")[0], events(whole, "start")[0]
    assert start["settings"]["extra"] == str(extra)  # from wherever it is resumed
    assert start["train_tokens"] > other["train_tokens"]
    assert f"to train with {extra}" in start["corpus"]
    assert start["valid_bytes"] == other["valid_bytes"]
    assert resume(out, 3).finished
    (extra / "more.py").write_text("while False:\n    print('more')\n")
    with pytest.raises(InputError, match=r"corpus .* is not the one"):
        resume(out, 4)


def test_a_run_starts_from_given_weights(corpus, whole, tmp_path):
    config, settings = configs(corpus, tmp_path / "run", {"dims": 64}, init_from=str(whole), steps=2)
    result = train(dataclasses.replace(config, context=24), settings)
    assert result.finished
    model, tokenizer = load(tmp_path / "run")
    assert (model.config.dims, model.config.context) == (16, 24)
    assert tokenizer.proto == load(whole)[1].proto
    first = events(tmp_path / "run")[0]["loss"]
    assert first < events(whole)[4]["loss"] < events(whole)[0]["loss"]
    with pytest.raises(InputError, match="no such model folder"):
        train(*configs(corpus, tmp_path / "other", init_from=str(tmp_path / "none")))
    with pytest.raises(InputError, match="leave out tokenizer"):
        configs(corpus, tmp_path / "other", init_from=str(whole), tokenizer="x")


def test_packed_weights_are_no_start(corpus, whole, tmp_path):
    model, tokenizer = load(whole)
    model.embedding = model.embedding.to_quantized(group_size=16, bits=4, mode="nvfp4")
    save(tmp_path / "packed", model, tokenizer)
    with pytest.raises(InputError, match="is quantised: packed weights cannot be trained"):
        train(*configs(corpus, tmp_path / "run", init_from=str(tmp_path / "packed")))
    assert not (tmp_path / "run").exists()


def test_the_tiny_preset_learns_more_than_frequencies(tmp_path):
    """In a part of its steps, on the text that is at hand everywhere."""
    out = tmp_path / "run"
    config, settings = preset("tiny", {}, {"out": str(out), "steps": 160, "valid_batches": 0})
    corpus = load_corpus(None, settings.valid_fraction, settings.max_bytes)
    result = train(config, settings)
    tokenizer = load(out)[1]
    counts = np.bincount(encode_texts(tokenizer, corpus.train), minlength=tokenizer.vocab_size) + 1
    valid = encode_texts(tokenizer, corpus.valid)[1:]
    nats = -np.log(counts / counts.sum())[valid].sum() / bytes_per_token(tokenizer)[valid].sum()
    assert result.nats_per_byte < 0.96 * nats


def test_missing_packages_are_named_at_the_start(corpus, tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(progress.importlib, "import_module", missing)
    with pytest.raises(InputError, match=r"pip install 'mlx-hla\[train\]'"):
        train(*configs(corpus, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_given_tokenizer_is_used(corpus, whole, tmp_path):
    out = tmp_path / "run"
    settings = configs(corpus, out, {"vocab_size": 4096}, tokenizer=str(whole / "tokenizer.model"), steps=1)
    train(*settings)
    assert (out / "tokenizer.model").read_bytes() == (whole / "tokenizer.model").read_bytes()
    assert load(out)[0].config.vocab_size == 380


def test_the_baseline_trains_too(corpus, tmp_path):
    assert train(*configs(corpus, tmp_path / "run", {"operator": "softmax"}, checkpoint_blocks=True)).finished
    assert loop.find_checkpoints(tmp_path / "run")


def test_a_terminal_gets_a_bar(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert train(*configs(corpus, tmp_path / "run", steps=2)).finished
    captured = capsys.readouterr()
    assert "2/2" in captured.err
    assert "loss" in captured.err


# --- evaluation


def test_nats_per_byte_of_an_untrained_model_is_that_of_chance():
    texts = ("def f(x):\n    return x\n" * 20,)
    tokenizer = train_tokenizer(texts, 380)
    model = LanguageModel(ModelConfig(**MODEL))
    model.embedding.weight = mx.zeros_like(model.embedding.weight)  # every token equally likely
    stream = encode_texts(tokenizer, texts)
    options = {"batch_size": 2, "context": 16, "dtype": mx.float32}
    score = Scorer(model, stream, bytes_per_token(tokenizer), **options)
    assert score.bytes == len(texts[0])
    want = (len(stream) - 1) * mx.log(mx.array(380.0)).item() / len(texts[0])
    assert score(model.parameters()) == pytest.approx(want, rel=1e-5)
    assert Scorer(model, stream, bytes_per_token(tokenizer), **options, max_batches=1).bytes < score.bytes
    assert Batches(stream, 2, 16, 0)[0].shape == (2, 17)


def test_function_headers():
    text = "def a(x):\n    pass\n\nclass B:\n    def c(self):\n        pass\n\ndef d(x): return x\n\n"
    text += "async def e():\n    pass\n\ndef f(\n    x,\n):\n    pass\n\ndef g() -> int:  \n    return 1\n"
    assert function_headers([text, "not python at all ("]) == ["def a(x):", "def g() -> int:"]


@pytest.mark.parametrize(
    ("text", "ended", "want", "good"),
    [
        ("def f():\n    return 1\n\n\ndef g", False, "def f():\n    return 1\n\n\n", True),
        ("def f():\n    return 1\n    x = (", False, "def f():\n    return 1\n", True),
        ("def f():\n    return 1", True, "def f():\n    return 1", True),
        ("def f():\n    return 1", False, "def f():\n", False),
        ("def f():\nx = 1\n", False, "def f():\n", False),
        ("def f(): return 1\nx", False, "def f(): return 1\n", True),
        ("def f():", False, "", True),
    ],
)
def test_cut_function(text, ended, want, good):
    assert cut_function(text, ended) == want
    if want:
        assert (parse(want) is not None) == good
    assert next_statement("def f():\n\n    x\n") is None


def test_parse_share_counts(whole):
    model, tokenizer = load(whole)
    options = {"samples": 4, "max_tokens": 10, "sampling": Sampling(seed=2)}
    one = parse_share(model, tokenizer, ["def f(x):"], **options)
    two = parse_share(model, tokenizer, ["def f(x):"], **options)
    assert one == two
    assert one.samples == len(one.texts) == 4
    assert one.share == sum(parse(t) is not None for t in one.texts) / 4
    with pytest.raises(InputError, match="no function headers"):
        parse_share(model, tokenizer, [], **options)
