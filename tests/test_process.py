"""What a command does to its process: the BLAS that MLX will use, hints and bars on a terminal."""

import ctypes
import io
import json
import subprocess
import sys
import warnings

import mlx.core as mx
import pytest

from mlx_hla import cli, process, progress
from mlx_hla.errors import InputError


def has_openblas():
    try:
        ctypes.CDLL("libopenblas.so.0")
    except OSError:
        return False
    return True


def test_a_warning_of_ours_is_a_line(monkeypatch, capsys):
    shown = []
    monkeypatch.setattr(warnings, "showwarning", lambda *about: shown.append(about))
    process.warn_in_a_line()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("mlx-hla's kernels\n are not used", RuntimeWarning, stacklevel=1)
        warnings.warn("another's", RuntimeWarning, stacklevel=1)
    assert capsys.readouterr().err == "mlx-hla: warning: mlx-hla's kernels are not used\n"
    assert [str(message) for message, *_ in shown] == ["another's"]


USES = """
import sys
from mlx_hla.process import prefer_openblas
print(prefer_openblas())
import mlx.core as mx
a = mx.random.normal((300, 300))
mx.eval(a @ a)
print("openblas" in open("/proc/self/maps").read())
print(prefer_openblas())
"""


@pytest.mark.skipif(sys.platform != "linux" or not has_openblas(), reason="OpenBLAS on Linux")
@pytest.mark.parametrize("wanted", [True, False])
def test_openblas_is_preferred_where_it_is(monkeypatch, wanted):
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    if not wanted:
        monkeypatch.setenv("MLX_HLA_OPENBLAS", "0")
    done = subprocess.run([sys.executable, "-c", USES], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.split() == [str(wanted), str(wanted), "False"]


def test_the_command_line_asks_for_it_before_mlx(monkeypatch):
    script = """
import sys
from mlx_hla import cli, process
cli.prefer_openblas = lambda: print("mlx.core" in sys.modules)
sys.exit(cli.main(["info", "--json"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.startswith("False\n{")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("maps", "platform", "terminal", "hint"),
    [
        ("/lib/libblas.so.3", "linux", True, True),
        ("/lib/libopenblas.so.0", "linux", True, False),
        ("/lib/libblas.so.3", "linux", False, False),
        ("/lib/libblas.so.3", "darwin", True, False),
    ],
)
def test_the_hint(monkeypatch, maps, platform, terminal, hint):
    if mx.default_device() != mx.cpu:
        pytest.skip("a hint for CPUs")
    stderr = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(process.Path, "read_text", lambda *_, **__: maps)
    process.hint_at_openblas()
    assert ("apt-get install libopenblas0-pthread" in stderr.getvalue()) is hint
    assert stderr.getvalue().count("\n") == hint


def test_eval_shows_a_bar_on_a_terminal(monkeypatch, capsys):
    stderr = Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    argv = [
        "eval",
        "--valid-batches",
        "2",
        "--batch-size",
        "1",
        "--samples",
        "2",
        "--max-tokens",
        "2",
        "--json",
    ]
    assert cli.main(argv) == 0
    assert "2/2" in stderr.getvalue()
    assert "batch" in stderr.getvalue()
    assert "sample" in stderr.getvalue()
    assert json.loads(capsys.readouterr().out)["samples"] == 2


def test_without_tqdm_there_is_no_bar_and_no_error(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(progress.importlib, "import_module", missing)
    stderr = Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    with progress.progress(3, "batch") as one_more:
        one_more()
    assert stderr.getvalue() == "mlx-hla: no progress bar: tqdm is missing: pip install 'mlx-hla[train]'\n"
    with pytest.raises(InputError, match=r"matplotlib is missing: pip install 'mlx-hla\[train\]'"):
        progress.require("matplotlib")
