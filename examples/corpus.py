"""Fetch the Python sources of permissively licensed packages, and write them as text to train on.

    python examples/corpus.py --out runs/corpus            the packages of corpus.json beside this file
    python examples/corpus.py --out runs/try --packages click==8.1.7 attrs==24.2.0
    python examples/train.py --preset small --out runs/more --extra runs/corpus

pip downloads one wheel a package, at a pinned version, without what it depends on; nothing of it is
installed, imported or run. Its sha256 must be the table's, and its own metadata must name the table's
licence, one of MIT, BSD, Apache-2.0, PSF and ISC. Of its .py files are left out tests, copies of other
packages, generated files and tables, what is no UTF-8 or larger than 200 kB, what names another licence.

Then near-duplicates (corpus_texts.py says how they are found): above all what resembles the validation part
of the standard library, which is that of the Python that runs this; then what resembles the rest of the
library or another file. Of a package larger than --most, the files are a sample by the hash of their paths.
Equal tables, options and Pythons give equal folders.

OUT gets one NAME.jsonl a package, a line {"path", "text"} a file, and SOURCES.json (not read to train):
versions, licences, sizes, what was left out. Python 3.11 made 116.71 MB of the 38 packages, in 20 seconds on
one x86-64 core after downloads of 217 MB; 3 files resembled validation, 130 were other near-duplicates.
"""

from __future__ import annotations

import argparse
import email
import hashlib
import json
import re
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from email.message import Message
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from corpus_texts import MAX_FILE, Near, reason_against

from mlx_hla.data import load_corpus
from mlx_hla.errors import InputError
from mlx_hla.files import as_path, open_regular, write_atomic
from mlx_hla.progress import progress
from mlx_hla.settings import read_json

TABLE = Path(__file__).with_suffix(".json")
PYTHON = "3.13"  # whose wheels are chosen where a package has one for each: the same on every machine
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux2014_x86_64", "any")

MAX_WHEEL, MAX_MEMBERS, MAX_READ = 2**28, 200_000, 2**30
FAMILIES = {  # SPDX identifiers, and what packages write in their place
    **dict.fromkeys(("MIT", "MIT License"), "MIT"),
    **dict.fromkeys(("BSD", "0BSD", "BSD-2-Clause", "BSD-3-Clause", "BSD License"), "BSD"),
    **dict.fromkeys(("Apache-2.0", "Apache 2.0", "Apache 2.0 License"), "Apache-2.0"),
    **dict.fromkeys(("Apache License 2.0", "Apache Software License"), "Apache-2.0"),
    **dict.fromkeys(("PSF-2.0", "Python-2.0", "Python Software Foundation License"), "PSF"),
    **dict.fromkeys(("ISC", "ISC License (ISCL)"), "ISC"),
}


class Package(NamedTuple):
    name: str
    version: str
    licence: str | None = None  # None, as of --packages: any that is allowed
    sha256: str | None = None


def read_table(path: Path) -> list[Package]:
    rows = read_json(path)
    try:
        packages = [Package(**row) for row in rows]  # type: ignore[union-attr, attr-defined]
        if not packages or not all(isinstance(x, str) for p in packages for x in p):
            raise TypeError
    except TypeError:
        raise InputError(f"{path}: must list objects with name, version, licence and sha256") from None
    return packages


def parse_package(text: str) -> Package:
    name, _, version = text.partition("==")
    if not re.fullmatch(r"[\w.-]+==[\w.+!]+", text) or text.startswith("-"):
        raise InputError(f"a package must be NAME==VERSION, got {text[:60]!r}")
    return Package(name, version)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def digest(path: Path) -> str:
    with open_regular(path, MAX_WHEEL) as file:
        return hashlib.sha256(file.read()).hexdigest()


# --- fetch


def download(package: Package, folder: Path) -> None:
    """Let pip put the wheel into `folder`. Only wheels: pip would run the build of a source archive."""
    flags = [f"--platform={p}" for p in PLATFORMS] + [f"--python-version={PYTHON}", "--implementation=cp"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += [*flags, "--dest", str(folder), f"{package.name}=={package.version}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise InputError(f"{package.name}=={package.version}: pip cannot download it ({said[0][:200]})")


def find_wheel(package: Package, wheels: Path) -> Path | None:
    wanted = canonical(package.name), package.version
    for file in sorted(wheels.glob("*.whl")):
        name, version, *_ = [*file.name.split("-"), ""]
        if (canonical(name), version) == wanted:
            return file
    return None


def fetch(package: Package, wheels: Path) -> Path:
    """The package's wheel in `wheels`, downloaded if it is not there, with the sha256 of the table."""
    file = find_wheel(package, wheels)
    if file is None:
        wheels.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=wheels) as folder:
            download(package, Path(folder))
            got = find_wheel(package, Path(folder))
            if got is None:
                raise InputError(f"{package.name}=={package.version}: pip brought no wheel of that version")
            file = got.rename(wheels / got.name)
    if package.sha256 is not None and (found := digest(file)) != package.sha256:
        raise InputError(f"{file}: sha256 is {found}, not {package.sha256} as in the table")
    return file


# --- read


def members(wheel: Path) -> Iterator[tuple[str, bytes]]:
    """The .py files and the METADATA of a wheel, by the hash of their paths, to which nothing is written."""
    try:
        with open_regular(wheel, MAX_WHEEL) as file, zipfile.ZipFile(file) as archive:
            infos, left = archive.infolist(), MAX_READ
            if len(infos) > MAX_MEMBERS:
                raise InputError(f"{wheel}: more than {MAX_MEMBERS} members")
            for info in sorted(infos, key=lambda i: hashlib.sha256(i.filename.encode()).digest()):
                path, mode = PurePosixPath(info.filename), info.external_attr >> 16
                if path.is_absolute() or ".." in path.parts or re.search(r"[\\:\0]", info.filename):
                    raise InputError(f"{wheel}: holds the path {info.filename[:80]!r}: refused")
                if stat.S_ISLNK(mode):
                    raise InputError(f"{wheel}: holds a link, {info.filename[:80]!r}: refused")
                about = path.match("*.dist-info/METADATA") and len(path.parts) == 2
                if about or path.suffix == ".py":
                    with archive.open(info) as opened:  # info.file_size is only what the archive says
                        data = opened.read((4 if about else 1) * MAX_FILE + 1)
                    if (left := left - len(data)) < 0:
                        raise InputError(f"{wheel}: more than {MAX_READ} bytes of Python")
                    yield info.filename, data
    except (zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError) as e:
        raise InputError(f"{wheel}: no wheel that can be read ({e})") from e


def licence(metadata: Message, name: str) -> str:
    """The family of the licence that a package's metadata names, or an error unless all are allowed."""
    if expression := metadata["License-Expression"]:
        found = re.split(r"\s+(?:AND|OR)\s+|[()]", expression)
    else:
        classified = [c.split(" :: ") for c in metadata.get_all("Classifier", [])]
        found = [c[-1] for c in classified if c[0] == "License" and len(c) > 2]
        found = found or [str(metadata["License"] or "none")]
    families = {FAMILIES.get(part.strip(), "") for part in found if part.strip()}
    if "" in families or not families:
        raise InputError(f"{name}: its licence is {', '.join(found)[:100]!r}: not one of those allowed")
    return " AND ".join(sorted(families))


def check_licence(package: Package, wheel: Path, metadata: bytes) -> str:
    found = licence(email.message_from_bytes(metadata), wheel.name)
    told = package.licence
    if told is not None and FAMILIES.get(told) not in found.split(" AND "):
        raise InputError(f"{wheel.name}: its metadata says {found}, the table {told}")
    return told or found


# --- write


def read_package(package: Package, wheel: Path, near: Near, most: int) -> tuple[list[dict], dict]:
    """The texts of a package, by path, at most `most` bytes; and its row of SOURCES.json."""
    texts, against, resembling, metadata, size = [], Counter[str](), [], None, 0
    for path, data in members(wheel):
        if not path.endswith(".py"):
            metadata = data
            continue
        reason = reason_against(path, data)
        if reason is None and size + len(data) > most:
            reason = "beyond the share of a package"
        reason = reason or near.reason_against(text := data.decode().replace("\r\n", "\n"))
        if reason:
            against[reason] += 1
            resembling += [path] if reason == "resembles validation" else []
            continue
        size += len(text.encode())
        texts.append({"path": path, "text": text})
    if metadata is None:
        raise InputError(f"{wheel}: holds no METADATA")
    row = {
        "name": package.name,
        "version": package.version,
        "licence": check_licence(package, wheel, metadata),
        "sha256": package.sha256 or digest(wheel),
        "files": len(texts),
        "bytes": size,
        "left_out": dict(sorted(against.items())),
        "resembles_validation": sorted(resembling),
    }
    return sorted(texts, key=lambda t: t["path"]), row


def build(packages: list[Package], out: Path, wheels: Path, most: int) -> dict:
    """Write the corpus of `packages` into the new folder `out`; its SOURCES.json."""
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out}: holds files already; choose another --out")
    library = load_corpus()
    near = Near(library.train, library.valid)
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    with progress(len(packages), "package") as one_more:
        for package in packages:
            texts, row = read_package(package, fetch(package, wheels), near, most)
            lines = "".join(json.dumps(t, ensure_ascii=False) + "\n" for t in texts)
            if texts:
                write(out / f"{canonical(package.name)}.jsonl", lines)
            rows.append(row)
            print(f"{package.name} {package.version}: {row['files']} files, {row['bytes'] / 1e6:.2f} MB")
            one_more()
    against = sum((Counter(r["left_out"]) for r in rows), Counter())
    sources = {
        "python": sys.version.split()[0],
        "files": sum(r["files"] for r in rows),
        "bytes": sum(r["bytes"] for r in rows),
        "left_out": dict(sorted(against.items())),
        "packages": rows,
    }
    write(out / "SOURCES.json", json.dumps(sources, indent=1) + "\n")
    return sources


def write(path: Path, text: str) -> None:
    write_atomic(path, lambda file: file.write(text.encode()))


def main(argv: list[str] | None = None) -> int:
    about, _, more = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", default="runs/corpus", help="folder to write, new or empty (default: runs/corpus)")
    add("--wheels", default="runs/wheels", help="folder that keeps the wheels (default: runs/wheels)")
    add(
        "--packages", nargs="+", metavar="NAME==VERSION", help="these instead of the table's, as pip has them"
    )
    add("--most", type=float, default=5.0, help="megabytes of one package at most (default: 5)")
    args = parser.parse_args(argv)
    try:
        if not 0 < args.most < 1e4:
            raise InputError(f"most must be above 0, got {args.most}")
        packages = [parse_package(p) for p in args.packages] if args.packages else read_table(TABLE)
        out, wheels = as_path("out", args.out), as_path("wheels", args.wheels)
        sources = build(packages, out, wheels, int(args.most * 1e6))
    except (InputError, OSError) as e:
        sys.stderr.write(f"corpus.py: error: {e}\n")
        return 1
    for reason, count in sources["left_out"].items():
        print(f"  {count:,} files left out: {reason}")
    print(f"{out}: {sources['files']:,} files, {sources['bytes'] / 1e6:.2f} MB of {len(packages)} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
