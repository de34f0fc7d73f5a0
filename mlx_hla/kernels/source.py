"""Finds metal/, splits its files into a shared header and kernel bodies, and builds kernels when used.

A file of `metal/` is a header (helpers, contracts) and kernels, each of them

    //# kernel NAME
    //# inputs: a b c
    //# outputs: d e
    //# normalising: m
    // its contract
    //# body
    the statements that `mx.fast.metal_kernel` puts into the function it writes

What all of a file's bodies begin with stands once, in its header:

    //# before each body
    statements
    //# end

Those of tiles.metal come first in every kernel: they say in a GPU's own words which thread this is.

A kernel that has a `normalising` line comes in a second variant, compiled with HLA_NORMALISING: its inputs
end in those of that line, and its outputs in the same names with `_new`.

The contract stays out of the body: MLX looks for attribute names and `<input>_shape` in a body's text, and
expands no macros first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import mlx.core as mx

HELPERS = "tiles"


def folder() -> Path:
    """metal/ beside this package in a wheel, or at the root of a checkout."""
    package = Path(__file__).resolve().parent.parent
    for place in (package / "metal", package.parent / "metal"):
        if (place / f"{HELPERS}.metal").is_file():
            return place
    raise FileNotFoundError(f"the kernel sources are missing: no {HELPERS}.metal in {package / 'metal'}")


@dataclass(frozen=True)
class Source:
    """One kernel as its file has it."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    header: str
    body: str
    normalising: tuple[str, ...] = ()

    def normalised(self) -> Source:
        """The variant that normalises."""
        return Source(
            f"{self.name}_normalised",
            (*self.inputs, *self.normalising),
            (*self.outputs, *(f"{n}_new" for n in self.normalising)),
            f"#define HLA_NORMALISING\n{self.header}",
            self.body,
        )


_KERNEL = re.compile(
    r"^//# kernel (?P<name>\w+)\n//# inputs: (?P<inputs>[\w ]+)\n//# outputs: (?P<outputs>[\w ]+)\n"
    r"(?://# normalising: (?P<normalising>[\w ]+)\n)?(?P<contract>(?://.*\n)*?)//# body\n",
    re.M,
)
_USES = re.compile(r"^//# uses: ([\w ]+)\n", re.M)
_BEFORE = re.compile(r"^//# before each body\n(.*?)^//# end\n", re.M | re.S)


@cache
def _parts(file: str) -> tuple[str, str, str]:
    """A file's own header, the statements that its bodies begin with, and its kernels."""
    text = (folder() / f"{file}.metal").read_text(encoding="ascii")
    first = _KERNEL.search(text)
    end = first.start() if first else len(text)
    return _BEFORE.sub("", text[:end]), "".join(_BEFORE.findall(text[:end])), text[end:]


@cache
def _header(file: str) -> str:
    """A file's header after those that its `//# uses:` line names."""
    own = _parts(file)[0]
    uses = _USES.search(own)
    before = "" if file == HELPERS else _header(HELPERS)
    for name in uses.group(1).split() if uses else ():
        before += _header(name).removeprefix(_header(HELPERS))
    return before + own


@cache
def sources(file: str) -> dict[str, Source]:
    """The kernels of metal/<file>.metal by name."""
    _, before, text = _parts(file)
    found = list(_KERNEL.finditer(text))
    ends = [m.start() for m in found[1:]] + [len(text)]
    return {
        m["name"]: Source(
            m["name"],
            tuple(m["inputs"].split()),
            tuple(m["outputs"].split()),
            _header(file),
            _parts(HELPERS)[1] + before + text[m.end() : end],
            tuple((m["normalising"] or "").split()),
        )
        for m, end in zip(found, ends, strict=True)
    }


_built: dict[tuple[str, str, bool], tuple[object, object]] = {}


def kernel(file: str, name: str, normalising: bool = False):
    """The kernel `name` of metal/<file>.metal, built by `mx.fast.metal_kernel` at its first use.

    The function is looked up at every call, and what another one built is not used: replacing
    `mx.fast.metal_kernel` replaces the machine that all kernels run on.
    """
    make = mx.fast.metal_kernel
    entry = _built.get((file, name, normalising))
    if entry is None or entry[0] is not make:
        source = sources(file)[name]
        if normalising:
            source = source.normalised()
        built = make(
            name=f"hla_{source.name}",
            input_names=list(source.inputs),
            output_names=list(source.outputs),
            source=source.body,
            header=source.header,
            ensure_row_contiguous=False,
        )
        entry = _built[file, name, normalising] = (make, built)
    return entry[1]
