"""The examples that take the command line's options."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name, *args, **options):
    command = [sys.executable, EXAMPLES / name, *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def test_generate_ends_with_its_speed():
    result = run("generate.py", "--prompt", "def f(x):", "--max-tokens", "5", "--seed", "0")
    assert result.returncode == 0, result.stderr
    said = result.stdout + result.stderr
    assert said.startswith("def f(x):") or "def f(x):" in said
    for word in ("Prompt:", "Generation: 5 tokens", "tokens-per-sec", "Peak memory"):
        assert word in said


def test_generate_reads_its_prompt_from_stdin():
    result = run("generate.py", "--max-tokens", "3", "--json", input="import os\n")
    assert result.returncode == 0, result.stderr
    assert '"prompt": "import os' in result.stdout


@pytest.mark.parametrize("name", ["generate.py", "train.py", "finetune.py"])
def test_help_shows_defaults(name):
    result = run(name, "--help")
    assert result.returncode == 0
    assert "default:" in result.stdout


def test_train_says_what_is_wrong():
    result = run("train.py", "--data", "no-such-folder")
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("mlx-hla: error:")


def test_distil_swaps_and_ends_with_its_table():
    pytest.importorskip("mlx_lm")
    small = "--steps 12 --recover-steps 8 --dims 32 --vocab 400 --context 32 --batch 4 --max-bytes 200000"
    for more in ("--valid-batches 2", "--valid-batches 2 --target text --operator first --rope"):
        result = run("distil.py", *small.split(), *more.split())
        assert result.returncode == 0, result.stderr
        *_, title, before, without, swapped, after = result.stdout.splitlines()
        assert title.split()[:4] == ["model", "seconds", "nats", "per"]
        assert without.startswith("no attention in 1, 3")
        assert swapped.startswith("layers 1, 3 swapped")
        assert after.startswith("new layers trained")
        # The caches of half of the layers do not grow.
        kept, held = ([int(x.replace(",", "")) for x in row.split()[-3:]] for row in (before, after))
        assert [2 * (held[i + 1] - held[i]) for i in (0, 1)] == [kept[i + 1] - kept[i] for i in (0, 1)]


def test_the_quantisation_table_has_every_kind():
    result = run("quantize.py", "--batch-size", "1", "--valid-batches", "1", "--tokens", "3")
    assert result.returncode == 0, result.stderr
    for row in (
        "| 16 bits (as shipped) | 11.79 |",
        "| 8 bits |",
        "| 4 bits |",
        "| mxfp4 |",
        "| 1,048,576 | 1.60 |",
    ):
        assert row in result.stdout


def test_the_benchmark_has_its_table_its_file_and_its_picture(tmp_path):
    pytest.importorskip("matplotlib")
    files = ("--json", tmp_path / "a.json", "--picture", tmp_path / "a.png")
    small = "--lengths 32 64 --operators first hla2 --heads 2 --dim 8 --seconds 0.001"
    result = run("benchmark.py", *small.split(), *map(str, files))
    assert result.returncode == 0, result.stderr
    title, head, *lines = result.stdout.splitlines()
    assert "2 heads of 8, float32" in title
    assert head.split()[:2] == ["T", "decay"]
    assert [row.split()[:2] for row in lines[:4]] == [[T, d] for T in ("32", "64") for d in ("gate", "none")]
    assert len(lines) == 8
    assert all("ahead" in row for row in lines[4:])
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert len(rows) == 8
    assert all(r["ms"][0] > 0 and r["memory"] > 1 for r in rows)
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_the_benchmark_of_decoding_has_its_table_and_its_file(tmp_path):
    small = "--lengths 20 9 --batch 1 2 --operators hla2 readout --heads 2 --dim 8 --tokens 2 --seconds 0.001"
    result = run("benchmark_decode.py", *small.split(), "--most", "5119", "--json", tmp_path / "a.json")
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 6
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [(r["batch"], r["T"]) for r in rows] == [(1, 9), (1, 20), (2, 9), (2, 20)]
    assert [r["softmax_ms"] is None for r in rows] == [False, False, False, True]  # of 5,120 bytes
    for r in rows:
        hla2, readout = r["operators"].values()
        assert hla2["state_bytes"] == r["batch"] * 2 * 4 * 2 * 8 * 8
        assert readout["state_bytes"] == r["batch"] * 2 * 4 * (2 * 8 * 8 + 1)
        assert min(x for one in (hla2, readout) for x in one.values()) > 0


def test_where_two_curves_cross():
    crossing = runpy.run_path(str(EXAMPLES / "benchmark.py"))["crossing"]
    assert crossing([1000, 2000], [0.5, 2.0]) == "ahead from about 1,400 tokens on"
    assert crossing([100, 200], [0.5, 2.0]) == "ahead from about 140 tokens on"
    assert crossing([100, 200], [1.5, 2.0]) == "ahead from 100 tokens on, the shortest measured"
    assert crossing([100, 200], [1.5, 0.9]) == "not ahead up to 200 tokens"
    assert crossing([1000, 2000, 4000], [1.2, 0.8, 1.25]) == "ahead from about 2,800 tokens on"
