"""Ranks that die, freeze, never come or differ: every other ends with one line, and the run can go on."""

import os
import shutil
import signal
import subprocess
import sys
import time

import mlx.core as mx
import pytest
from by_hand import LONG, MLX_HLA, all_ended, ended, freeze, start, until
from finetune_runs import SMALL, TEXT, make_base, make_texts
from test_train_ranks import MODEL, assert_same_course, flags, numbers, one_process, stop_at

from mlx_hla import patience
from mlx_hla.errors import InputError
from mlx_hla.models import LanguageModel, ModelConfig, save
from mlx_hla.tokenizer import train_tokenizer
from mlx_hla.train import resume
from mlx_hla.train.checkpoint import find_checkpoints

SOON = 30  # seconds for ranks to end once another has, on busy cores; a second or two where nothing else runs


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_texts(tmp_path_factory.mktemp("corpus"))


# Without dropout: split over fifteen tokens it would be another.
LONG_RUN = {"dropout": 0.0, "steps": 500, "save_every": 2, "valid_every": 500, "valid_batches": 1}


def steady(corpus, out, **more):
    """A run that is long enough to be killed at any time."""
    return flags(corpus, out, **{**LONG_RUN, **more})


@pytest.mark.parametrize(
    ("ranks", "killed", "more"), [(3, 1, {}), (3, 0, {}), (2, 1, {"sequence_parallel": 2})]
)
def test_a_killed_rank_ends_all_and_the_run_goes_on(corpus, tmp_path, monkeypatch, ranks, killed, more):
    out = tmp_path / "out"
    processes = start(tmp_path, [steady(corpus, out, **more)] * ranks)
    until(lambda: find_checkpoints(out), processes)
    processes[killed].kill()
    begin = time.monotonic()
    done = all_ended(processes, SOON)
    print(f"all ended {time.monotonic() - begin:.2f} s after it")
    assert done[killed].code == -signal.SIGKILL
    for rank, one in enumerate(done):
        if rank != killed:
            assert one.code in (1, -signal.SIGKILL), one
            assert one.error.startswith(f"rank {rank} of {ranks}: "), one
            assert "has ended, " in one.error
    if killed and done[0].code == 1:
        assert "the last good checkpoint is " in done[0].error
    # It goes on, with the losses of a run that nobody killed.
    stop_at(monkeypatch, int(find_checkpoints(out)[-1].name[-8:]) + 2)
    resume(out)
    want = one_process(corpus, tmp_path / "alone", **LONG_RUN)
    assert len(numbers(out)) > 3
    assert_same_course(out, want)


@pytest.mark.parametrize("moment", [0.0, 0.1, 0.3])
def test_a_launcher_that_ends_the_others_does_not_take_their_line(corpus, tmp_path, moment):
    """mlx.launch terminates all ranks once it has seen one end: before, in or after an exchange."""
    processes = start(tmp_path, [steady(corpus, tmp_path / "out")] * 2)
    until(lambda: find_checkpoints(tmp_path / "out"), processes)
    processes[1].kill()
    time.sleep(moment)
    processes[0].terminate()
    done = all_ended(processes, SOON)[0]
    assert done.code in (1, -signal.SIGKILL), done
    assert "has ended, " in done.error


def test_a_frozen_rank_is_waited_for_and_no_longer(corpus, tmp_path):
    out = tmp_path / "out"
    processes = start(tmp_path, [steady(corpus, out)] * 2, MLX_HLA_PATIENCE="3")
    until(lambda: find_checkpoints(out), processes)
    frozen = freeze(processes[0])
    begin = time.monotonic()
    try:
        done = ended(processes[1], SOON)
        assert time.monotonic() - begin > 2
    finally:
        for pid in frozen:
            os.kill(pid, signal.SIGKILL)
        processes[0].wait()
    assert done.code == -signal.SIGKILL  # it may be in a call that hears nothing else
    assert "rank 1 of 2: heard nothing of another rank for 3 s, in " in done.error
    assert "MLX_HLA_PATIENCE sets how long to wait" in done.error
    assert resume(out, int(find_checkpoints(out)[-1].name[-8:]) + 1).finished


def test_a_rank_that_never_comes_is_waited_for_and_no_longer(corpus, tmp_path):
    out = tmp_path / "out"
    command = steady(corpus, out)
    done = all_ended(start(tmp_path, [command, None, command], MLX_HLA_PATIENCE="2"), SOON)
    for one in done:
        assert one.code
        # A neighbour that does not answer, or one that is not called.
        assert "have not all come within 2 s" in one.error or "cannot join the others" in one.error
    assert not out.exists()


def test_ctrl_c_ends_a_rank_that_waits_for_others_to_come(corpus, tmp_path):
    (process,) = start(tmp_path, [steady(corpus, tmp_path / "out"), None])
    time.sleep(3)  # it has begun to wait, where nothing tells so
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    done = ended(process, SOON)
    assert done.code in (130, -signal.SIGINT), done
    assert done.err in ("", "mlx-hla: error: interrupted\n")


def test_what_it_waits_for_does_not_run_out_while_a_rank_works(corpus, tmp_path):
    """Longer than its patience with a silent rank; each step is a word of it."""
    out = tmp_path / "out"
    processes = start(
        tmp_path, [steady(corpus, out, steps=100_000)] * 2, MLX_HLA_PATIENCE="4"
    )  # two cores may be busy
    until(lambda: find_checkpoints(out), processes)
    time.sleep(6)
    assert [p.poll() for p in processes] == [None, None]
    processes[0].send_signal(signal.SIGTERM)
    assert [one.code for one in all_ended(processes)] == [130, 130]


OTHER_VERSION = (
    "import sys, mlx_hla; mlx_hla.__version__ = '0.0.9'; from mlx_hla.__main__ import main; sys.exit(main())"
)


def differing(what, corpus, tmp_path):
    """(commands of two ranks, of which the second differs; what both say)."""
    outs = [tmp_path / "out0", tmp_path / "out1"]
    own, other = (flags(corpus, out) for out in outs)
    if what == "version":
        other = [sys.executable, "-c", OTHER_VERSION, *other[3:]]
        return own, other, "in the version of mlx-hla: rank 0 has 0.1.0, rank 1 has 0.0.9"
    if what == "command":
        return (
            own,
            [*MLX_HLA, "train", "--resume", f"--out={outs[1]}"],
            "in the command: rank 0 has train, rank 1 has train --resume",
        )
    if what == "settings":
        return (
            own,
            [*other, "--clip=0.5"],
            "the settings: the ranks differ in clip: rank 0 has 1.0, rank 1 has 0.5",
        )
    if what == "split":
        return own, [*other, "--sequence-parallel=2"], "in sequence_parallel: rank 0 has 1, rank 1 has 2"
    if what == "data":
        more = shutil.copytree(corpus, tmp_path / "more")
        (more / "f0.py").write_text("print('other')\n" * 50)
        return own, flags(more, outs[1]), "the data: the ranks differ in the corpus"
    make_base(tmp_path / "a")
    model = LanguageModel(ModelConfig(**SMALL), seed=6)
    save(tmp_path / "b", model, train_tokenizer([TEXT * 30], 380), mx.float32)
    if what == "weights":
        kept = [w for w in own if not any(w.startswith(f"--{k.replace('_', '-')}=") for k in MODEL)]
        models = ([*kept, f"--init-from={tmp_path / name}"] for name in "ab")
        return *models, "the weights: the ranks differ in init_from"
    pytest.importorskip("mlx_lm")
    words = [*MLX_HLA, "finetune", f"--data={corpus}", "--batch-size=2"]
    tuned = (
        [*words, f"--out={out}", f"--model={tmp_path / name}"] for out, name in zip(outs, "ab", strict=True)
    )
    return *tuned, "the base: the ranks differ in the weights"


@pytest.mark.parametrize("what", ["version", "command", "settings", "split", "data", "weights", "base"])
def test_ranks_that_differ_say_in_what(corpus, tmp_path, what):
    *commands, message = differing(what, corpus, tmp_path)
    done = all_ended(start(tmp_path, commands), SOON)
    if what == "split":  # which is no split of two ranks' batch for the first
        assert message in done[0].error + done[1].error
        return
    for one in done:
        assert one.code == 1
        assert message in one.error
    assert not (tmp_path / "out0" / "log.jsonl").exists()


def test_what_only_rank_0_can_see_ends_all(corpus, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    first, second = all_ended(start(tmp_path, [flags(corpus, tmp_path / "out")] * 2), SOON)
    assert first.code == 1
    assert "holds a run already" in first.error
    assert second.code
    assert "rank 1 of 2: " in second.error
    assert "has ended" in second.error


def test_a_split_of_other_ranks_and_a_batch_too_small_are_refused(corpus, tmp_path):
    more, message = {"sequence_parallel": 3}, "sequence_parallel must divide the number of ranks, 2, got 3"
    done = all_ended(start(tmp_path, [flags(corpus, tmp_path / "out", **more)] * 2), SOON)
    assert all(one.code == 1 and message in one.error for one in done), done


# --- the clock


@pytest.mark.parametrize("bad", ["0", "-1", "soon", "nan", "inf", "1e10"])
def test_patience_is_seconds(bad):
    with pytest.raises(InputError, match="MLX_HLA_PATIENCE must be seconds above 0, got"):
        patience.seconds_of(bad)
    assert patience.seconds_of(None) == patience.seconds_of("") == 600
    assert patience.seconds_of("0.5") == 0.5


CLOCK = """
import os, sys, time
from mlx_hla.patience import PATIENCE
PATIENCE.start(1.0)
os.write(2, b"[ring] Socket 3 was closed by the peer\\nfrom below\\n")
sys.stderr.write("from python\\n")
exec(sys.argv[1])
"""


@pytest.mark.parametrize(
    ("then", "code", "said"),
    [
        ("PATIENCE.expect('nobody'); time.sleep(60)", -9, "mlx-hla: error: nobody\n"),
        ("PATIENCE.expect('nobody'); PATIENCE.expect(''); time.sleep(2)", 0, ""),
        ("for _ in range(8): PATIENCE.expect('nobody'); time.sleep(0.25)", 0, ""),
        (
            "PATIENCE.on_loss('gone'); os.write(2, b'[ring] Too many send/recv errors.\\n'); time.sleep(60)",
            -9,
            "mlx-hla: error: gone\n",
        ),
        (
            "PATIENCE.on_loss('gone'); os.write(2, b'[ring] Too many send/recv errors.\\n'); sys.exit(3)",
            3,
            "",
        ),
        ("os.write(2, b'no line end')", 0, "no line end"),
    ],
    ids=["silence", "rest", "words", "lost", "ends by itself", "rest of a line"],
)
def test_the_clock_beside(then, code, said):
    done = subprocess.run([sys.executable, "-c", CLOCK, then], capture_output=True, text=True, timeout=LONG)
    assert done.returncode == code
    rest = "".join(line for line in done.stderr.splitlines(keepends=True) if not line.startswith("from "))
    assert rest == said
    assert done.stderr.count("from below") == done.stderr.count("from python") == 1


def test_without_a_start_there_is_no_clock():
    own = patience.Patience()
    own.expect("nothing")
    own.on_loss("nothing")
    assert own.line == "nothing"
