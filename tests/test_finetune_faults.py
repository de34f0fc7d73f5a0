"""Fine-tuning that is stopped, killed, or goes wrong: the adapter stays whole, and the run goes on."""

import errno
import os
import signal
import subprocess
import sys
import time

import mlx.core as mx
import pytest
from finetune_runs import QUICK, losses, make_base, make_texts, settings, trained

from mlx_hla.errors import InputError
from mlx_hla.train.checkpoint import find_checkpoints
from mlx_hla.train.step import Trainer
from mlx_hla.tune import finetune, load_adapted, resume
from mlx_hla.tune.tuner import Validation

pytest.importorskip("mlx_lm")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return make_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def whole(base, texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    return finetune(settings(base, texts, out))


@pytest.mark.parametrize("at", [0, 1, 2, 3, 5])
def test_a_resumed_run_takes_the_same_steps(base, texts, whole, tmp_path, monkeypatch, at):
    step = Trainer.step

    def stopped(self, number, *rest):
        if number == at:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, number, *rest)

    monkeypatch.setattr(Trainer, "step", stopped)
    out = tmp_path / "a"
    first = finetune(settings(base, texts, out))
    assert not first.finished
    assert first.step == at + 1  # the step under way is finished
    monkeypatch.setattr(Trainer, "step", step)
    done = resume(out)
    assert done.finished
    assert losses(out) == losses(whole.out)
    assert done._replace(out=None) == whole._replace(out=None)
    a, b = (mx.load(str(f / "adapters.safetensors")) for f in (out, whole.out))
    assert all(mx.array_equal(a[name], b[name]).item() for name in b)


def test_early_stop_keeps_the_best(base, texts, tmp_path, monkeypatch):
    out, told = tmp_path / "a", iter([3.0, 2.0, 1.0, 1.5, 1.2, 0.5])
    monkeypatch.setattr(Validation, "__call__", lambda *_: next(told))
    done = finetune(settings(base, texts, out, steps=40, patience=2))
    assert done == (True, 8, 3.0, 1.0, 4, out)
    assert resume(out) == done  # no more than was decided
    kept, last = (mx.load(str(path)) for path in (out / "adapters.safetensors", trained(out)))
    assert any(not mx.array_equal(kept[name], last[name]).item() for name in kept)


def test_a_run_that_diverges_stops_and_keeps_the_adapter(base, texts, tmp_path, monkeypatch):
    step = Trainer.step

    def poisoned(self, number, *rest):
        loss, norm = step(self, number, *rest)
        return (mx.array(mx.nan) if number == 4 else loss), norm

    monkeypatch.setattr(Trainer, "step", poisoned)
    with pytest.raises(InputError, match="diverged: at step 5"):
        finetune(settings(base, texts, tmp_path / "a"))
    load_adapted(tmp_path / "a")


def test_a_full_disk_leaves_the_adapter_and_the_run(base, texts, whole, tmp_path, monkeypatch):
    out, really, count = tmp_path / "a", os.fsync, 0

    def full(number):
        nonlocal count
        count += 1
        if count > 7:
            raise OSError(errno.ENOSPC, "No space left on device")
        really(number)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        finetune(settings(base, texts, out))
    monkeypatch.undo()
    load_adapted(out)
    assert resume(out)._replace(out=None) == whole._replace(out=None)


KILLED = """
import os, pathlib, signal, sys
from mlx_hla.cli import main
count, at, really = 0, int(sys.argv[1]), {what}
def killed(*args, **options):
    global count
    count += 1
    if count == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return really(*args, **options)
{what} = killed
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("what", "at"),
    [("os.replace", n) for n in (1, 4, 6, 7, 8, 9, 12, 14)] + [("os.fsync", 8), ("pathlib.Path.rename", 2)],
)
def test_kill_9_leaves_the_adapter_whole_and_the_run_resumable(base, texts, whole, tmp_path, what, at):
    out = tmp_path / "a"
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in QUICK.items()]
    command = ["finetune", "--model", base, "--data", texts, "--out", out, *flags]
    script = [sys.executable, "-c", KILLED.format(what=what), str(at), *command]
    env = os.environ | {
        "MLX_HLA_OPENBLAS": "0"
    }  # the BLAS of this process, whichever that is: losses are compared
    died = subprocess.run(script, capture_output=True, text=True, timeout=120, env=env)
    assert died.returncode == -signal.SIGKILL, died.stderr
    if not find_checkpoints(out):  # killed before it began
        assert finetune(settings(base, texts, out))._replace(out=None) == whole._replace(out=None)
        return
    assert (out / "adapters.safetensors").exists() or at == 6  # the first was being put in its place
    if at != 6:
        load_adapted(out)
    assert resume(out)._replace(out=None) == whole._replace(out=None)
    assert losses(out) == losses(whole.out)
    assert not [p for p in out.iterdir() if p.name.startswith(".")]


def test_kill_9_at_any_time(base, texts, tmp_path):
    out = tmp_path / "a"
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in {**QUICK, "steps": 100000, "valid_every": 1}.items()]
    command = [sys.executable, "-m", "mlx_hla", "finetune", "--model", base, "--data", texts, "--out", out]
    with subprocess.Popen([*command, *flags], stdout=subprocess.DEVNULL) as run:
        while not (out / "adapters.safetensors").exists():
            time.sleep(0.05)
            assert run.poll() is None
        with pytest.raises(InputError, match="another run is at work"):
            resume(out)
        run.kill()
    load_adapted(out)
