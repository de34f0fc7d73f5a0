"""The corpus example: what it refuses, what it leaves out, and that equal wheels give equal folders."""

import json
import sys
import zipfile
from pathlib import Path

import pytest

from mlx_hla import data
from mlx_hla.errors import InputError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import corpus
import corpus_texts

sys.path.pop(0)

META = "Metadata-Version: 2.1\nName: {}\nVersion: 1.0\n{}\n"
MIT = "License-Expression: MIT"


def code(seed, lines=40):
    """Python with no five lines in a row that another seed has."""
    return "".join(
        f"def name_{seed}_{i}(value):\n    return value + other_{seed}({i})\n\n\n" for i in range(lines)
    )


def wheel(folder, name="one", files=None, licence=MIT, links=()):
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, text in (files or {f"{name}/a.py": code(name)}).items():
            archive.writestr(member, text)
        archive.writestr(f"{name}-1.0.dist-info/METADATA", META.format(name, licence))
        for member in links:
            info = zipfile.ZipInfo(member)
            info.external_attr = 0o120777 << 16
            archive.writestr(info, "/etc/passwd")
    return path


@pytest.fixture
def library(monkeypatch):
    """A small standard library: one text to train on, one that validates."""
    found = data.Corpus("the library", (code("train"),), (code("valid"),), 0, "0")
    monkeypatch.setattr(corpus, "load_corpus", lambda: found)
    return found


def build(tmp_path, *packages, out="out", most=10**6):
    packages = [corpus.Package(p, "1.0") if isinstance(p, str) else p for p in packages]
    return corpus.build(packages, tmp_path / out, tmp_path / "wheels", most)


def texts(folder):
    lines = [line for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]
    return {row["path"]: row["text"] for row in map(json.loads, lines)}


def test_a_folder_that_extra_reads(library, tmp_path):
    wheel(tmp_path / "wheels", "one")
    wheel(tmp_path / "wheels", "two", {"two/a.py": code("two").replace("\n", "\r\n"), "two/data.txt": "no"})
    sources = build(tmp_path, "one", "two")
    assert texts(tmp_path / "out") == {"one/a.py": code("one"), "two/a.py": code("two")}
    assert sources == json.loads((tmp_path / "out" / "SOURCES.json").read_text())
    assert (sources["files"], sources["bytes"]) == (2, len(code("one") + code("two")))
    row = sources["packages"][0]
    assert (row["name"], row["version"], row["licence"], row["files"]) == ("one", "1.0", "MIT", 1)
    (tmp_path / "own.txt").write_text("a line\n" * 100)
    more = data.load_corpus(tmp_path / "own.txt", 0.1, extra=tmp_path / "out")
    assert set(more.train[1:]) == {code("one"), code("two")}
    with pytest.raises(InputError, match="holds files already"):
        build(tmp_path, "one")


def test_equal_wheels_give_equal_folders(library, tmp_path):
    wheel(tmp_path / "wheels", "one", {f"one/{i}.py": code(i) for i in range(9)})
    most = 4 * len(code(0))
    for out in ("a", "b"):
        sources = build(tmp_path, "one", out=out, most=most)
    assert sources["left_out"] == {"beyond the share of a package": 5}
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


@pytest.mark.parametrize(
    ("licence", "found"),
    [
        (MIT, "MIT"),
        ("License-Expression: Apache-2.0 AND (MIT OR BSD-3-Clause)", "Apache-2.0 AND BSD AND MIT"),
        ("License: whatever\nClassifier: License :: OSI Approved :: BSD License", "BSD"),
        ("License: Apache 2.0", "Apache-2.0"),
        ("License-Expression: GPL-3.0-only", None),
        ("License-Expression: MIT OR LGPL-2.1", None),
        ("License-Expression: MPL-2.0\nClassifier: License :: OSI Approved :: MIT License", None),
        (
            "Classifier: License :: OSI Approved :: MIT License\nClassifier: License :: OSI Approved :: GPL",
            None,
        ),
        ("License: é", None),
        ("Summary: none", None),
    ],
    ids=range(10),
)
def test_licences(library, tmp_path, licence, found):
    wheel(tmp_path / "wheels", licence=licence)
    if found is None:
        with pytest.raises(InputError, match=r"its licence is .*: not one of those allowed"):
            build(tmp_path, "one")
        assert not texts(tmp_path / "out")
        return
    assert build(tmp_path, "one")["packages"][0]["licence"] == found
    with pytest.raises(InputError, match=f"its metadata says {found}, the table ISC"):
        build(tmp_path, corpus.Package("one", "1.0", "ISC"), out="other")


def test_another_sha256_is_refused(library, tmp_path):
    path = wheel(tmp_path / "wheels")
    good = corpus.Package("one", "1.0", "MIT", corpus.digest(path))
    assert build(tmp_path, good)["packages"][0]["sha256"] == good.sha256
    with path.open("ab") as file:
        file.write(b"x")
    with pytest.raises(InputError, match=r"one-1\.0.*: sha256 is .*, not .* as in the table"):
        build(tmp_path, good, out="other")


@pytest.mark.parametrize("path", ["../a.py", "/etc/a.py", "one/../../a.py", "one\\..\\a.py", "C:/a.py"])
def test_paths_out_of_the_archive_are_refused(library, tmp_path, path):
    wheel(tmp_path / "wheels", files={path: code("a")})
    with pytest.raises(InputError, match=r"holds the path .*: refused"):
        build(tmp_path, "one")


def test_links_bombs_and_broken_archives_are_refused(library, tmp_path, monkeypatch):
    wheel(tmp_path / "wheels", "one", links=("one/b.py",))
    with pytest.raises(InputError, match=r"holds a link, 'one/b\.py': refused"):
        build(tmp_path, "one")
    broken = wheel(tmp_path / "wheels", "two")
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(InputError, match="no wheel that can be read"):
        build(tmp_path, "two", out="b")
    wheel(tmp_path / "wheels", "three")
    monkeypatch.setattr(corpus, "MAX_READ", 1000)
    with pytest.raises(InputError, match="more than 1000 bytes of Python"):
        build(tmp_path, "three", out="c")


def test_near_duplicates(library, tmp_path):
    one, lines = code("one"), code("valid").splitlines(keepends=True)
    files = {
        "one/a.py": one,
        "one/again.py": "# A comment\n\n" + one.replace("\n\n\n", "\n"),
        "one/longer.py": one + code("more", 20),
        "one/other.py": one[: len(one) // 4] + code("other"),
        "one/library.py": code("train"),
        "one/copy.py": code("valid").replace("    ", "\t"),
        "one/part.py": "".join(lines[40:100]) + code("far", 200),  # a small part of it, a large one of valid
    }
    wheel(tmp_path / "wheels", files=files)
    sources = build(tmp_path, "one")
    row = sources["packages"][0]
    assert row["resembles_validation"] == ["one/copy.py", "one/part.py"]
    assert sources["left_out"] == {"near-duplicates": 3, "resembles validation": 2}
    kept = set(texts(tmp_path / "out"))
    assert "one/other.py" in kept
    assert len(kept & {"one/a.py", "one/again.py", "one/longer.py"}) == 1


@pytest.mark.parametrize(
    ("path", "text", "reason"),
    [
        ("one/a.py", code("a"), None),
        ("one/tests/a.py", code("a"), "tests"),
        ("one/test_a.py", code("a"), "tests"),
        ("one/_vendor/a.py", code("a"), "copies and migrations"),
        ("one/a.py", "x = 1\n", "too small or too large"),
        ("one/a.py", code("a", 9000), "too small or too large"),
        ("one/a.py", code("é").encode("latin-1"), "no UTF-8"),
        ("one/a_pb2.py", code("a"), "generated"),
        ("one/a.py", "# This file is auto-generated\n" + code("a"), "generated"),
        ("one/a.py", "# under the GNU General Public Licence\n" + code("a"), "names another licence"),
        ("one/a.py", f"x = '{'y' * 600}'\n" + code("a"), "long lines"),
        ("one/a.py", "TABLE = [\n" + "    0x1f, 0x2e, 12.5, -3e5,\n" * 40 + "]\n", "tables"),
        ("one/a.py", "WORDS = {\n" + "    'one': 'two',\n" * 40 + "}\n", "tables"),
        ("one/a.py", "x = '" + "ab\0" * 90 + "'\n", "long lines"),
    ],
    ids=range(14),
)
def test_files_that_are_left_out(path, text, reason):
    text = text if isinstance(text, bytes) else text.encode()
    assert corpus_texts.reason_against(path, text) == reason


def test_rows_of_a_hostile_file_are_read_in_time():
    line = "'a', " * 90 + "0xabcdef " * 5 + "!"
    assert corpus_texts.reason_against("one/a.py", (line + "\n").encode() * 300) is not None


def test_downloads(library, tmp_path, monkeypatch):
    made = wheel(tmp_path / "index", "Some_Name")
    calls = []

    def pip(command, **options):
        calls.append(command)
        target = Path(command[command.index("--dest") + 1]) / made.name
        if command[-1] == "some-name==1.0":
            target.write_bytes(made.read_bytes())
        return type("Done", (), {"returncode": command[-1] == "bad==1.0", "stderr": "ERROR: no such thing"})

    monkeypatch.setattr(corpus.subprocess, "run", pip)
    assert build(tmp_path, "some-name")["files"] == 1
    assert "--only-binary=:all:" in calls[0]
    assert "--no-deps" in calls[0]
    build(tmp_path, "some-name", out="again")
    assert len(calls) == 1
    with pytest.raises(InputError, match=r"bad==1\.0: pip cannot download it \(ERROR: no such thing\)"):
        build(tmp_path, "bad", out="b")
    with pytest.raises(InputError, match="pip brought no wheel of that version"):
        build(tmp_path, "absent", out="c")
    assert [p.name for p in (tmp_path / "wheels").iterdir()] == [made.name]


def test_the_command(library, tmp_path, capsys):
    wheel(tmp_path / "wheels")
    flags = ["--out", str(tmp_path / "out"), "--wheels", str(tmp_path / "wheels")]
    assert corpus.main([*flags, "--packages", "one==1.0"]) == 0
    assert "1 files, 0.00 MB of 1 packages" in capsys.readouterr().out
    for bad, match in (
        (["--packages", "one>=1"], "must be NAME==VERSION"),
        (["--most", "0"], "most must be"),
    ):
        assert corpus.main([*flags, *bad]) == 1
        assert match in capsys.readouterr().err


def test_the_table_names_allowed_licences_and_pins():
    packages = corpus.read_table(corpus.TABLE)
    assert [p.name for p in packages] == sorted({corpus.canonical(p.name) for p in packages})
    assert all(p.licence in corpus.FAMILIES and len(p.sha256) == 64 for p in packages)


@pytest.mark.parametrize("table", ["[]", "{}", '[{"name": "x"}]', '[{"name": "x", "versio": "1"}]', "[3]"])
def test_bad_tables(tmp_path, table):
    (tmp_path / "t.json").write_text(table)
    with pytest.raises(InputError, match="must list objects with name, version"):
        corpus.read_table(tmp_path / "t.json")
