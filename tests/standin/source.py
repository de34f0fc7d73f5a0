"""From MLX's generated Metal source to C++ for OpenCL, which clang compiles with real address spaces.

MLX writes a kernel's signature itself, from the names of inputs, the attributes that the body mentions and
the template arguments. That text is taken from MLX, not imitated: tracing a call with `mx.export_function`
produces it without a GPU. The rewriting keeps every line in its place, for the messages.
"""

import re
from dataclasses import dataclass

import mlx.core as mx

from .errors import MetalCompileError, MetalError

# Kernel attributes and where a thread finds their values.
ATTRIBUTES = {
    "dispatch_simdgroups_per_threadgroup": "at->launch_simdgroups",
    "dispatch_threads_per_threadgroup": "MSL_UINT3(launch_group_size)",
    "grid_size": "MSL_UINT3(grid)",
    "simdgroup_index_in_threadgroup": "at->simdgroup",
    "simdgroups_per_threadgroup": "at->simdgroups",
    "thread_execution_width": "32u",
    "thread_index_in_quadgroup": "(at->lane % 4)",
    "thread_index_in_simdgroup": "at->lane",
    "thread_index_in_threadgroup": "at->index",
    "thread_position_in_grid": "MSL_UINT3(in_grid)",
    "thread_position_in_threadgroup": "MSL_UINT3(in_threadgroup)",
    "threadgroup_position_in_grid": "MSL_UINT3(threadgroup_)",
    "threadgroups_per_grid": "MSL_UINT3(groups_per_grid)",
    "threads_per_grid": "MSL_UINT3(grid)",
    "threads_per_simdgroup": "32u",
    "threads_per_threadgroup": "MSL_UINT3(group_size)",
}

FORBIDDEN = [
    (r"\b(?:long\s+)?double\b", "Metal has no double"),
    (
        r"\b(?:new|delete|throw|try|catch|dynamic_cast|typeid|goto|virtual|thread_local|asm)\b",
        "not in Metal's C++",
    ),
    (r"\bstd::", "Metal has no std::"),
    (r"\batomic_?\w*", "atomics: this stand-in has none"),
]


@dataclass(frozen=True)
class Program:
    """A kernel ready for the compiler."""

    metal: str  # MLX's source
    text: str  # what the compiler gets
    buffers: tuple  # buffer names, in binding order


def generated(kernel, inputs, keywords):
    """The Metal source that MLX writes for this call of `kernel` (an `mx.fast.metal_kernel`)."""
    found = []

    def note(event):
        if event.get("type") == "primitive" and event["name"] == "CustomKernel":
            found.append(event["arguments"][1])

    placeholders = [mx.zeros(a.shape, a.dtype) for a in inputs]
    mx.export_function(note, lambda *a: kernel(inputs=list(a), **keywords), *placeholders)
    if len(found) != 1:
        raise MetalError(f"[standin] expected one CustomKernel in the traced call, found {len(found)}")
    return found[0]


def without_comments(text, strings=True):
    """Comments blanked (and strings, if not to be kept), every other character in its place."""

    def blank(m):
        keep = strings and m.group(0).startswith('"')
        return m.group(0) if keep else re.sub(r"[^\n]", " ", m.group(0))

    return re.sub(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', blank, text, flags=re.S)


def _check_words(text):
    for pattern, why in FORBIDDEN:
        if m := re.search(pattern, text):
            line = text[: m.start()].count("\n") + 1
            raise MetalCompileError(f"kernel.metal:{line}: `{m.group(0)}`: {why}")


def _split(declarators):
    """Split at the commas outside brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(declarators):
        depth += (c in "<([{") - (c in ">)]}")
        if c == "," and depth == 0:
            parts.append(declarators[start:i])
            start = i + 1
    return [*parts, declarators[start:]]


def _without_words(text):
    """`threadgroup` for words that the source defines as it: arrays are found before macros are expanded."""
    define = r"(?m)^[ \t]*#[ \t]*define[ \t]+(\w+)[ \t]+((?:alignas\(\d+\) )?threadgroup)[ \t]*$"
    words = dict(re.findall(define, text))
    text = re.sub(define, "", text)
    return re.sub(rf"\b(?:{'|'.join(words)})\b", lambda m: words[m[0]], text) if words else text


def _rewrite_arrays(text, kernel_start):
    """`threadgroup T a[n], b;` becomes MSL_ARRAY(...): the stand-in lays out threadgroup memory itself."""
    count = 0

    def replace(m):
        nonlocal count
        body = m.group(3)
        plain = re.sub(r"\[[^\]]*\]|<[^;]*>", "", body)
        if re.search(r"[*&]", plain.split("=")[0]):  # a pointer or a reference
            return m.group(0)
        line = text[: m.start(3)].count("\n") + 1
        if m.start() < kernel_start:
            raise MetalCompileError(
                f"kernel.metal:{line}: threadgroup memory is declared in kernel functions only"
            )
        if "=" in plain:
            raise MetalCompileError(f"kernel.metal:{line}: threadgroup variables take no initialiser")
        first, *rest = _split(body)
        m2 = re.match(r"(?s)\s*(.*?)(\w+)\s*((?:\[.*\])?)\s*$", first)
        kind = m2.group(1).strip()
        out = []
        for item in [m2.group(2) + m2.group(3), *rest]:
            name, size = re.match(r"(?s)\s*(\w+)\s*(.*?)\s*$", item).groups()
            size = size.replace("\n", " ")
            out.append(f"MSL_ARRAY({count}, {name}, {size}, {m.group(2) or 1}, {kind})")
            count += 1
        return m.group(1) + "; ".join(out) + ";" + "\n" * body.count("\n")

    align, declared = r"(?:alignas\((\d+)\)\s+)?", r"([^;(){}]*(?:\([^;(){}]*\)[^;(){}]*)*)"
    return re.sub(rf"(?<=[;{{}}])(\s*){align}threadgroup\s+{declared};", replace, text)


def prepare(metal):
    """Turn MLX's Metal source into a Program."""
    _check_words(without_comments(metal, strings=False))
    text = _without_words(without_comments(metal))
    text = re.sub(r"(?m)^[ \t]*#\s*include\s*<metal_\w+>.*$|^[ \t]*#pragma METAL.*$", "", text)
    # The explicit instantiation: the wrapper below names the template arguments instead.
    instances = list(re.finditer(r"template\s*\[\[host_name\([^\n]*", text))
    arguments = ""
    if instances:
        arguments = re.search(r"decltype\(\w+(<.*>)\)", instances[-1].group(0)).group(1)
        text = text[: instances[-1].start()] + text[instances[-1].end() :]
    signature = list(re.finditer(r"\[\[kernel\]\]\s*void\s+(\w+)\(([^{]*)\)\s*\{", text))[-1]
    name, parameters = signature.group(1), _split(signature.group(2))
    buffers, values = [], []
    for p in parameters:
        kind, variable, attribute = re.match(
            r"(?s)\s*(.*?)\s*(\w+)\s*\[\[(\w+)(?:\(\d+\))?\]\]\s*$", p
        ).groups()
        if attribute == "buffer":
            place = f"b[{len(buffers)}]"
            values.append(f"*({kind[:-1]}*){place}" if kind.endswith("&") else f"({kind}){place}")
            buffers.append(variable)
        elif attribute in ATTRIBUTES:
            values.append(ATTRIBUTES[attribute])
        else:
            raise MetalCompileError(f"the stand-in does not know the attribute [[{attribute}]]")
    text = _rewrite_arrays(text, signature.end() - 1)
    text = re.sub(
        r"(?<![\w:])(?:metal::)?(vec<[^<>;(){}]+>)\s*\((?!\s*\))", r"metal::make_vec<metal::\1>(", text
    )
    wrapper = (
        '\n#line 1 "wrapper"\n'
        'extern "C" void msl_entry(thread const ulong* b, thread const msl_position* at) {\n'
        f"  {name}{arguments}({', '.join(values)});\n}}\n"
    )
    return Program(metal, f'#line 1 "kernel.metal"\n{text}{wrapper}', tuple(buffers))
