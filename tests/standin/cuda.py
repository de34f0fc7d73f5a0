"""CUDA kernels without a GPU: the source that MLX writes for a `mx.fast.cuda_kernel` call, run on a CPU.

from standin import cuda

def test_something(monkeypatch):
    cuda.install(monkeypatch)
    o, state = mlx_hla.hla2(q, k, v, backend="cuda")

MLX's build for CPUs does not write that source, so `program` does, after mlx/backend/cuda/custom_kernel.cpp;
tests/test_gpu_device.py holds it to MLX's own text on a GPU. What is watched: that a warp's lanes meet at
the same operations, that nobody waits for ever, that every element of an output is written. Races and bounds
are the business of the stand-in for Metal, which runs the same bodies.
"""

import contextlib
import ctypes
import hashlib
import os
import re
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np

from . import build
from .metal import _NUMPY, _bind_input, _host_view, _no_compile

TYPES = {
    mx.float32: "float", mx.float16: "__half", mx.bfloat16: "__nv_bfloat16", mx.int32: "int32_t",
}  # fmt: skip
NAMES = {mx.float32: "float", mx.float16: "float16_t", mx.bfloat16: "bfloat16_t"}  # in a kernel's name

# What stands before a header: of MLX's own utilities only the types of `<input>_shape` and `<input>_strides`.
PRELUDE = """
#include <cstdint>
#include <cuda/std/array>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cooperative_groups.h>

namespace mlx::core::cu {
using Shape = cuda::std::array<int32_t, 10>;
using Strides = cuda::std::array<int64_t, 10>;
}
"""


@dataclass(frozen=True)
class Program:
    """name: of the function, in namespace mlx::core::cu. parameters: (kind, input or output, what of it)."""

    name: str
    header: str
    function: str
    parameters: tuple


def program(definition, inputs, output_dtypes, template):
    """What MLX writes for a call (mlx/backend/cuda/custom_kernel.cpp)."""
    body, constants, name = definition["source"], "", f"custom_kernel_{definition['name']}"
    for key, value in template:
        if isinstance(value, bool):
            constants += f"  constexpr bool {key} = {str(value).lower()};\n"
            name += "_t" if value else "_f"
        elif isinstance(value, int):
            constants += f"  constexpr int {key} = {value};\n"
            name += f"_{value}"
        else:
            constants += f"  using {key} = {TYPES[value]};\n"
            name += f"_{NAMES[value]}"
    declared, parameters = [], []
    for key, a in zip(definition["input_names"], inputs, strict=True):
        declared.append(f"const {TYPES[a.dtype]}* {key}")
        parameters.append((key, "data"))
        for what, kind in (("shape", "Shape"), ("strides", "Strides"), ("ndim", "int")):
            if a.ndim and f"{key}_{what}" in body:
                declared.append(f"const __grid_constant__ {kind} {key}_{what}")
                parameters.append((key, what))
    for key, dtype in zip(definition["output_names"], output_dtypes, strict=True):
        declared.append(f"{TYPES[dtype]}* {key}")
        parameters.append((key, "data"))
    function = (
        f"__global__ void {name}(\n    " + ",\n    ".join(declared) + f") {{\n{constants}\n{body}\n}}\n"
    )
    return Program(name, definition["header"], function, tuple(parameters))


# ---- on a CPU

FLAGS = ["-std=c++17", "-O1", "-march=x86_64_v3", "-fPIC", "-shared"]
FLAGS += ["-fno-sanitize=undefined", "-fno-math-errno", "-ffp-contract=off"]
HEADER = build.HERE / "include" / "cuda_on_cpu.h"
ORDERS = ("forward", "reverse", "random")
_order = ("forward", 1)  # of threads, and a seed
launched = []  # names of kernels


def _without_asm(header):
    """The header less its functions of one asm statement: those are in cuda_on_cpu.h."""
    text = re.sub(r"^FUNC \w+ \w+\([^()]*\) \{[^}]*\basm\b.*?\}(?=\n\n)", "", header, flags=re.M | re.S)
    assert "asm" not in re.sub(r"//.*", "", text)
    return text


def _wrapper(p):
    """A function of C's that runs a launch: pointers to the arguments, groups, threads, order, seed."""
    types = re.findall(r"^    (?:const )?(?:__grid_constant__ )?(\w+)(\*?) \w+(?:,|\) \{)$", p.function, re.M)
    assert len(types) == len(p.parameters)
    values = [
        f"({kind}*)arguments[{i}]" if star else f"*({kind}*)arguments[{i}]"
        for i, (kind, star) in enumerate(types)
    ]
    return f"""
static void** arguments;
static void one_thread() {{
  using namespace mlx::core::cu;
  {p.name}({", ".join(values)});
}}
extern "C" const char* launch(void** given, const int* groups, int threads, int order, unsigned seed) {{
  arguments = given;
  return run_groups(one_thread, groups, threads, order, seed);
}}
"""


@cache
def _compiled(p):
    header = _without_asm(p.header)
    text = f'#include "{HEADER}"\n{header}\nnamespace mlx::core::cu {{\n{p.function}}}\n{_wrapper(p)}'
    digest = hashlib.sha256((text + HEADER.read_text() + " ".join(FLAGS)).encode()).hexdigest()[:24]
    target = build.folder() / f"cuda-{digest}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=build.folder()) as work:
            source, made = os.path.join(work, "kernel.cpp"), os.path.join(work, "kernel.so")
            Path(source).write_text(text)
            build._run("c++", *FLAGS, source, "-o", made)
            os.replace(made, target)
    run = ctypes.CDLL(str(target)).launch
    run.restype = ctypes.c_char_p
    return run


def _tenfold(values, kind):
    return np.array([*values, *[0] * (10 - len(values))], kind)


def _bound(definition, arrays):
    """{(input, what of it): (what keeps it alive, its address)}."""
    held = {}
    for name, a in zip(definition["input_names"], arrays, strict=True):
        data, _, _, lead = _bind_input(name, a, False)[name]
        room, tables = np.frombuffer(data, np.uint8).copy(), {}
        held[name, "data"] = room, room.ctypes.data + lead
        strides = [s // a.itemsize for s in _host_view(a).strides]
        tables["shape"], tables["strides"] = _tenfold(a.shape, np.int32), _tenfold(strides, np.int64)
        held |= {(name, what): (table, table.ctypes.data) for what, table in tables.items()}
    return held


def _run(definition, arrays, *, output_shapes, output_dtypes, grid, threadgroup, template):
    p = program(definition, arrays, output_dtypes, template)
    call = _compiled(p)
    mx.eval(arrays)
    held, outputs = _bound(definition, arrays), {}
    for name, shape, dtype in zip(definition["output_names"], output_shapes, output_dtypes, strict=True):
        host = np.full(shape, -1, f"i{dtype.size}").view(_NUMPY[dtype])  # poison
        outputs[name] = host, dtype
        held[name, "data"] = host, host.ctypes.data
    assert threadgroup[1:] == (1, 1), threadgroup
    assert grid[0] % threadgroup[0] == 0, grid
    assert max(grid[1:]) <= 65535, grid
    pointers = (ctypes.c_void_p * len(p.parameters))(*(held[key][1] for key in p.parameters))
    groups = (ctypes.c_int * 3)(grid[0] // threadgroup[0], *grid[1:])
    fault = call(pointers, groups, threadgroup[0], ORDERS.index(_order[0]), ctypes.c_uint(_order[1]))
    if fault:
        raise RuntimeError(f"[{p.name}] {fault.decode()}")
    results = []
    for name, (host, dtype) in outputs.items():
        left = (host.view(f"i{dtype.size}") == -1).sum()
        assert not left, f"[{p.name}] output {name}: {left} elements never written"
        x = mx.array(host)
        results.append(x.view(mx.bfloat16) if dtype == mx.bfloat16 else x)
    return results


def _primitive(run, arrays):
    """A kernel on a GPU has no gradient and says so."""

    @mx.custom_function
    def primitive(*arrays):
        return run(list(arrays))

    @primitive.vjp
    def _no_gradient(primals, cotangents, outputs):
        raise ValueError("[Primitive::vjp] Not implemented for CustomKernel.")

    return list(primitive(*arrays))


def cuda_kernel(**definition):
    """What stands in the place of `mx.fast.cuda_kernel`."""

    def kernel(*, inputs, **how):
        launched.append(definition["name"])
        return _primitive(lambda arrays: _run(definition, arrays, **how), inputs)

    return kernel


@contextlib.contextmanager
def options(order="forward", seed=1):
    """Run threads in another order for a while."""
    global _order
    before, _order = _order, (order, seed)
    try:
        yield
    finally:
        _order = before


def install(monkeypatch, maker=cuda_kernel):
    """Make the stand-in serve `mx.fast.cuda_kernel` for one test."""
    from mlx_hla.kernels import gpu

    monkeypatch.setattr(mx.fast, "cuda_kernel", maker)
    monkeypatch.setattr(gpu, "here", lambda: gpu.CUDA)
    monkeypatch.setattr(mx, "compile", _no_compile)


# ---- not run at all


def recorded(monkeypatch):
    """{program: threads of a threadgroup} of what is launched from now on in a test; outputs are zeros."""
    programs = {}

    def maker(**definition):
        def kernel(*, inputs, output_shapes, output_dtypes, grid, threadgroup, template):
            programs[program(definition, inputs, output_dtypes, template)] = threadgroup[0]
            shapes = list(zip(output_shapes, output_dtypes, strict=True))
            return _primitive(lambda arrays: [mx.zeros(s, d) for s, d in shapes], inputs)

        return kernel

    install(monkeypatch, maker)
    return programs
