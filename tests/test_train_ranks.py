"""Training on ranks: real processes that share every batch go the way of one process with all of it."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from by_hand import LONG, MLX_HLA, all_ended, free_ports, start, until
from finetune_runs import make_base
from finetune_runs import settings as finetune_settings

from mlx_hla import cli
from mlx_hla.errors import InputError
from mlx_hla.models import ModelConfig, load
from mlx_hla.train import TrainConfig, preset, resume, train
from mlx_hla.train.checkpoint import find_checkpoints
from mlx_hla.train.step import Trainer
from mlx_hla.train.team import ALONE, Share, Team, assemble
from mlx_hla.trees import flat

MODEL = {"vocab_size": 380, "dims": 16, "num_layers": 2, "num_heads": 2, "hidden_dims": 24, "context": 15}
# Three rows on two ranks, and fifteen tokens: parts that are not equal.
SETTINGS = {
    "steps": 8,
    "batch_size": 3,
    "accumulate": 2,
    "dropout": 0.2,
    "lr": 2e-3,
    "warmup": 2,
    "valid_every": 4,
    "save_every": 2,
    "valid_fraction": 0.2,
    "valid_batches": 5,
}
TOLERANCE = 2e-5  # of a loss: sums of float32 in another order, and what some steps make of that


def one_process(corpus, out, **settings):
    train(
        *preset(
            "tiny",
            MODEL | settings.pop("model", {}),
            {**SETTINGS, "data": str(corpus), "out": str(out), **settings},
        )
    )
    return out


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    return one_process(corpus, tmp_path_factory.mktemp("runs") / "whole")


def flags(corpus, out, **more):
    given = {"preset": "tiny", "data": corpus, "out": out, **MODEL, **SETTINGS, **more}
    return [*MLX_HLA, "train", *(f"--{k.replace('_', '-')}={v}" for k, v in given.items())]


def numbers(out, kind="step", name="loss"):
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row[name]) for row in rows if row["event"] == kind]


def assert_same_course(out, want):
    for kind, name in (("step", "loss"), ("valid", "nats_per_byte")):
        got, expected = numbers(out, kind, name), numbers(want, kind, name)
        assert [step for step, _ in got] == [step for step, _ in expected]
        assert dict(got) == pytest.approx(dict(expected), rel=TOLERANCE), name


def run(folder, commands, **env):
    done = all_ended(start(folder, commands, **env))
    assert [d.code for d in done] == [0] * len(commands), done
    return done


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_take_the_steps_of_one_process(corpus, whole, tmp_path, ranks):
    outs = [tmp_path / f"out{rank}" for rank in range(ranks)]
    done = run(tmp_path, [flags(corpus, out) for out in outs])
    assert_same_course(outs[0], whole)
    # Rank 0 alone writes and tells.
    assert f", {ranks} ranks" in done[0].out
    assert not any(out.exists() for out in outs[1:])
    assert not any(d.out or d.err for d in done[1:])
    assert {p.name for p in outs[0].iterdir()} == {p.name for p in whole.iterdir()}
    trained, alone = (flat(load(out)[0].parameters()) for out in (outs[0], whole))
    for name, a in trained.items():
        assert mx.allclose(a.astype(mx.float32), alone[name].astype(mx.float32), atol=5e-3), name


@pytest.mark.parametrize(("ranks", "K", "batch_size"), [(2, 2, 3), (4, 2, 2)])
def test_sequences_split_over_ranks_change_nothing(corpus, tmp_path, ranks, K, batch_size):
    """Fourteen tokens on two ranks, so that dropout too is that of one process."""
    model = {"context": 14, "layers": "hla2,window", "window": 5}
    # Every exchange goes around all ranks, so a few steps take longer than many of whole rows.
    settings = {"batch_size": batch_size, "steps": 2, "accumulate": 1, "valid_every": 2, "valid_batches": 1}
    split = {**model, "layers": ("hla2", "window")}
    alone = one_process(corpus, tmp_path / "alone", model=split, **settings)
    out = tmp_path / "out"
    run(tmp_path, [flags(corpus, out, sequence_parallel=K, **model, **settings)] * ranks)
    assert_same_course(out, alone)


def test_a_run_goes_on_with_more_ranks_and_with_fewer(corpus, whole, tmp_path):
    """A signal to one of two ranks stops both after one and the same step; then three go on, or one."""
    out = tmp_path / "two"
    processes = start(tmp_path, [flags(corpus, out)] * 2)
    until(lambda: find_checkpoints(out), processes)
    processes[1].send_signal(signal.SIGINT)
    done = all_ended(processes)
    assert [d.code for d in done] == [130, 130], done
    assert "go on with: mlx-hla train --resume" in done[0].out
    taken = find_checkpoints(out)[-1]
    assert numbers(out)[-1][0] == int(taken.name[-8:]) < SETTINGS["steps"]
    three = shutil.copytree(out, tmp_path / "three")
    assert resume(out).finished
    assert_same_course(out, whole)
    # The others need not see rank 0's disk.
    run(tmp_path, [[*MLX_HLA, "train", "--resume", f"--out={o}"] for o in (three, "no/where", "no/where")])
    assert_same_course(three, whole)


def stop_at(monkeypatch, number):
    """Let Ctrl-C come in the step of this number, in this process."""
    step = Trainer.step

    def stopped(self, n, *rest):
        if n == number:
            signal.raise_signal(signal.SIGINT)
        return step(self, n, *rest)

    monkeypatch.setattr(Trainer, "step", stopped)


def test_a_run_of_one_process_goes_on_with_two(corpus, whole, tmp_path, monkeypatch):
    stop_at(monkeypatch, 3)
    out = one_process(corpus, tmp_path / "out")
    assert 0 < numbers(out)[-1][0] < SETTINGS["steps"]
    run(tmp_path, [[*MLX_HLA, "train", "--resume", f"--out={out}"]] * 2)
    assert_same_course(out, whole)


@pytest.mark.parametrize("sequence_parallel", [1, 2])
def test_finetuning_on_ranks_counts_what_one_process_counts(tmp_path, sequence_parallel):
    """Padded examples of which the answers count, more of them on one rank than on the other; early stop."""
    pytest.importorskip("mlx_lm")
    from mlx_hla.tune import finetune

    base = make_base(tmp_path / "base")
    pairs = [
        {"prompt": f"def f{i}(x):\n" * (1 + i % 3), "completion": f"    return x + {i}\n" * (1 + i % 4)}
        for i in range(40)
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    more = {"batch_size": 3, "lr": 0.3, "patience": 1, "steps": 12, "valid_every": 3, "valid_batches": 4}
    config = finetune_settings(base, data, tmp_path / "alone", **more)
    alone = finetune(config)
    assert alone.step < 12  # it stopped early
    out = tmp_path / "out"
    given = {**vars(config), "out": out, "sequence_parallel": sequence_parallel}
    bools = {k for k, v in given.items() if isinstance(v, bool)}
    words = [f"--{k.replace('_', '-')}={v}" for k, v in given.items() if k not in bools and v is not None]
    run(tmp_path, [[*MLX_HLA, "finetune", *words]] * 2)
    for kind, name in (("step", "loss"), ("valid", "nats_per_byte")):
        got, want = (dict(numbers(o, kind, name)) for o in (out, tmp_path / "alone"))
        assert got == pytest.approx(want, rel=1e-4)
    assert {p.name for p in out.iterdir()} == {p.name for p in (tmp_path / "alone").iterdir()}


def test_mlx_launch_starts_ranks(corpus, tmp_path):
    launcher = Path(sys.executable).with_name("mlx.launch")
    if not launcher.exists():
        pytest.skip("mlx.launch is not beside this Python")
    port = free_ports(2)[0]
    command = [launcher, "-n", "2", "--backend", "ring", "--starting-port", str(port), "--"]
    command += flags(corpus, tmp_path / "out", steps=2)
    done = subprocess.run(command, capture_output=True, text=True, timeout=LONG)
    assert ", 2 ranks" in done.stdout, done.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()


# --- without processes


class Pretended(Team):
    """A rank of a team, as far as its part of a batch goes."""

    def __init__(self, rank, size, K=1):
        super().__init__()
        self.rank, self.size, self.share = rank, size, Share(rank // K, size // K, rank % K, K)


@pytest.mark.parametrize(
    ("B", "T", "size", "K"), [(4, 8, 2, 1), (3, 7, 2, 1), (5, 7, 4, 2), (2, 9, 6, 3), (1, 5, 3, 1)]
)
def test_parts_are_the_batch_with_the_weights_of_its_mean(B, T, size, K):
    rng = np.random.default_rng(B)
    tokens, counts = rng.integers(1, 99, (B, T + 1)), rng.random((B, T)) < 0.6
    counts[0] = True  # so that some parts count more than others
    seen, weight = [], 0.0
    for rank in range(size):
        part, weights = Pretended(rank, size, K).part((mx.array(tokens), mx.array(counts)))
        assert part.shape == (weights.shape[0], weights.shape[1] + 1)
        weight += weights.sum().item() / size
        for row in range(len(part)):
            at = np.array(weights[row]) > 0
            seen += zip(np.array(part[row, :-1])[at], np.array(part[row, 1:])[at], strict=True)
    assert weight == pytest.approx(1)
    assert sorted(seen) == sorted(zip(tokens[:, :-1][counts], tokens[:, 1:][counts], strict=True))


def test_alone_everything_is_as_it_was():
    tokens, weights = ALONE.part(mx.ones((2, 5), mx.int32))
    assert tokens.shape == (2, 5)
    assert weights.tolist() == [[0.125] * 4] * 2
    assert ALONE.any(True, "") is True
    assert ALONE.any(False, "") is False
    assert ALONE.total(2.5, "") == 2.5
    assert ALONE.number_of_first(None, "") is None
    assert ALONE.place(4) is None
    assert str(ALONE) == ""


def test_the_one_process_of_a_launch_is_alone(tmp_path, monkeypatch):
    assert assemble("train").alone
    (tmp_path / "hosts").write_text("\n")  # as mlx.launch -n 1 has it
    monkeypatch.setenv("MLX_RANK", "0")
    monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "hosts"))
    assert assemble("train").alone


@pytest.mark.parametrize(
    ("K", "model", "settings", "message"),
    [
        (1, {}, {"batch_size": 1}, "batch_size is that of all ranks together: it must be at least 2"),
        (2, {}, {"checkpoint_blocks": True}, "checkpoint_blocks does not go with sequence_parallel"),
        (2, {"layers": ("softmax", "hla2")}, {}, "sequence_parallel needs constant states"),
        (2, {"context": 1}, {}, "sequence_parallel must be at most the context, 1, got 2"),
    ],
)
def test_runs_that_cannot_be_split_so_are_refused(K, model, settings, message):
    team = Pretended(0, 2, K)
    with pytest.raises(InputError, match=message):
        team.check_split(ModelConfig(**{**MODEL, **model}), TrainConfig(**{**SETTINGS, **settings}))
    with pytest.raises(InputError, match="sequence_parallel must divide the number of ranks, 1, got 2"):
        Team(None, 2)
    with pytest.raises(InputError, match="team must be a Team, got 2"):
        resume("nowhere", team=2)


@pytest.mark.parametrize("command", ["train", "finetune"])
def test_help_tells_of_ranks(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--sequence-parallel K" in said
    assert f"mlx.launch --hostfile FILE --backend ring -- mlx-hla {command}" in said
    assert "MLX_HLA_PATIENCE" in said
