"""Finds metal/, splits its files into a shared header and kernel bodies, and builds kernels when used.

The bodies are one text for every GPU. What a GPU has of its own are sections of tiles.metal and of
products.metal: where there is a file of the same name with its suffix, `GPU.suffix`, each of that one's
sections takes the place of the one with the same heading.

A file of `metal/` is a header (helpers, contracts) and kernels, each of them

    //# kernel NAME
    //# inputs: a b c
    //# outputs: d e
    //# normalising: m
    // its contract
    //# body
    the statements that MLX puts into the function it writes

What all of a file's bodies begin with stands once, in its header:

    //# before each body
    statements
    //# end

Those of the helpers come first in every kernel: they say in a GPU's own words which thread this is.

A kernel that has a `normalising` line comes in a second variant, compiled with HLA_NORMALISING: its inputs
end in those of that line, and its outputs in the same names with `_new`.

The contract stays out of the body: MLX looks for attribute names and `<input>_shape` in a body's text, and
expands no macros first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from . import gpu, plan
from .gpu import GPU, METAL

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

    def rounded(self) -> Source:
        """The variant for calls in bfloat16, whose products may round their operands, less than it does."""
        return replace(self, name=f"{self.name}_rounded", header=f"#define HLA_ROUNDED\n{self.header}")

    def bounded(self, threads: int, blocks: int) -> Source:
        """The variant of which a core is to have room for `blocks` threadgroups of so many threads."""
        return replace(
            self, header=f"#define HLA_THREADS {threads}\n#define HLA_BLOCKS {blocks}\n{self.header}"
        )


_KERNEL = re.compile(
    r"^//# kernel (?P<name>\w+)\n//# inputs: (?P<inputs>[\w ]+)\n//# outputs: (?P<outputs>[\w ]+)\n"
    r"(?://# normalising: (?P<normalising>[\w ]+)\n)?(?P<contract>(?://.*\n)*?)//# body\n",
    re.M,
)
_USES = re.compile(r"^//# uses: ([\w ]+)\n", re.M)
_BEFORE = re.compile(r"^//# before each body\n(.*?)^//# end\n", re.M | re.S)
_HEADING = re.compile(r"^(?=// ---- (.*?) -+$)", re.M)


def sections(text: str) -> dict[str, str]:
    """A text by the headings in it, each with its own; what comes before the first stands under ""."""
    first, *rest = _HEADING.split(text)
    return {"": first, **dict(zip(rest[::2], rest[1::2], strict=True))}


def text_of(file: str, device: GPU = METAL) -> str:
    """What stands in metal/<file>.metal, for this GPU."""
    text = (folder() / f"{file}.metal").read_text(encoding="ascii")
    path = folder() / f"{file}{device.suffix}"
    if device.suffix == ".metal" or not path.is_file():
        return text
    own = sections(path.read_text(encoding="ascii"))
    return "".join(own[name] if name and name in own else its for name, its in sections(text).items())


@cache
def _parts(file: str, device: GPU) -> tuple[str, str, str]:
    """A file's own header, the statements that its bodies begin with, and its kernels."""
    text = text_of(file, device)
    first = _KERNEL.search(text)
    end = first.start() if first else len(text)
    return _BEFORE.sub("", text[:end]), "".join(_BEFORE.findall(text[:end])), text[end:]


@cache
def _header(file: str, device: GPU) -> str:
    """A file's header after those that its `//# uses:` line names."""
    own = _parts(file, device)[0]
    uses = _USES.search(own)
    before = "" if file == HELPERS else _header(HELPERS, device)
    for name in uses.group(1).split() if uses else ():
        before += _header(name, device).removeprefix(_header(HELPERS, device))
    return before + own


@cache
def sources(file: str, device: GPU = METAL) -> dict[str, Source]:
    """The kernels of metal/<file>.metal by name; none of a file that others use."""
    _, before, text = _parts(file, device)
    found = list(_KERNEL.finditer(text))
    ends = [*(m.start() for m in found[1:]), len(text)][: len(found)]
    return {
        m["name"]: Source(
            m["name"],
            tuple(m["inputs"].split()),
            tuple(m["outputs"].split()),
            _header(file, device),
            _parts(HELPERS, device)[1] + before + text[m.end() : end],
            tuple((m["normalising"] or "").split()),
        )
        for m, end in zip(found, ends, strict=True)
    }


_built: dict[tuple[str, str, bool, bool, tuple[int, int] | None], tuple[object, object]] = {}


def launch(
    file: str,
    name: str,
    *,
    inputs: list[mx.array],
    grid: tuple[int, int, int],
    normalising: bool = False,
    **how: Any,
) -> Any:
    """The outputs of the kernel `name` of metal/<file>.metal on the GPU that is here; MLX's keywords.

    grid: threads along x, y, z; heads go along z. The maker, such as `mx.fast.metal_kernel`, is looked up at
    every call, and what another one built is not used: replacing it replaces the machine that kernels run on.
    """
    device = gpu.language()
    dtypes, threads = {a.dtype for a in inputs}, how["threadgroup"][0]
    rounded = device.rounds and mx.bfloat16 in dtypes
    make = device.maker()
    blocks = plan.resident(threads, dtypes, dict(how["template"])) if device.bounds else None
    bound = None if blocks is None else (threads, blocks)
    key = (file, name, normalising, rounded, bound)
    entry = _built.get(key)
    if entry is None or entry[0] is not make:
        source = sources(file, device)[name]
        if normalising:
            source = source.normalised()
        if rounded:
            source = source.rounded()
        if bound:
            source = source.bounded(*bound)
        built = make(
            name=f"hla_{source.name}",
            input_names=list(source.inputs),
            output_names=list(source.outputs),
            source=source.body,
            header=source.header,
            ensure_row_contiguous=False,
        )
        entry = _built[key] = (make, built)
    run: Any = entry[1]
    return run(inputs=inputs, grid=device.grid(grid, how["threadgroup"]), **how)
