"""A sequence split over real processes: values, states and gradients equal those of the whole one."""

import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest
from by_hand import all_ended, free_ports, start, until

import mlx_hla
from mlx_hla.errors import InputError
from mlx_hla.models import LanguageModel, ModelConfig, load, save
from mlx_hla.nn import HLAttention
from mlx_hla.ops.operator import OPERATORS

SCRIPT = Path(__file__).with_name("parallel_ranks.py")
EXAMPLE = SCRIPT.parent.parent / "examples" / "long_prompt.py"


def launch(ranks, *args, script=SCRIPT):
    launcher = Path(sys.executable).with_name("mlx.launch")
    if not launcher.exists():
        pytest.skip("mlx.launch is not beside this Python")
    port = str(free_ports(ranks)[0])  # others may be launched on this machine
    command = [launcher, "-n", str(ranks), "--backend", "ring", "--starting-port", port, "--"]
    command += [sys.executable, script, *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_operators_layers_and_a_model_on_ranks(ranks):
    done = launch(ranks)
    said = done.stdout + done.stderr
    assert said.count(" done") == ranks, said[-3000:]


def test_a_prompt_read_on_ranks_goes_on_as_one_read_alone(tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("".join(f"def f{i}(x):\n    return x + {i}\n\n\n" for i in range(40)))
    options = [str(prompt), "--chunk", "64", "--max-tokens", "12"]
    alone = subprocess.run([sys.executable, EXAMPLE, *options], capture_output=True, text=True, timeout=120)
    assert "tokens read on 1 ranks in" in alone.stdout, alone.stderr
    split = launch(3, *options, script=EXAMPLE)
    assert "tokens read on 3 ranks in" in split.stdout, split.stderr
    texts = ["\n".join(run.stdout.splitlines()[:-1]) for run in (alone, split)]
    assert texts[0] == texts[1]
    assert len(texts[0]) > 5


def other(tmp_path, what, prompt):
    """The example's command, but for one thing."""
    command = [sys.executable, EXAMPLE, str(prompt), "--chunk", "8"]
    if what == "version":
        script = "import runpy, mlx_hla; mlx_hla.__version__ = '0.0.9'; "
        script += f"runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')"
        return [sys.executable, "-c", script, *command[2:]]
    if what == "prompt":
        changed = tmp_path / "changed.txt"
        changed.write_text(prompt.read_text() + "x")
        return [*command[:2], str(changed), *command[3:]]
    model, tokenizer = load()
    model.norm.weight = model.norm.weight + 0.01
    save(tmp_path / "model", model, tokenizer)
    return [*command, "--model", str(tmp_path / "model")]


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("version", "differ in the version of mlx-hla: rank 0 has 0.1.0, rank 1 has 0.0.9"),
        ("prompt", "reading a prompt: the ranks differ in the prompt: rank 0 has "),
        ("weights", "reading a prompt: the ranks differ in the model: rank 0 has "),
    ],
)
def test_a_prompt_is_read_by_ranks_that_are_alike(tmp_path, what, said):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("def f(x):\n    return x\n" * 40)
    command = [sys.executable, EXAMPLE, str(prompt), "--chunk", "8"]
    for one in all_ended(start(tmp_path, [command, other(tmp_path, what, prompt)]), 60):
        assert one.code == 1
        assert one.err.count("\n") == 1
        assert said in one.err


def test_a_rank_that_is_killed_while_it_reads_ends_all(tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("def f(x):\n    return x\n" * 5000)
    command = [sys.executable, "-c", READS, EXAMPLE, str(prompt), "--chunk", "1"]
    processes = start(tmp_path, [command] * 3)
    until(lambda: all(p.said[0].read_text() for p in processes), processes)
    time.sleep(0.5)  # a token at a time takes minutes
    processes[1].kill()
    for one in all_ended(processes, 60)[::2]:
        assert one.code
        assert one.err.count("\n") == 1
        assert "has ended" in one.err


# It says when the reading is under way.
READS = """
import runpy, sys
from mlx_hla import generate
really = generate.prefill
def prefill(*args):
    print("reads", flush=True)
    return really(*args)
generate.prefill = prefill
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_group_of_one_is_none():
    done = subprocess.run([sys.executable, SCRIPT, "hla2"], capture_output=True, text=True, timeout=120)
    assert "rank 0 done" in done.stdout, done.stderr


def test_every_operator_is_among_them():
    source = SCRIPT.read_text()
    names = {operator.name for operator in OPERATORS.values()}
    assert all(f"mlx_hla.{name}," in source for name in names), names


def test_a_checkpointed_model_takes_no_group():
    config = ModelConfig(vocab_size=20, dims=16, num_layers=1, num_heads=2, hidden_dims=16)
    with pytest.raises(InputError, match="checkpoint does not go with a group"):
        LanguageModel(config)(mx.zeros((1, 2), mx.int32), checkpoint=True, group=mx.distributed.init())


def test_what_is_no_group_is_refused():
    with pytest.raises(
        ValueError, match=r"\[HLAttention\] group must be None or an mx.distributed.Group, got s"
    ):
        HLAttention(16, 2)(mx.ones((1, 2, 16)), group="ring")
    q = mx.ones((1, 2, 1, 4))
    with pytest.raises(ValueError, match=r"\[hla2\] group must be None or an mx.distributed.Group, got int"):
        mlx_hla.hla2(q, q, q, group=3)
    with pytest.raises(ValueError, match=r"q must not be empty"):
        mlx_hla.hla2(q[:, :0], q[:, :0], q[:, :0], group=mx.distributed.init())
