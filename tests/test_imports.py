"""Imports point one way: kernels, ops, nn, models, what runs them, cli. And importing costs nothing."""

import ast
import graphlib
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import mlx_hla

ROOT = Path(mlx_hla.__file__).parent

# A part imports from lower floors, or from its own where ACROSS says so.
RANKS = [
    {"errors", "files", "settings", "flags", "process", "progress"}
    | {"devices", "trees", "losses", "transforms", "monoid", "verdicts", "ranks", "patience"},
    {"kernels", "tokenizer", "reference", "sampling"},
    {"ops", "data"},
    {"nn"},
    {"models", "lm_caches", "decoders", "launched"},
    {"generate", "reading", "train", "evaluate", "selftest", "mlx_lm", "surgery"},
    {"tune"},
    {"cli", "__main__", "pretrained"},
]
ACROSS = {
    ("files", "errors"),
    ("progress", "errors"),
    ("settings", "errors"),
    ("verdicts", "errors"),
    ("verdicts", "files"),
    ("verdicts", "settings"),
    ("settings", "files"),
    ("patience", "errors"),
    ("ranks", "errors"),
    ("ranks", "patience"),
    ("losses", "errors"),
    ("losses", "devices"),
    ("losses", "settings"),
    ("losses", "trees"),
    ("evaluate", "generate"),
    ("reading", "generate"),
    ("mlx_lm", "surgery"),
    ("__main__", "cli"),
}
RANK = {part: i for i, parts in enumerate(RANKS) for part in parts}
# The root package publishes the operators, and says what is missing; modules may read its version.
ROOT_IMPORTS = {"ops", "errors"}
# The ground truth stands beside the rest: nothing that it judges may use it, only the judge.
BESIDE = {"reference", "monoid"}
JUDGES = BESIDE | {"selftest"}


def module_name(path):
    parts = ("mlx_hla", *path.relative_to(ROOT).with_suffix("").parts)
    return parts[:-1] if parts[-1] == "__init__" else parts


def is_module(parts):
    path = ROOT.joinpath(*parts[1:])
    return path.is_dir() or path.with_suffix(".py").exists()


def imported(path):
    """The modules of the package that a file imports, at any depth of its code, as tuples of names."""
    name = module_name(path)
    package = name if path.name == "__init__.py" else name[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = tuple((node.module or "").split(".")) if node.module else ()
            if node.level:
                base = (*package[: len(package) - node.level + 1], *base)
            # `from package import x`: x may be a module or a name of the package
            found = [(*base, a.name) if is_module((*base, a.name)) else base for a in node.names]
        else:
            continue
        yield from (x for x in found if x[0] == "mlx_hla")


def edges():
    """(part, part) -> the files of the first that import the second."""
    out = {}
    for path in sorted(ROOT.rglob("*.py")):
        source = (*module_name(path), "")[1]
        for target in imported(path):
            if (target := (*target, "")[1]) != source:
                out.setdefault((source, target), []).append(str(path.relative_to(ROOT)))
    return out


def test_every_part_has_its_rank():
    parts = {(*module_name(path), "")[1] for path in ROOT.rglob("*.py")} - {""}
    assert parts == set(RANK), "add a new part to RANKS, where its imports allow"


def test_imports_point_one_way():
    wrong = []
    for (source, target), files in edges().items():
        if source == "":
            allowed = target in ROOT_IMPORTS
        elif target == "":  # `from mlx_hla import __version__` and the public operators
            allowed = RANK.get(source, 0) > RANK["ops"]
        else:
            lower = RANK.get(target, 0) < RANK.get(source, 0) or (source, target) in ACROSS
            allowed = lower and (target not in BESIDE or source in JUDGES)
        if not allowed:
            wrong.append(f"{source or 'mlx_hla'} imports {target or 'mlx_hla'} in {', '.join(files)}")
    assert not wrong, "\n".join(wrong)


def test_what_crosses_a_floor_is_needed_and_has_no_circle():
    assert set(edges()) >= ACROSS
    graphlib.TopologicalSorter(
        {source: {t for s, t in ACROSS if s == source} for source, _ in ACROSS}
    ).prepare()


def test_no_two_modules_share_a_name():
    """An error's traceback, an editor's tab and a sentence about `cache` name one file."""
    count = Counter(path.stem for path in ROOT.rglob("*.py") if path.stem != "__init__")
    assert not {name for name, n in count.items() if n > 1}


def test_the_reader_of_imports_sees_arrows():
    """Or the test above could pass by seeing nothing."""
    seen = edges()
    arrows = ("ops", "kernels"), ("nn", "ops"), ("models", "nn"), ("train", "models"), ("cli", "generate")
    for arrow in arrows:
        assert arrow in seen
    assert ("", "ops") in seen  # for a type checker


IMPORT = """
import sys
import mlx.core as mx
if hasattr(mx, "fast"):
    def built(*args, **options):
        raise SystemExit("a kernel was built at import")
    mx.fast.metal_kernel = built
import {module}
heavy = {{name.partition(".")[0] for name in sys.modules}} & {heavy}
sys.exit("imported: " + ", ".join(sorted(heavy)) if heavy else 0)
"""
HEAVY = {"tqdm", "matplotlib", "mlx_lm", "transformers", "torch", "ziglang", "sentencepiece"}


@pytest.mark.parametrize(
    "module", ["mlx_hla", "mlx_hla.nn", "mlx_hla.models", "mlx_hla.train", "mlx_hla.tune", "mlx_hla.cli"]
)
def test_importing_is_light(module):
    """No optional dependency is imported and no kernel is built until something needs it."""
    heavy = HEAVY - ({"sentencepiece"} if module not in ("mlx_hla", "mlx_hla.nn", "mlx_hla.cli") else set())
    script = IMPORT.format(module=module, heavy=heavy)
    run = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert not run.stdout


def test_the_root_publishes_the_operators():
    names = mlx_hla.__all__
    assert {"__version__", "hla2", "hla2_step", "linear_attention"} <= set(names) <= set(dir(mlx_hla))
    assert mlx_hla.hla2 is mlx_hla.ops.hla2
    star: dict = {}
    exec("from mlx_hla import *", star)
    assert set(names) <= set(star)
    assert not hasattr(mlx_hla, "hla99")
    assert not hasattr(mlx_hla, "_hidden")


@pytest.mark.parametrize("name", ["cli", "errors", "process"])
def test_modules_come_without_mlx(name):
    script = f"import sys; from mlx_hla import {name}; sys.exit('mlx.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


NO_MLX = """
import sys
class Missing:
    def find_spec(self, name, *_):
        if name == "mlx.core":
            raise ImportError("libmlx.so: cannot open shared object file: No such file or directory")
        if name == "mlx" and {whole}:
            raise ModuleNotFoundError("No module named 'mlx'", name="mlx")
sys.meta_path.insert(0, Missing())
sys.argv = ["mlx-hla", "generate", "--prompt", "x"]
"""


@pytest.mark.parametrize("whole", [False, True])
def test_without_mlx_the_command_says_what_to_install(whole):
    run = [
        sys.executable,
        "-c",
        NO_MLX.format(whole=whole) + "from mlx_hla.__main__ import main; sys.exit(main())",
    ]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("mlx-hla: error: MLX")
    assert done.stderr.count("\n") == 1
    assert "pip install" in done.stderr
    assert "mlx-hla[cpu]" in done.stderr
    library = [sys.executable, "-c", NO_MLX.format(whole=whole) + "import mlx_hla; mlx_hla.hla2"]
    done = subprocess.run(library, capture_output=True, text=True)
    assert "ImportError: MLX" in done.stderr
    assert "mlx-hla[cpu]" in done.stderr


STOPPED = """
import builtins, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores Ctrl-C
really = builtins.__import__
def stopped(name, *rest, **options):
    if name == {at!r}:
        os.kill(os.getpid(), signal.SIGINT)
    return really(name, *rest, **options)
builtins.__import__ = stopped
sys.argv = ["mlx-hla", "info"]
from mlx_hla.__main__ import main
sys.exit(main())
"""


@pytest.mark.parametrize("at", ["argparse", "mlx_hla.cli", "mlx.core", "mlx_hla.models", "sentencepiece"])
def test_ctrl_c_while_it_starts_shows_no_traceback(at):
    script = STOPPED.format(at=at)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode in (130, -2)
    assert done.stdout == ""
    assert done.stderr in ("", "mlx-hla: error: interrupted\n")


def test_the_oracle_shares_no_code_with_the_operators():
    for part in ("reference", "monoid"):
        files = [ROOT / f"{part}.py"] if (ROOT / f"{part}.py").exists() else (ROOT / part).rglob("*.py")
        for path in files:
            text = path.read_text(encoding="utf-8")
            names = {
                alias.name.partition(".")[0]
                for node in ast.walk(ast.parse(text))
                if isinstance(node, ast.Import)
                for alias in node.names
            }
            assert "mlx" not in names, f"{path.name} imports mlx"
            assert {x[1] for x in imported(path)} <= BESIDE, f"{path.name} imports other parts"


def test_files_stay_short():
    """About 300 lines, 400 at most."""
    long = {
        p.name: n for p in ROOT.rglob("*.py") if (n := len(p.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert not long
