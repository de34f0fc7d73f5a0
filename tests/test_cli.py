"""The command line: what it prints, and one clear line for everything that a user can get wrong."""

import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys

import pytest

from mlx_hla import __version__, cli
from mlx_hla.models import PRETRAINED, LanguageModel, ModelConfig, save
from mlx_hla.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    config = ModelConfig(vocab_size=380, dims=16, num_layers=1, num_heads=2, hidden_dims=24, context=32)
    save(folder, LanguageModel(config), train_tokenizer(["def f(x):\n    return x\nimport os\n" * 30], 380))
    return folder


def run(capsys, *argv):
    try:
        status = cli.main([str(a) for a in argv])
    except SystemExit as e:
        status = e.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def refused(capsys, match, *argv):
    status, out, err = run(capsys, *argv)
    assert status not in (0, None)
    assert out == ""
    assert err.startswith("mlx-hla: error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert match in err


# --- generate


def test_generate(capsys, folder):
    argv = ["generate", "--model", folder, "--prompt", "def é", "--max-tokens", 12, "--seed", 3]
    status, out, err = run(capsys, *argv)
    assert (status, err) == (0, "")
    assert out.startswith("def é")
    lines = out.rstrip().split("\n")
    assert lines[-4] == "=" * 10
    assert lines[-3].startswith("Prompt: ")
    assert lines[-3].endswith(" tokens-per-sec")
    assert lines[-2].startswith("Generation: ")
    assert lines[-1].startswith("Peak memory: ")
    assert lines[-1].endswith(" GB")
    status, again, _ = run(capsys, *argv, "--quiet")
    assert out.startswith(again.rstrip("\n"))
    assert "Peak memory" not in again


def test_generate_json_and_stdin(capsys, folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"def f(\n"), encoding="ascii"))
    status, out, err = run(capsys, "generate", "--model", folder, "--max-tokens", 5, "--json", "--seed", 1)
    result = json.loads(out)
    assert (status, err, out.count("\n")) == (0, "", 1)
    assert result["prompt"] == "def f(\n"
    assert result["generation_tokens"] <= 5
    assert result["finish_reason"] in ("length", "end")
    assert {"completion", "prompt_tokens", "prompt_tps", "generation_tps", "peak_memory"} <= set(result)


def test_generate_stops(capsys, folder):
    argv = ["generate", "--model", folder, "--prompt", "x", "--seed", 1, "--json", "--max-tokens", 40]
    text = json.loads(run(capsys, *argv)[1])["completion"]
    stop = text[5:8]
    result = json.loads(run(capsys, *argv, "--stop", stop.replace("\n", "\\n"))[1])
    assert result["completion"] == text[: text.index(stop)]
    assert result["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (["--prompt", ""], "the prompt has no tokens"),
        (["--prompt", "x", "--max-tokens", "0"], "max_tokens must be at least 1"),
        (["--prompt", "x", "--max-tokens", "many"], "invalid int value"),
        (["--prompt", "x", "--temperature", "-1"], "temperature must be"),
        (["--prompt", "x", "--top-p", "2"], "top_p must be"),
        (["--prompt", "x", "--seed", "-5"], "seed must be"),
        (["--prompt", "x", "--stop", ""], "stop string"),
        (["--prompt", "x", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["--prompt", "\udcff"], "surrogate"),
        (["--prompt", "x", "--model", "/nonexistent/model"], "no such model folder"),
        (["--prompt", "x", "--model", __file__], "is a file"),
    ],
)
def test_generate_refuses(capsys, folder, argv, match):
    model = [] if "--model" in argv else ["--model", folder]
    refused(capsys, match, "generate", *model, *argv)


@pytest.mark.parametrize(("data", "match"), [(b"", "no tokens"), (b"ab\xff", "no UTF-8 (byte 2)")])
def test_bad_stdin(capsys, folder, monkeypatch, data, match):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    refused(capsys, match, "generate", "--model", folder)


def test_broken_model_files(capfd, folder, tmp_path):
    for name in ("config.json", "model.safetensors", "tokenizer.model"):
        for content in (b"", b"\x80\x04garbage", (folder / name).read_bytes()[:-7]):
            for file in folder.iterdir():
                (tmp_path / file.name).write_bytes(file.read_bytes())
            (tmp_path / name).write_bytes(content)
            # capfd: nothing may come from the C++ libraries either
            refused(capfd, name, "generate", "--model", tmp_path, "--prompt", "x")


# --- train, eval, info


TRAIN = "--preset tiny --vocab-size 380 --dims 16 --num-layers 1 --hidden-dims 16 --context 16 --batch-size 2"


def test_train_eval_info(capsys, corpus, tmp_path):
    out = tmp_path / "run"
    argv = ["train", *TRAIN.split(), "--data", corpus, "--out", out, "--steps", 4]
    argv += ["--valid-fraction", 0.2, "--valid-batches", 0]
    status, printed, _ = run(capsys, *argv)
    assert status == 0
    assert "step 4/4: validation" in printed
    assert {"config.json", "model.safetensors", "tokenizer.model", "log.jsonl", "loss.png"} <= {
        f.name for f in out.iterdir()
    }
    refused_again = run(capsys, *argv)
    assert refused_again[0] == 1
    assert "holds a run already" in refused_again[2]

    common = ["--model", out, "--data", corpus, "--valid-fraction", 0.2]
    status, printed, _ = run(capsys, "eval", *common, "--samples", 3, "--max-tokens", 20, "--show", 1)
    assert status == 0
    assert "nats per byte over" in printed
    assert "of 3 sampled functions parse" in printed
    result = json.loads(run(capsys, "eval", *common, "--json")[1])
    last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    # the run's own last validation was of the float32 weights
    assert result["nats_per_byte"] == pytest.approx(last["nats_per_byte"], rel=5e-3)

    status, printed, _ = run(capsys, "info", "--model", out)
    assert status == 0
    assert "hla2" in printed
    result = json.loads(run(capsys, "info", "--model", out, "--json")[1])
    assert result["parameters"] == sum(result["parameters_by_part"].values())
    assert len(set(result["state_bytes_after_tokens"].values())) == 1
    assert result["weights_dtypes"] == ["BF16"]


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (["train", "--data", "/nonexistent"], "no such file or folder"),
        (["train", "--steps", "0"], "steps must be from 1"),
        (["train", "--dims", "1000000"], "dims must be from 1"),
        (["train", "--operator", "hla9"], "operator must be"),
        (["train", "--lr", "nan"], "lr must be finite"),
        (["train", "--preset", "huge"], "invalid choice"),
        (["train", "--tokenizer", "/nonexistent"], "/nonexistent: cannot read it"),
        (["train", "--resume", "--out", "/nonexistent"], "no checkpoint to resume"),
        (["train", "--resume", "--lr", "1"], "leave out --lr"),
        (["train", "--lr", "inf"], "error: lr must be finite"),
        (["train", "--clip", "nan"], "error: clip must be finite"),
        (["train", "--out", ""], "out must be a path"),
        (["train", "--data", ""], "data must be a path"),
        (["train", "--extra", ""], "extra must be a path"),
        (["train", "--extra", "/nonexistent"], "/nonexistent: no such file or folder"),
        (["train", "--tokenizer", ""], "tokenizer must be a path"),
        (["train", "--suffix", ""], "suffix must be"),
        (["train", "--resume", "--out", ""], "out must be a path"),
        (["train", "--tokenizer", "x", "--vocab-size", "400"], "leave out --vocab-size"),
        (["train", "--init-from", "x", "--dims", "64"], "leave out --dims"),
        (["train", "--init-from", "x", "--tokenizer", "y"], "leave out tokenizer"),
        (["train", "--init-from", "/nonexistent"], "no such model folder"),
        (["generate", "--model", "", "--prompt", "x"], "the model's folder must be a path"),
        (["eval", "--model", ""], "the model's folder must be a path"),
        (["eval", "--data", ""], "the corpus must be a path"),
        (["info", "--model", ""], "the model's folder must be a path"),
        (["eval", "--model", "/nonexistent"], "no such model folder"),
        (["eval", "--samples", "-1"], "samples must be"),
        (["info", "--model", "/nonexistent"], "no such model folder"),
        ([], "required: generate"),
        (["nonsense"], "invalid choice"),
    ],
)
def test_refusals(capsys, tmp_path, monkeypatch, argv, match):
    monkeypatch.chdir(tmp_path)
    if argv[:1] == ["train"] and "--data" not in argv:
        (tmp_path / "corpus.txt").write_text("some text\n" * 100)
        argv = [*argv, "--data", "corpus.txt"] if "--resume" not in argv else argv
    status, _, err = run(capsys, *argv)
    assert status not in (0, None)
    assert err.startswith("mlx-hla: error: ")
    assert err.count("\n") == 1
    assert match in err
    assert not (tmp_path / "runs").exists()


def test_empty_corpus(capsys, tmp_path):
    (tmp_path / "x.py").write_text("\n")
    refused(capsys, "corpus is empty", "train", "--data", tmp_path, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- help, table, process


def test_help_shows_every_default(capsys):
    for name in cli.COMMANDS:
        status, out, _ = run(capsys, name, "--help")
        assert status == 0
        assert "default" in out or name == "lm"  # whose flags are mlx-lm's
    out = " ".join(run(capsys, "train", "--help")[1].split())
    assert "learning rate after the warm-up (default: 0.0015)" in out
    assert run(capsys, "--version")[1] == f"mlx-hla {__version__}\n"
    assert run(capsys, "--help")[0] == 0


def test_a_row_in_the_table_is_a_subcommand(capsys, monkeypatch):
    row = cli.Command("say it", lambda p: p.add_argument("--word"), lambda args: print(args.word) or 7)
    monkeypatch.setitem(cli.COMMANDS, "say", row)
    assert run(capsys, "say", "--word", "hi") == (7, "hi\n", "")


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyboardInterrupt(), 130, "mlx-hla: error: interrupted\n"),
        (RuntimeError("a\nb"), 1, "mlx-hla: error: RuntimeError: a b\n"),
        (PermissionError(13, "denied", "f"), 1, "mlx-hla: error: [Errno 13] denied: 'f'\n"),
    ],
    ids=["interrupt", "bug", "file"],
)
def test_unexpected_errors_are_one_line_too(capsys, monkeypatch, error, status, line):
    def fail(args):
        raise error

    monkeypatch.setitem(cli.COMMANDS, "fail", cli.Command("", lambda p: None, fail))
    assert run(capsys, "fail") == (status, "", line)
    if status == 1:
        monkeypatch.setenv("MLX_HLA_DEBUG", "1")
        with pytest.raises(type(error)):
            cli.main(["fail"])


def start(*argv, **options):
    command = [sys.executable, "-m", "mlx_hla", *map(str, argv)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_a_closed_pipe_ends_quietly(folder):
    process = start("generate", "--model", folder, "--prompt", "x", "--max-tokens", "100000")
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


def shell(command, *argv, timeout=60):
    line = f"{shlex.quote(sys.executable)} -m mlx_hla {shlex.join(map(str, argv))} {command}"
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=timeout)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(folder, closed):
    done = shell(closed, "generate", "--model", folder, "--prompt", "x", "--max-tokens", "3", "--seed", 1)
    assert done.returncode == 0
    assert done.stderr == ""
    assert ("Peak memory" in done.stdout) is (closed in ("<&-", "2>&-"))
    if closed == "<&-":
        for flags in ([], ["--prompt", "-"]):
            without = shell(closed, "generate", "--model", folder, *flags)
            assert without.returncode == 1
            assert without.stderr == "mlx-hla: error: no prompt: give --prompt TEXT, or text on stdin\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_full_disk_under_stdout_is_one_line(folder):
    done = shell(">/dev/full", "generate", "--model", folder, "--prompt", "x", "--max-tokens", "3")
    assert done.returncode == 1
    assert done.stderr == "mlx-hla: error: [Errno 28] No space left on device\n"


def test_paths_that_are_no_utf8(corpus, tmp_path):
    strange = os.path.join(os.fsencode(tmp_path), b"caf\xe9")
    os.mkdir(strange)
    os.mkdir(strange + b"/data")
    for i in range(20):
        with open(strange + b"/data/\xff%d.py" % i, "w") as file:
            file.write(f"def f{i}(x):\n    return x + {i}\n" * 8)
    run = [sys.executable, "-m", "mlx_hla"]
    train = [
        "train",
        *TRAIN.split(),
        "--data",
        strange + b"/data",
        "--out",
        strange + b"/run",
        "--steps",
        "2",
    ]
    for argv in (
        [*train, "--valid-fraction", "0.3", "--steps", "2"],
        ["train", "--resume", "--out", strange + b"/run"],
        ["info", "--model", strange + b"/run"],
        ["eval", "--model", strange + b"/run", "--data", strange + b"/data", "--valid-fraction", "0.3"],
        ["generate", "--model", strange + b"/run", "--prompt", "x", "--max-tokens", "2"],
    ):
        done = subprocess.run([*run, *argv], capture_output=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, b""), argv


def test_a_run_is_resumed_from_another_folder(corpus, tmp_path, monkeypatch, capsys):
    (tmp_path / "here").symlink_to(corpus)
    shutil.copy(PRETRAINED / "tokenizer.model", tmp_path)
    monkeypatch.chdir(tmp_path)
    flags = [f for f in TRAIN.split() if f not in ("--vocab-size", "380")]
    flags += ["--data", "here", "--out", "run", "--steps", "1", "--tokenizer", "tokenizer.model"]
    assert run(capsys, "train", *flags, "--valid-fraction", 0.2)[0] == 0
    monkeypatch.chdir("/")
    assert run(capsys, "train", "--resume", "--out", tmp_path / "run")[0] == 0


def test_ctrl_c_saves_and_resume_ends_the_run(corpus, tmp_path):
    out = tmp_path / "run"
    settings = ["--data", corpus, "--out", out, "--steps", 1000, "--log-every", 1, "--seed", 1]
    process = start("train", *TRAIN.split(), *settings, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    for line in process.stdout:
        if line.startswith(b"step 2/"):
            break
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err == b""
    assert b"go on with: mlx-hla train --resume --out" in rest
    saved = [f for f in out.iterdir() if f.name.startswith("checkpoint-")]
    assert len(saved) == 1
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()[1:]]
    assert steps == list(range(1, int(saved[0].name[-8:]) + 1))
