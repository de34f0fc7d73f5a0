"""The README keeps its word: its code runs, its commands parse, its layout and links are the tree's."""

import re
import runpy
import shlex
from pathlib import Path

import mlx.core as mx
import pytest

import mlx_hla
from mlx_hla import cli

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")


def blocks(language: str) -> list[tuple[int, str]]:
    """(line of the README, text) of each fenced block in `language`."""
    fences = re.finditer(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    return [(TEXT.count("\n", 0, m.start(2)), m.group(2)) for m in fences if m.group(1) == language]


def commands() -> list[list[str]]:
    """Every `mlx-hla` call in the shell blocks, as words."""
    calls = []
    for _, text in blocks("bash"):
        for line in text.splitlines():
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                if words[:1] == ["mlx-hla"]:
                    calls.append(words[1:])
    return calls


def test_python_blocks_run_in_order():
    mx.random.seed(0)
    names = {"__name__": "readme"}
    found = blocks("python")
    assert len(found) >= 5
    for line, text in found:
        exec(compile("\n" * line + text, str(README), "exec"), names)
        mx.eval([value for value in names.values() if isinstance(value, mx.array)])


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_parse(words):
    args = cli.make_parser(words[0]).parse_args(words)
    assert args.command == words[0]


def test_relative_links_exist():
    targets = re.findall(r"\]\(([^)\s]+)\)", TEXT)
    local = [t for t in targets if not t.startswith(("https://", "#"))]
    assert local
    assert [t for t in local if not (ROOT / t).exists()] == []


def anchors() -> set[str]:
    titles = re.findall(r"^#+ (.+)$", TEXT, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}


def test_links_within_the_page_exist():
    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) <= anchors()


def layout() -> list[str]:
    """The paths of the layout section, folders with a slash at the end."""
    text = next(text for _, text in blocks("") if text.startswith("mlx_hla/"))
    paths, folders = [], []
    for line in text.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders[depth:] = [name] if name.endswith("/") else []
        paths.append("".join(folders) if name.endswith("/") else "".join(folders[:depth]) + name)
    return paths


def test_layout_lists_what_is_there():
    missing = [path for path in layout() if not any(ROOT.glob(path.rstrip("/")))]
    assert missing == []


def test_layout_lists_every_file():
    listed = {found for path in layout() for found in ROOT.glob(path) if found.is_file()}
    whole = {
        ROOT / path.rstrip("/") for path in ("tests/standin/", "mlx_hla/pretrained/", "examples/assets/")
    }
    there = {
        file
        for folder in ("mlx_hla", "metal", "examples", "tests")
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and file.suffix in (".py", ".metal", ".typed") and not whole & set(file.parents)
    }
    assert sorted(str(f.relative_to(ROOT)) for f in there - listed) == []


def test_oldest_versions_are_those_of_the_package():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    python = re.search(r'requires-python = ">=([\d.]+)"', project).group(1)
    mlx = re.search(r'"mlx>=([\d.]+)"', project).group(1)
    assert f"Python {python} or later and MLX {mlx} or later" in TEXT


def test_the_picture_is_drawn_from_the_operators(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    out = tmp_path / "hla.png"
    monkeypatch.setattr("sys.argv", ["picture.py", "--out", str(out)])
    picture = runpy.run_path(str(ROOT / "examples" / "picture.py"))
    picture["main"]()
    assert out.read_bytes().startswith(b"\x89PNG")
    width, tokens = picture["HEAD"], 1000
    assert picture["kv_bytes"](tokens) == 2 * 2 * tokens * width
    assert picture["state_bytes"](mlx_hla.hla2, tokens) == 2 * 4 * width**2
