"""The public face of the stand-in: `install`, `options`, `counters`, and `metal_kernel` itself.

from standin import metal

def test_something(monkeypatch):
    metal.install(monkeypatch)
    with metal.options(schedule="random", seed=3), metal.counters() as c:
        o, _ = mlx_hla.hla2(q, k, v, backend="metal")
    assert c.launches == 2
"""

import contextlib
import dataclasses
import functools
import math
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from . import build, source
from .errors import MetalCompileError, MetalError, MetalTimeout
from .process import CHILD

__all__ = [
    "Counters", "MetalCompileError", "MetalError", "MetalTimeout", "Options",
    "counters", "install", "metal_kernel", "options", "why_not",
]  # fmt: skip

SCHEDULES = ("forward", "reverse", "interleave", "random")
why_not = build.why_not
_real_metal_kernel = mx.fast.metal_kernel
_NUMPY = {
    mx.bool_: np.bool_, mx.int8: np.int8, mx.uint8: np.uint8, mx.int16: np.int16, mx.uint16: np.uint16,
    mx.int32: np.int32, mx.uint32: np.uint32, mx.int64: np.int64, mx.uint64: np.uint64,
    mx.float16: np.float16, mx.float32: np.float32, mx.bfloat16: np.uint16,
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """How kernels run. `checked=False` is several times faster and finds wrong numbers only."""

    checked: bool = True
    schedule: str = "forward"  # one of SCHEDULES
    seed: int = 0  # of the random schedule
    strict_writes: bool = False  # two threads writing the same value to one place: a race too
    early_exit: bool = False  # lanes that have returned may be missing from a simd_sum
    time_limit: float = 60.0  # seconds for one launch


@dataclass
class Counters:
    """What the launches inside a `with counters()` did. Bytes are counted in checked mode only.

    `read` and `written` map a buffer's name to bytes of device memory as the threads ask for them;
    `unique_read` and `unique_written` count each byte once per threadgroup, as a perfect cache would.
    """

    launches: int = 0
    kernels: list = field(default_factory=list)  # names, in order of launch
    read: dict = field(default_factory=dict)
    written: dict = field(default_factory=dict)
    unique_read: dict = field(default_factory=dict)
    unique_written: dict = field(default_factory=dict)
    threadgroup_read: int = 0
    threadgroup_written: int = 0
    threadgroup_bytes: int = 0  # the most that one kernel has declared
    device_loads: int = 0  # of all threads, of any width, in checked mode; so are the next three
    threadgroup_loads: int = 0
    device_stores: int = 0
    threadgroup_stores: int = 0
    matrix_multiplies: int = 0  # 8x8x8 products, 512 multiply-accumulates each
    apart: int = 0  # summed over matrix products: how many ago their accumulator had its last, at most 8
    scalar_macs: int = 0  # scalar floating-point products, fused or not, in checked mode
    barriers: int = 0  # each once per threadgroup
    simdgroup_barriers: int = 0
    simd_ops: int = 0  # sums, shuffles ... each once per simdgroup
    same_value_writes: int = 0
    threadgroups: int = 0
    threads: int = 0
    copies: int = 0  # inputs copied because a kernel asked for contiguous ones
    copied_bytes: int = 0
    each: list = field(default_factory=list)  # the Counters of every launch by itself

    @property
    def matrix_macs(self):
        return 512 * self.matrix_multiplies

    @property
    def in_flight(self):
        """Accumulators that matrix products work on in turn, on average; 8 stands for as many or more."""
        return self.apart / max(1, self.matrix_multiplies)

    def _add(self, name, buffers, counts, alone=True):
        if alone:
            self.each.append(Counters())
            self.each[-1]._add(name, buffers, counts, alone=False)
        self.launches += 1
        self.kernels.append(name)
        for key, value in counts.items():
            if key in ("unwritten", "first_unwritten"):
                continue
            if isinstance(value, list):
                table = getattr(self, key)
                for buffer, n in zip(buffers, value, strict=True):
                    if n:
                        table[buffer] = table.get(buffer, 0) + n
            elif key == "threadgroup_bytes":
                self.threadgroup_bytes = max(self.threadgroup_bytes, value)
            else:
                setattr(self, key, getattr(self, key) + value)


_options = Options()
_listeners = []


@contextlib.contextmanager
def options(**changes):
    """Run kernels differently for a while: `with options(schedule="reverse"): ...`."""
    global _options
    before, _options = _options, dataclasses.replace(_options, **changes)
    if _options.schedule not in SCHEDULES:
        _options = before
        raise ValueError(f"[standin] schedule must be one of {SCHEDULES}, got {changes['schedule']!r}")
    try:
        yield _options
    finally:
        _options = before


@contextlib.contextmanager
def counters():
    """Count what the launches inside the block do; blocks may nest."""
    counted = Counters()
    _listeners.append(counted)
    try:
        yield counted
    finally:
        _listeners[:] = [c for c in _listeners if c is not counted]


def install(monkeypatch, **changes):
    """Make the stand-in serve `mx.fast.metal_kernel` for one test; `changes` are Options.

    Whatever has been built from the real one before is the library's to forget. `mx.compile` is switched off:
    a kernel here runs at once, on values that a compiled function does not have while it is traced.
    """
    global _options
    monkeypatch.setattr(mx.fast, "metal_kernel", metal_kernel)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    with contextlib.suppress(ImportError):
        from mlx_hla.kernels import gpu

        monkeypatch.setattr(gpu, "here", lambda: gpu.METAL)
    monkeypatch.setattr(mx, "compile", _no_compile)
    monkeypatch.setitem(globals(), "_options", dataclasses.replace(_options, **changes))


def _no_compile(fun=None, **_):
    return fun if fun is not None else (lambda f: f)


def _host_view(a):
    """The array's own memory as NumPy sees it, strides and all (bfloat as its bits)."""
    return np.asarray(a.view(mx.uint16) if a.dtype == mx.bfloat16 else a)


@functools.cache
def _allocation_offset():
    """Address modulo 16 of a fresh allocation of MLX on the CPU; on a GPU it is 0."""
    fresh = mx.zeros(1024) + 1
    mx.eval(fresh)
    return _host_view(fresh).ctypes.data % 16


def _bind_input(name, a, contiguous):
    """{buffer: (bytes, granule, address modulo 16, offset of the first element)} as MLX binds one input."""
    v = _host_view(a)
    if contiguous and not v.flags.c_contiguous:
        for c in _listeners:
            c.copies += 1
            c.copied_bytes += v.nbytes
        v = np.ascontiguousarray(v)
        misalign = 0
    else:
        misalign = (v.ctypes.data - _allocation_offset()) % 16
    lead = 0
    if v.flags.c_contiguous:
        data = v.tobytes()
    else:
        ends = [(n - 1) * stride for n, stride in zip(v.shape, v.strides, strict=True)]
        lead = -sum(min(e, 0) for e in ends)  # bytes before element 0: not 0 where a stride is negative
        span = lead + sum(max(e, 0) for e in ends) + v.itemsize
        # What lies between the elements is not the kernel's to read: poison.
        room = np.full(span // v.itemsize, -1, f"i{v.itemsize}").view(v.dtype)
        np.lib.stride_tricks.as_strided(room[lead // v.itemsize :], v.shape, v.strides)[...] = v
        data = room.tobytes()
    bound = {name: (data, v.itemsize, (misalign - lead) % 16, lead)}
    if a.ndim:
        tables = {"shape": (v.shape, np.int32), "strides": ([s // v.itemsize for s in v.strides], np.int64)}
        tables["ndim"] = (a.ndim, np.int32)
        for suffix, (values, kind) in tables.items():
            bound[f"{name}_{suffix}"] = (np.array(values, kind).tobytes(), kind().itemsize, 0, 0)
    return bound


def _place(site, program):
    line, column = site >> 10, site & 1023
    if not line:
        return ""
    lines = program.metal.split("\n")
    text = lines[line - 1].strip() if line <= len(lines) else ""
    return f"\n  kernel.metal:{line}:{column}: {text}"


class Kernel:
    """What `mx.fast.metal_kernel` returns, but run by the stand-in."""

    def __init__(self, name, input_names, output_names, source, header="", ensure_row_contiguous=True,
                 atomic_outputs=False, **rest):  # fmt: skip
        if atomic_outputs:
            raise MetalError(f"[standin] kernel {name}: atomic outputs are not served")
        self.name, self.contiguous = name, ensure_row_contiguous
        self.inputs, self.outputs = list(input_names), list(output_names)
        self.real = _real_metal_kernel(
            name=name, input_names=input_names, output_names=output_names, source=source, header=header,
            ensure_row_contiguous=ensure_row_contiguous, atomic_outputs=atomic_outputs, **rest,
        )  # fmt: skip
        self.programs = {}

    def __call__(self, *, inputs, output_shapes, output_dtypes, grid, threadgroup, template=None,
                 init_value=None, verbose=False, stream=None):  # fmt: skip
        arrays = [a if isinstance(a, mx.array) else mx.array(a) for a in inputs]
        keywords = {
            "output_shapes": [tuple(s) for s in output_shapes], "output_dtypes": list(output_dtypes),
            "grid": tuple(grid), "threadgroup": tuple(threadgroup),
        }  # fmt: skip
        if template:
            keywords["template"] = template

        # A kernel on a GPU has no gradient and says so; values computed here would silently be constants.
        @mx.custom_function
        def primitive(*arrays):
            return self._run(list(arrays), keywords, init_value, verbose)

        @primitive.vjp
        def _no_gradient(primals, cotangents, outputs):
            raise ValueError("[Primitive::vjp] Not implemented for CustomKernel.")

        return list(primitive(*arrays))

    def _program(self, arrays, keywords):
        key = (
            tuple((a.dtype, a.ndim, a.size < 8) for a in arrays), tuple(keywords["output_dtypes"]),
            tuple(tuple(t) for t in keywords.get("template", ())),
        )  # fmt: skip
        if key not in self.programs:
            self.programs[key] = source.prepare(source.generated(self.real, arrays, keywords))
        return self.programs[key]

    def _run(self, arrays, keywords, init_value, verbose):
        program = self._program(arrays, keywords)
        if verbose:
            print(program.metal)
        path = build.compile_kernel(program, _options.checked)
        try:
            mx.eval(arrays)
        except ValueError as e:
            if "function transformations" not in str(e):
                raise
            raise MetalError(
                f"[standin] a kernel here needs values, not what mx.compile or vmap trace: {e}"
            ) from e
        bound = {}
        for name, a in zip(self.inputs, arrays, strict=True):
            bound |= _bind_input(name, a, self.contiguous)
        shapes = dict(zip(self.outputs, keywords["output_shapes"], strict=True))
        dtypes = dict(zip(self.outputs, keywords["output_dtypes"], strict=True))
        buffers = []
        for name in program.buffers:
            output = name in shapes
            if output:
                granule = np.dtype(_NUMPY[dtypes[name]]).itemsize
                size = granule * math.prod(shapes[name])
                data = None
                if init_value is not None:
                    data = _host_view(mx.full(shapes[name], init_value, dtypes[name])).tobytes()
                misalign = lead = 0
            else:
                data, granule, misalign, lead = bound[name]
                size = len(data)
            buffers.append(
                {
                    "data": data,
                    "size": size,
                    "output": output,
                    "granule": granule,
                    "misalign": misalign,
                    "lead": lead,
                }
            )
        o = _options
        job = {
            "path": str(path), "buffers": buffers,
            "grid": keywords["grid"], "threadgroup": keywords["threadgroup"],
            "options": (o.checked, SCHEDULES.index(o.schedule), o.seed, o.strict_writes, o.early_exit),
        }  # fmt: skip
        reply, ended = CHILD.launch(job, o.time_limit)
        if ended:
            error, site = ended
            raise type(error)(f"[{self.name}] {error}{_place(site, program)}")
        self._judge(program, reply, dtypes, o.checked, init_value is not None)
        for c in _listeners:
            c._add(self.name, program.buffers, reply["counts"])
        results = {}
        for name, data in zip([n for n in program.buffers if n in shapes], reply["outputs"], strict=True):
            host = np.frombuffer(data, _NUMPY[dtypes[name]]).reshape(shapes[name])
            results[name] = mx.array(host)
            if dtypes[name] == mx.bfloat16:
                results[name] = results[name].view(mx.bfloat16)
        return [results[n] for n in self.outputs]

    def _judge(self, program, reply, dtypes, checked, initialised):
        if reply["message"]:
            message = reply["message"]
            for i, name in enumerate(program.buffers):
                message = message.replace(f"#{i}#", f"`{name}`")
            raise MetalError(f"[{self.name}] {message}{_place(reply['site'], program)}")
        outputs = iter(reply["outputs"])
        for i, name in enumerate(program.buffers):
            if name not in dtypes:
                continue
            data, kind = next(outputs), _NUMPY[dtypes[name]]
            n, first = reply["counts"]["unwritten"][i], reply["counts"]["first_unwritten"][i]
            if not checked and not initialised and mx.issubdtype(dtypes[name], mx.floating):
                # Poison left in place: a NaN that no arithmetic makes, though copying poison does.
                poison = np.frombuffer(data, f"i{kind().itemsize}") == -1
                n, first = int(poison.sum()), int(poison.argmax()) if poison.any() else 0
            if n:
                raise MetalError(
                    f"[{self.name}] output `{name}`: {n} elements never written, the first at index {first}"
                )


def metal_kernel(name, input_names, output_names, source, header="", ensure_row_contiguous=True,
                 atomic_outputs=False, **rest):  # fmt: skip
    """`mx.fast.metal_kernel` without a GPU."""
    return Kernel(
        name, input_names, output_names, source, header, ensure_row_contiguous, atomic_outputs, **rest
    )
