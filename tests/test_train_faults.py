"""What goes wrong in a run: it stops in one line, and what was saved stays good."""

import dataclasses
import gc
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_hla import cli
from mlx_hla.errors import InputError
from mlx_hla.losses import Scorer
from mlx_hla.models import LanguageModel, ModelConfig, load, save
from mlx_hla.tokenizer import train_tokenizer
from mlx_hla.train import TrainConfig, course, estimate, preset, report, resume, train
from mlx_hla.train.checkpoint import find_checkpoints
from mlx_hla.train.step import Trainer
from mlx_hla.trees import finite, flat

MODEL = {"vocab_size": 380, "dims": 16, "num_layers": 1, "num_heads": 2, "hidden_dims": 24, "context": 16}
SETTINGS = {
    "steps": 9,
    "batch_size": 2,
    "warmup": 2,
    "valid_every": 4,
    "save_every": 2,
    "valid_fraction": 0.2,
}


def configs(corpus, out, **settings):
    return preset("tiny", MODEL, {**SETTINGS, "data": str(corpus), "out": str(out), **settings})


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(*configs(corpus, out))
    return out


def rows(out):
    def refuse(text):
        raise AssertionError(f"{text} is not JSON")

    lines = (out / "log.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def all_finite(folder):
    return all(finite(mx.load(str(path))) for path in folder.glob("*.safetensors"))


# --- divergence


def poisoned(at, what):
    """A step after which, at step `at`, "loss", "norm" or the weights alone are not finite."""
    step = Trainer.step

    def run(self, number, batches, *rest):
        loss, norm = step(self, number, batches, *rest)
        if number + 1 == at and what == "weights":
            self.params["norm"]["weight"] = mx.full((16,), mx.inf)
        bad = mx.array(mx.nan)
        return (bad if what == "loss" and number + 1 == at else loss), (
            bad if what == "norm" and number + 1 == at else norm
        )

    return run


@pytest.mark.parametrize(("what", "name"), [("loss", "loss"), ("norm", "gradient norm")])
@pytest.mark.parametrize("at", [1, 5, 6, 9])
def test_a_run_that_diverges_stops_there(corpus, tmp_path, monkeypatch, what, name, at):
    out = tmp_path / "run"
    monkeypatch.setattr(Trainer, "step", poisoned(at, what))
    with pytest.raises(InputError, match=f"at step {at} the {name} is nan, at a learning rate of") as e:
        train(*configs(corpus, out))
    last = (at - 1) // 2 * 2
    assert [int(p.name[-8:]) for p in find_checkpoints(out)] == [last] * bool(last)
    assert (f"checkpoint-{last:08d}" if last else "no checkpoint yet") in str(e.value)
    assert not (out / "model.safetensors").exists()
    assert [r["step"] for r in rows(out) if r["event"] == "step"] == list(range(1, at))
    assert rows(out)[-1]["event"] == "diverged"
    assert all(all_finite(folder) for folder in find_checkpoints(out))


def test_weights_that_are_not_finite_are_never_saved(corpus, tmp_path, monkeypatch):
    out = tmp_path / "run"
    monkeypatch.setattr(Trainer, "step", poisoned(4, "weights"))
    with pytest.raises(InputError, match=r"step 4: .* not saved; the last good checkpoint is .*00000002"):
        train(*configs(corpus, out, valid_every=100))
    assert [p.name for p in find_checkpoints(out)] == ["checkpoint-00000002"]
    assert not list(out.glob(".*"))


def test_a_validation_that_is_not_finite_stops_the_run(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(Scorer, "__call__", lambda *_: float("inf"))
    with pytest.raises(InputError, match="at step 4 the validation loss is inf"):
        train(*configs(corpus, tmp_path / "run"))
    rows(tmp_path / "run")


def test_a_rate_beyond_reason_ends_in_one_line(corpus, tmp_path, capsys):
    out = tmp_path / "run"
    argv = ["--preset", "tiny", "--vocab-size", "380", "--data", str(corpus), "--out", str(out)]
    assert cli.main(["train", *argv, "--lr", "1e30", "--save-every", "1"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("mlx-hla: error: the run diverged: at step ")
    assert err.count("\n") == 1
    assert all(all_finite(folder) for folder in find_checkpoints(out))
    rows(out)


def test_resume_refuses_weights_that_are_not_finite(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for name in ("weights.safetensors", "optimizer.safetensors"):
        path = find_checkpoints(out)[0] / name
        content = path.read_bytes()
        tensors = mx.load(str(path))
        mx.eval(tensors)
        broken = next(n for n, a in tensors.items() if a.shape == (16,))
        tensors[broken] = mx.where(mx.arange(16) == 3, mx.nan, tensors[broken])
        mx.save_safetensors(str(path), tensors)
        with pytest.raises(InputError, match=f"{name}: holds NaN"):
            resume(out)
        path.write_bytes(content)


def test_resume_refuses_a_tokenizer_with_more_tokens_than_the_model(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    train_tokenizer(["def f(x):\n    return x + 1\nimport os\n" * 30], 390).save(
        find_checkpoints(out)[0] / "tokenizer.model"
    )
    with pytest.raises(InputError, match=r"tokenizer\.model: has 390 tokens, the config says 380"):
        resume(out)


def test_a_model_that_is_not_finite_is_not_saved(whole, tmp_path):
    model, tokenizer = load(whole)
    model.norm.weight = mx.full((16,), 1e6)
    save(tmp_path / "fine", model, tokenizer)
    with pytest.raises(InputError, match=r"NaN or infinity as mlx\.core.float16: not saved"):
        save(tmp_path / "half", model, tokenizer, mx.float16)
    assert not (tmp_path / "half").exists()
    assert finite(dict(tree_flatten(LanguageModel(ModelConfig(**MODEL)).parameters())))


# --- a small corpus


def test_a_small_corpus_gives_a_small_vocabulary_and_says_so(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("".join(f"hello {i}\n" for i in range(40)))
    out = tmp_path / "run"
    model, settings = configs(tmp_path / "notes.txt", out, steps=1)
    assert train(dataclasses.replace(model, vocab_size=4096), settings).finished
    config = load(out)[0].config
    assert 363 <= config.vocab_size < 4096
    assert f"gives {config.vocab_size} tokens: vocab_size is that, and not 4096" in capsys.readouterr().out


# --- memory and time


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ({}, {}),
        ({"dims": 128, "num_layers": 4, "context": 256}, {"batch_size": 4}),
        ({"dims": 64, "vocab_size": 4096, "context": 128}, {"batch_size": 4, "accumulate": 2}),
        ({"dims": 64, "hidden_dims": 512, "operator": "softmax", "context": 128}, {"batch_size": 8}),
        ({"dims": 128, "context": 256}, {"batch_size": 4, "dtype": "bfloat16"}),
    ],
    ids=range(5),
)
def test_the_estimate_of_memory_is_near_the_peak(model, settings):
    config = ModelConfig(**{**MODEL, "num_layers": 2, "dims": 64, "context": 64, **model})
    settings = TrainConfig(**{**SETTINGS, "dropout": 0.2, "warmup": 0, **settings})
    gc.collect()
    trainer = Trainer(LanguageModel(config), settings)
    batch = mx.zeros((settings.batch_size, config.context + 1), mx.int32)
    mx.eval(trainer.params, trainer.state)
    before = mx.get_active_memory() - sum(a.nbytes for a in flat((trainer.params, trainer.state)).values())
    mx.reset_peak_memory()
    trainer.step(0, [batch] * settings.accumulate)
    mx.eval(trainer.params)
    peak = mx.get_peak_memory() - before
    assert peak / 2 < estimate.step_bytes(config, settings) < 2 * peak


@pytest.mark.parametrize("big", [{"batch_size": 10**8 - 1}, {"accumulate": 10**8 - 1, "batch_size": 80}])
def test_a_step_beyond_memory_is_refused(corpus, tmp_path, big):
    with pytest.raises(InputError, match=r"a step needs about .* GB and this device has .*B: take a smaller"):
        train(*configs(corpus, tmp_path / "run", **big))
    assert not (tmp_path / "run").exists()


def test_a_step_near_the_memory_is_told_so(monkeypatch):
    need = estimate.step_bytes(ModelConfig(), TrainConfig())
    for share, words in ((3, False), (1.5, True), (0.6, True)):
        monkeypatch.setattr(estimate, "device_bytes", lambda s=share: s * need)
        assert (", of " in estimate.memory(ModelConfig(), TrainConfig())) is words
    monkeypatch.setattr(estimate, "device_bytes", lambda: 0.4 * need)
    with pytest.raises(InputError, match="a step needs about"):
        estimate.memory(ModelConfig(), TrainConfig())


def test_a_run_tells_its_memory_and_its_time(corpus, tmp_path, capsys):
    train(*configs(corpus, tmp_path / "run", steps=12, log_every=100))
    said = capsys.readouterr().out
    assert re.search(r"; about \d+ MB of memory\n", said)
    assert re.search(r"^10 steps took \d+\.\d s: about 0 seconds for the 2 left$", said, re.MULTILINE)
    assert estimate.pace(10, 10, 1590) == "10 steps took 10.0 s: about 26 minutes for the 1,590 left"
    assert estimate.pace(100, 10, 1590) == "10 steps took 100.0 s: about 4 hours for the 1,590 left"


def test_the_pace_is_no_matter_of_two_steps_read_at_once(tmp_path):
    r = report.Report(tmp_path, start=0, steps=100, tokens_per_step=1000, log_every=1)
    time.sleep(0.25)
    for n in range(1, 6):
        r.step(n, 1.0, 1.0, 1.0)
    r.close()
    assert 0 < r._tps < 4000


# --- the log


@pytest.mark.parametrize("log_every", [1, 7])
def test_the_log_on_disk_reaches_every_checkpoint(corpus, tmp_path, monkeypatch, log_every):
    """A run may be killed at any moment after it has saved."""
    out, save_checkpoint, seen = tmp_path / "run", course.save_checkpoint, []

    def look(folder, step, *rest):
        seen.append((step, [r["step"] for r in rows(out) if r["event"] == "step"]))
        return save_checkpoint(folder, step, *rest)

    monkeypatch.setattr(course, "save_checkpoint", look)
    train(*configs(corpus, out, log_every=log_every, save_every=3, valid_every=100))
    assert seen == [(step, list(range(1, step + 1))) for step in (3, 6, 9, 9)]


def test_resuming_never_leaves_a_shorter_log(whole, tmp_path, monkeypatch):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    before = (out / "log.jsonl").read_bytes()

    def killed(*_):
        assert (out / "log.jsonl").read_bytes() == before
        raise MemoryError

    monkeypatch.setattr("mlx_hla.files.os.replace", killed)
    with pytest.raises(MemoryError):
        resume(out)
    assert (out / "log.jsonl").read_bytes() == before


ODD = [
    "",
    "3",
    "null",
    "[]",
    "{}",
    '{"event": "step"',
    '{"event": "step", "step": [1], "loss": 1, "grad_norm": 1, "lr": 1}',
    '{"event": "step", "step": 3, "loss": NaN, "grad_norm": 1, "lr": 1}',
    '{"event": "step", "step": 3, "loss": "1", "grad_norm": 1, "lr": 1}',
    '{"event": "step", "step": 3}',
    '{"event": "valid", "step": 3, "nats_per_byte": null}',
    '{"event": ["step"], "step": 3}',
    '{"event": "step", "step": true, "loss": 1, "grad_norm": 1, "lr": 1}',
    '{"event": "step", "step": "3", "loss": 1, "grad_norm": 1, "lr": 1}',
    "\udcff\udcfe",
    "[" * 100_000,
]


def test_odd_lines_of_a_log_are_dropped(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    good = rows(out)
    with (out / "log.jsonl").open("ab") as file:
        file.write("\n".join(ODD).encode("utf-8", "surrogateescape"))
    assert resume(out).finished
    assert rows(out)[: len(good)] == good
    assert [r["event"] for r in rows(out)[len(good) :]] == ["resume", "end"]


# --- the folder


def remains(out):
    for name in ("0123abcd.checkpoint", "ffffffff.checkpoint"):
        (out / f".{name}").mkdir()
        (out / f".{name}" / "weights.safetensors").write_bytes(b"half")
    (out / ".01234567.model.safetensors").write_bytes(b"half")
    (out / ".01234567.log.jsonl").write_bytes(b"half")
    for mine in (".notes", ".0123abcd.mine", ".0123abcde.checkpoint"):
        (out / mine).write_text("stays")


def test_what_a_killed_run_left_half_written_is_swept(corpus, whole, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(whole, old)
    new.mkdir()
    remains(old)
    remains(new)
    assert resume(old).finished
    assert train(*configs(corpus, new, steps=2)).finished
    for out in (old, new):
        hidden = sorted(p.name for p in out.iterdir() if p.name.startswith("."))
        assert hidden == [".0123abcd.mine", ".0123abcde.checkpoint", ".notes"]


def test_a_second_run_in_the_same_folder_is_refused(corpus, whole, tmp_path, monkeypatch):
    out, step, refused = tmp_path / "run", Trainer.step, []

    def second(self, number, *rest):
        if number in (0, 4):
            with pytest.raises(InputError, match="another run is at work") as e:
                (train if number == 0 else lambda *_: resume(out))(*configs(corpus, out))
            refused.append(str(e.value))
        return step(self, number, *rest)

    monkeypatch.setattr(Trainer, "step", second)
    assert train(*configs(corpus, out)).finished
    assert len(refused) == 2
    assert [p.name for p in find_checkpoints(out)] == ["checkpoint-00000009"]
    assert resume(out).finished


# --- signals


def test_a_signal_in_a_validation_leaves_it_for_the_resumed_run(corpus, tmp_path, monkeypatch, capsys):
    plain, out, score, batches = tmp_path / "plain", tmp_path / "run", Scorer.__call__, []
    assert train(*configs(corpus, plain)).finished

    def stopped(self, params, on_batch):
        def on_one(done, of):
            batches.append((done, of))
            if done == 1:
                os.kill(os.getpid(), signal.SIGINT)
            on_batch(done, of)

        return score(self, params, on_one)

    with monkeypatch.context() as m:
        m.setattr(Scorer, "__call__", stopped)
        result = train(*configs(corpus, out))
    assert (result.finished, result.step) == (False, 4)
    assert batches == [(0, 37), (1, 37)]
    assert (
        "stopping after a batch of the validation after step 4, which is under way" in capsys.readouterr().out
    )
    assert not [r for r in rows(out) if r["event"] == "valid"]
    assert resume(out).finished
    for kind in ("step", "valid"):
        assert [r for r in rows(out) if r["event"] == kind] == [r for r in rows(plain) if r["event"] == kind]


def test_a_signal_in_the_last_validation_leaves_a_run_to_resume(corpus, tmp_path, monkeypatch):
    out = tmp_path / "run"

    def stopped(self, params, on_batch):
        os.kill(os.getpid(), signal.SIGTERM)
        on_batch(0, 8)

    with monkeypatch.context() as m:
        m.setattr(Scorer, "__call__", stopped)
        result = train(*configs(corpus, out, valid_every=100))
    assert (result.finished, result.step, result.nats_per_byte) == (False, 9, None)
    assert resume(out).finished
    assert (out / "model.safetensors").exists()


def test_a_signal_that_is_ignored_stays_ignored(corpus, tmp_path, monkeypatch):
    step, seen = Trainer.step, []

    def look(self, number, *rest):
        seen.append((signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)))
        return step(self, number, *rest)

    monkeypatch.setattr(Trainer, "step", look)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert train(*configs(corpus, tmp_path / "run", steps=1)).finished
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen[0][0] is signal.SIG_IGN
    assert seen[0][1] not in (signal.SIG_IGN, signal.SIG_DFL)


LONG = """
import os, signal, sys, time
from mlx_hla import cli
from mlx_hla.train.step import Trainer
step = Trainer.step
def long(self, number, *rest):
    if number == 3:
        print("in a call", flush=True)
        # As long as a pass on a CPU may take, in which Python runs no handler of its own.
        lock = __import__("ctypes").CDLL(None).usleep
        for _ in range({seconds}):
            lock(990_000)
    return step(self, number, *rest)
Trainer.step = long
sys.exit(cli.main(["train", *sys.argv[1:]]))
"""
FLAGS = "--preset tiny --vocab-size 380 --dims 16 --num-layers 1 --hidden-dims 16 --context 16 --batch-size 2"


def test_a_terminal_that_goes_away_leaves_a_checkpoint(corpus, tmp_path):
    """A rank that mlx.launch started on another machine hears Ctrl-C so."""
    out = tmp_path / "run"
    flags = [
        *FLAGS.split(),
        f"--data={corpus}",
        f"--out={out}",
        "--save-every=1000",
        "--steps=1000",
        "--log-every=1",
    ]
    terminal, own = pty.openpty()
    # Where nohup started the tests, hang-ups are ignored, and a run leaves it so.
    script = "import fcntl, signal, termios; signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
    script += "fcntl.ioctl(1, termios.TIOCSCTTY, 0)\n" + LONG.format(seconds=2)
    ends = {"stdin": own, "stdout": own, "stderr": own, "start_new_session": True}
    process = subprocess.Popen([sys.executable, "-c", script, *flags], **ends)
    os.close(own)
    seen = b""
    while b"in a call\r\n" not in seen:  # the whole line: what is half written fails
        seen += os.read(terminal, 1 << 16)
    os.close(terminal)
    assert process.wait(60) == 130
    assert [p.name for p in find_checkpoints(out)] == ["checkpoint-00000004"]


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
def test_ctrl_c_is_answered_while_a_pass_is_under_way(corpus, tmp_path, twice):
    out = tmp_path / "run"
    flags = [*FLAGS.split(), "--data", str(corpus), "--out", str(out), "--save-every", "2"]
    flags += ["--steps", "12"]
    script = LONG.format(seconds=60 if twice else 2)
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", script, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line == "in a call\n":
            break
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    answer = process.stdout.readline()
    assert answer.startswith("stopping after a forward and backward pass of step 4 of 12, which is under way")
    assert time.monotonic() - start < 1
    if twice:
        process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=30)
    assert err == ""
    assert process.returncode == 130
    assert ("go on with" in rest) is not twice
    assert [p.name for p in find_checkpoints(out)] == [f"checkpoint-{2 if twice else 4:08d}"]
    assert resume(out) is not None
