"""The text of metal/*.metal: what is Metal's own stands in one place, and nothing stands twice."""

import re

import pytest
from standin.source import ATTRIBUTES, without_comments

from mlx_hla.kernels import source

FILES = sorted(source.folder().glob("*.metal"))
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
FIRST = "What a GPU has of its own"

# Attributes of a launch that the stand-in does not serve.
OTHERS = ["dispatch_quadgroups_per_threadgroup", "grid_origin", "quadgroup_index_in_threadgroup"]
OTHERS += ["quadgroups_per_threadgroup"]
OWN_WORDS = [
    r"\b(?:device|constant|threadgroup|thread|threadgroup_imageblock|ray_data|object_data)\b",
    rf"\b(?:{'|'.join([*ATTRIBUTES, *OTHERS])})\b",
    r"\b(?:simd|quad|simdgroup|threadgroup|thread)_\w+|\bmake_filled_\w+",
    r"\bmem_\w+",
    r"\bMETAL_\w+|\bmetal\b|\bmetal_\w+",
    r"\bkernel\b|\[\[|\bas_type\b|\buint[234]?\b|\bfloat[234]\b|\bint[234]\b",
]


def sections(text):
    """A file's text by the headings in it, the first under ""."""
    names = ["", *re.findall(r"^// ---- (.*?) -*$", text, re.M)]
    return dict(zip(names, re.split(r"^// ---- .*$", text, flags=re.M), strict=True))


@each_file
def test_ascii(path):
    """MLX hands sources over as ASCII."""
    assert path.read_bytes().isascii()


@each_file
def test_only_the_first_section_speaks_metal(path):
    """No address space, attribute, simd function or barrier elsewhere: another GPU replaces that section."""
    parts = sections(path.read_text(encoding="ascii"))
    if path.stem == source.HELPERS:
        assert list(parts)[1] == FIRST
        own = parts.pop(FIRST)
        stale = [word for word in OWN_WORDS[:5] if not re.search(word, without_comments(own))]
        assert not stale, f"{stale} fit nothing any more"
    text = without_comments("\n".join(parts.values()))
    found = [m[0] for word in OWN_WORDS for m in re.finditer(word, text)]
    assert not found, f"{path.name} says {sorted(set(found))} outside of the first section of tiles.metal"
    assert "#include" not in text


def test_every_body_begins_with_the_launch():
    """MLX finds attributes in a body's text only, so that text must hold them."""
    for file in {path.stem for path in FILES} - {source.HELPERS}:
        for name, kernel in source.sources(file).items():
            assert kernel.body.lstrip().startswith("const Launch launch = {"), name
            assert kernel.body.count("thread_index_in_threadgroup") == 1, name
            assert "//#" not in kernel.body, name
            assert "each body" not in kernel.header, name


LONGEST = 8  # equal lines that may follow one another in two places


def test_nothing_stands_twice():
    """No stretch of code copies another: what two kernels share is a function, or begins all bodies."""
    lines = []  # (file and line, code)
    for path in FILES:
        text = without_comments(path.read_text(encoding="ascii"))
        lines += [
            (f"{path.name}:{n}", " ".join(x.split())) for n, x in enumerate(text.split("\n"), 1) if x.strip()
        ]
    seen = {}
    for start in range(len(lines) - LONGEST):
        stretch = lines[start : start + LONGEST + 1]
        place, text = stretch[0][0], tuple(x for _, x in stretch)
        assert text not in seen, f"{place} and {seen[text]} begin {LONGEST + 1} equal lines"
        seen[text] = place
