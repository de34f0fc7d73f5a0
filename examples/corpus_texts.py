"""Which files of a package are text to train on: what `corpus.py` leaves out, and why.

Every text is the set of its shingles, five lines of tokens that follow each other, without comments and blank
lines. A file is left out that shares a fifth of its shingles with the texts that validate, or a fifth of one
such text's, or ten with one; and of what is left, each that shares half of its own with what is trained on.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import PurePosixPath

MAX_FILE, MIN_FILE = 200_000, 200
TESTS = re.compile(r"(tests?|testing|idle_test|.*_tests?)|(test_.*|.*_tests?|tests?|conftest)\.py")
COPIES = re.compile(
    r"_?(vendor(ed|ized)?|extern(als?|ally)?|third_?party|bundled)(_packages)?|migrations|.*\.data"
)
GENERATED = re.compile(r"(?i)auto-?(matically )?generated|generated (by|from) |do not (edit|modify)")
OTHER_LICENCE = re.compile(r"(?i)\b[AL]?GPL|GNU (Lesser|Affero|General)|Mozilla Public|proprietary")
TOKEN = re.compile(r"\w+|[^\w\s]")
_ITEM = r"(?:[\"'][^\"']*[\"']|[-+\d.eExXabcdf_]+)"
ROW = re.compile(rf"\s*[\[({{]*{_ITEM}(?:\s*[:,]\s*{_ITEM})*\s*[,)\]}}]*\s*")  # nothing but literals

SHINGLE = 5
NEAR_VALID, MOST_VALID, NEAR = 0.2, 10, 0.5


def reason_against(path: str, data: bytes) -> str | None:
    """Why a file is not taken, or None."""
    parts = PurePosixPath(path).parts
    if any(TESTS.fullmatch(p) for p in parts):
        return "tests"
    if any(COPIES.fullmatch(p) for p in parts):
        return "copies and migrations"
    if not MIN_FILE <= len(data) <= MAX_FILE:
        return "too small or too large"
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return "no UTF-8"
    lines = [line for line in text.splitlines() if line.strip()]
    head = text[:3000]
    if parts[-1].endswith(("_pb2.py", "_pb2_grpc.py")) or GENERATED.search(text[:600]):
        return "generated"
    if OTHER_LICENCE.search(head):
        return "names another licence"
    dense = "".join(text.split())
    if not dense or "\0" in text or max(map(len, lines)) > 500 or len(dense) > 80 * len(lines):
        return "long lines"
    rows = sum(ROW.fullmatch(line[:500]) is not None for line in lines)
    if rows > len(lines) / 2 or sum(c.isdigit() for c in dense) > len(dense) / 5:
        return "tables"
    return None


# --- near-duplicates


def shingles(text: str) -> set[int]:
    lines = [" ".join(TOKEN.findall(line)) for line in text.splitlines() if not line.lstrip().startswith("#")]
    lines = [line for line in lines if line]
    count = max(1, len(lines) - SHINGLE + 1)
    parts = ("\n".join(lines[i : i + SHINGLE]).encode() for i in range(count))
    return {int.from_bytes(hashlib.blake2b(p, digest_size=8).digest(), "big") for p in parts}


class Near:
    """What has been seen: `valid` texts, that nothing taken may resemble, and those to train on."""

    def __init__(self, train: Iterable[str], valid: Iterable[str]):
        self.seen: set[int] = set()
        self.places: dict[int, list[int]] = {}
        self.sizes: list[int] = []
        for text in valid:
            found = shingles(text)
            for one in found:
                self.places.setdefault(one, []).append(len(self.sizes))
            self.sizes.append(len(found))
        for text in train:
            self.seen |= shingles(text)

    def reason_against(self, text: str) -> str | None:
        """Why a text is not taken; one that is taken counts as seen."""
        found = shingles(text)
        held = [self.places[one] for one in found if one in self.places]
        each = Counter(i for files in held for i in files)
        if len(held) >= NEAR_VALID * len(found) or any(
            n >= MOST_VALID or n >= NEAR_VALID * self.sizes[i] for i, n in each.items()
        ):
            return "resembles validation"
        if len(found & self.seen) >= NEAR * len(found):
            return "near-duplicates"
        self.seen |= found
        return None
