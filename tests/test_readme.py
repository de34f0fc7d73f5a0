"""The README keeps its word: its code runs, its commands parse, its links lead somewhere."""

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
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "metal/README.md",
    "mlx_hla/reference/README.md",
    "mlx_hla/pretrained/README.md",
    "examples/study/README.md",
    "tests/standin/README.md",
)


RUNNABLE = ("README.md", "mlx_hla/reference/README.md")  # pages whose code is complete


def blocks(language: str, page: str = "README.md") -> list[tuple[str, int, str]]:
    """(page, line, text) of each fenced block in `language`."""
    whole = (ROOT / page).read_text(encoding="utf-8")
    fences = re.finditer(r"^```(\w*)\n(.*?)^```$", whole, re.MULTILINE | re.DOTALL)
    return [(page, whole.count("\n", 0, m.start(2)), m.group(2)) for m in fences if m.group(1) == language]


def commands() -> list[list[str]]:
    """Every `mlx-hla` call in the shell blocks, as words."""
    calls = []
    for *_, text in blocks("bash"):
        for line in text.splitlines():
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                if words[:1] == ["mlx-hla"]:
                    calls.append(words[1:])
    return calls


@pytest.mark.parametrize(
    ("page", "line", "text"),
    [block for page in RUNNABLE for block in blocks("python", page)],
    ids=lambda x: None if "\n" in str(x) else str(x),
)
def test_a_python_block_runs_on_its_own(page, line, text):
    mx.random.seed(0)
    names = {"__name__": "readme"}
    exec(compile("\n" * line + text, str(ROOT / page), "exec"), names)
    mx.eval([value for value in names.values() if isinstance(value, mx.array)])


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_parse(words):
    args = cli.make_parser(words[0]).parse_args(words)
    assert args.command == words[0]


def links(page: Path) -> list[str]:
    found = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    return [link for link in found if not link.startswith("https://")]


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page):
    here = ROOT / page
    for link in links(here):
        path, _, anchor = link.partition("#")
        target = here.parent / path if path else here
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_is_short():
    assert len(TEXT.splitlines()) <= 250


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
