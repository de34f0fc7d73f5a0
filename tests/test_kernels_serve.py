"""Around the kernels: what they serve, when they are built, how MLX's transformations meet them, the plan."""

import re
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from conftest import assert_close
from kernel_problems import Case, KernelProblem, each_family, needs_standin, same_bits, through_steps
from standin import metal

from mlx_hla import kernels
from mlx_hla.kernels import one_pass, passes, plan, source
from mlx_hla.kernels.serve import STEPS


def call(q=(1, 9, 4, 64), k=(1, 9, 2, 64), v=(1, 9, 2, 64), dtypes=(mx.float16,) * 3):
    return [mx.zeros(shape, dtype) for shape, dtype in zip((q, k, v), dtypes, strict=True)]


def test_served():
    for D in (8, 16, 24, 32, 40, 64, 96, 128):
        for DV in (8, 64, 128):
            arrays = call((1, 9, 4, D), (1, 9, 2, D), (1, 9, 2, DV))
            assert kernels.why_not(*arrays) is None
            assert kernels.worthwhile(D, DV, mx.bfloat16)
    for dtype in (mx.float16, mx.bfloat16, mx.float32):
        assert kernels.why_not(*call(dtypes=(dtype,) * 3)) is None
    assert kernels.why_not(*call((1, 32, 64), (1, 2, 64), (1, 2, 64))) is None
    assert [kernels.steps(f, 16) for f in ("linear", "hla2", "ahla", "hla3", None)] == [True] * 4 + [False]
    assert not kernels.steps("hla2", 17)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"dtypes": (mx.float16, mx.float16, mx.float32)},
         "q, k and v must share one of float16, bfloat16, float32; they are .*float16, .*float16, .*float32"),
        ({"dtypes": (mx.int32,) * 3}, "q, k and v must share one of .* they are .*int32"),
        ({"q": (1, 9, 4, 12), "k": (1, 9, 2, 12)}, "multiples of 8 up to 128; they are 12 and 64"),
        ({"q": (1, 9, 4, 136), "k": (1, 9, 2, 136)}, "multiples of 8 up to 128; they are 136 and 64"),
        ({"v": (1, 9, 2, 4)}, "multiples of 8 up to 128; they are 64 and 4"),
        ({"v": (1, 9, 2, 256)}, "multiples of 8 up to 128; they are 64 and 256"),
    ],
)  # fmt: skip
def test_why_not(arrays, words):
    reason = kernels.why_not(*call(**arrays))
    assert reason is not None
    assert re.search(words, reason)


@needs_standin
def test_a_step_of_many_query_heads_is_a_sequence_of_one(monkeypatch):
    """17 query heads to a key-value head are more than a step's kernel keeps sums for."""
    metal.install(monkeypatch)
    problem = KernelProblem("hla2", Case(T=2, B=1, Hq=17, Hkv=1, D=8, V=8, decay="gates"), make=through_steps)
    with metal.counters() as c:
        mx.eval(problem.run())
    assert set(c.kernels) == {"hla_hla2_walk"}
    problem.check()


def test_availability_is_the_default_device():
    on_gpu = mx.default_device() == mx.gpu
    assert (kernels.gpu.here() is kernels.gpu.METAL) == (mx.metal.is_available() and on_gpu)
    assert (kernels.gpu.here() is not None) <= on_gpu


def test_nothing_is_built_at_import():
    code = """
import mlx.core as mx
def refuse(*a, **k): raise AssertionError("a kernel was built")
mx.fast.metal_kernel = refuse
import mlx_hla, mlx_hla.kernels
assert not mlx_hla.kernels.source._built
assert not mlx_hla.kernels.source.sources.cache_info().currsize, "a source was read"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_standin
def test_the_maker_is_looked_up_at_every_call(monkeypatch):
    """Replacing `mx.fast.metal_kernel` replaces the machine, also for kernels that have been built."""
    metal.install(monkeypatch)
    problem = KernelProblem("hla2", Case(T=5, B=1, D=8, V=8))
    mx.eval(problem.run())
    made = []

    def make(**definition):
        made.append(definition["name"])
        assert not definition["ensure_row_contiguous"]
        return metal.metal_kernel(**definition)

    monkeypatch.setattr(mx.fast, "metal_kernel", make)
    mx.eval(problem.run())
    assert made == ["hla_hla2_walk"]
    mx.eval(problem.run())
    assert made == ["hla_hla2_walk"], "built once"


def test_every_kernel_is_described():
    """Names, inputs and contracts in every file; no attribute of a kernel in a contract's place."""
    names = []
    for path in sorted(source.folder().glob("*.metal")):
        if path.stem == source.HELPERS:
            continue
        for name, kernel in source.sources(path.stem).items():
            names.append(name)
            assert kernel.inputs
            assert kernel.outputs
            assert kernel.header.count("FUNC void sync_threadgroup") == 1
            assert "//#" not in kernel.body
    assert len(names) == len(set(names))
    assert {"linear_sums", "linear_scan", "linear_out", "hla2_walk", "hla2_middle"} <= set(names)
    assert {f"{family}_step" for family in STEPS} <= set(names)


@needs_standin
@each_family
def test_checkpoint(monkeypatch, op):
    """mx.checkpoint runs the forward kernels again and gives the same gradients."""
    metal.install(monkeypatch)
    problem = KernelProblem(op, Case(T=40, B=1, D=16, V=16, decay="gates", carried=True))
    arrays = list(problem.arrays.values())
    given = problem.given()
    _, want = mx.vjp(problem.flat(), arrays, given)
    _, got = mx.vjp(mx.checkpoint(problem.flat()), arrays, given)
    assert same_bits(got, want)


@needs_standin
@each_family
def test_compiled_calls_are_refused_in_words(monkeypatch, op):
    """The stand-in needs values; under `mx.compile` it must not answer with constants."""
    compile_ = mx.compile
    metal.install(monkeypatch)
    problem = KernelProblem(op, Case(T=5, B=1, D=8, V=8))
    with pytest.raises((metal.MetalError, ValueError), match=r"compile|trace|transformations"):
        mx.eval(compile_(problem.flat())(*problem.arrays.values()))


# ---- the plan


def test_chunks_fit_the_threadgroup():
    for dtype in (mx.float16, mx.bfloat16, mx.float32):
        for D in range(8, plan.MAX_DIM + 2):
            assert plan.staged_width([(D, dtype), (D, mx.float32)]) in (16, 32)
            if plan.fused("hla3", D):
                assert plan.wide_chunk(D, dtype) in (16, 32)


def test_a_core_has_room_for_some_threadgroups(monkeypatch):
    """Of HLA2's, on either GPU, or the narrowest chunk is taken; none is narrower than it must be."""
    for device in kernels.gpu.GPUS:
        monkeypatch.setattr(kernels.gpu, "here", lambda device=device: device)
        for dtype in (mx.float16, mx.float32):
            for D in range(8, 97, 8):
                staged, width = [(D, dtype), (D, dtype), (D, mx.float32)], plan.wide_chunk(D, dtype)
                fit = {w: plan.RESIDENT * plan.chunk_bytes(w, staged) <= device.core_bytes for w in (16, 32)}
                fits_one = plan.chunk_bytes(32, staged) <= plan.THREADGROUP_BYTES
                assert width == (32 if fit[32] and fits_one else 16), (device.name, D, dtype)
    monkeypatch.setattr(kernels.gpu, "here", lambda: kernels.gpu.METAL)
    assert [plan.wide_chunk(D, mx.bfloat16) for D in (32, 64, 96)] == [32, 16, 16]


def test_no_chunk_fits_in_words():
    with pytest.raises(ValueError, match="no chunk width fits"):
        plan.staged_width([(512, mx.float32), (512, mx.float32)])


def apple(name, architecture):
    return {"device_name": name, "architecture": architecture, "memory_size": 2**36, "resource_limit": 499000}


def nvidia(name, architecture="sm_90"):
    return {
        "device_name": name,
        "architecture": architecture,
        "compute_capability_major": 9,
        "total_memory": 2**36,
    }


DEVICES = {
    "m1": (kernels.gpu.METAL, apple("Apple M1", "applegpu_g13g"), 8),
    "m2-ultra": (kernels.gpu.METAL, apple("Apple M2 Ultra", "applegpu_g14d"), 76),
    "m3-max": (kernels.gpu.METAL, apple("Apple M3 Max", "applegpu_g15s"), 40),
    "m4-pro": (kernels.gpu.METAL, apple("Apple M4 Pro", "applegpu_g16s"), 20),
    "m9-max": (kernels.gpu.METAL, apple("Apple M9 Max", "applegpu_g21s"), 40),
    "a-phone": (kernels.gpu.METAL, apple("Apple A99 GPU", "applegpu_g21p"), 6),
    "a-letter-unheard-of": (kernels.gpu.METAL, apple("Apple M9 Giga", "applegpu_g21x"), None),
    "paravirtual": (kernels.gpu.METAL, apple("Apple Paravirtual device", "paravirtual"), None),
    "h100": (kernels.gpu.CUDA, nvidia("NVIDIA H100 80GB HBM3"), 132),
    "a100": (kernels.gpu.CUDA, nvidia("NVIDIA A100-SXM4-80GB", "sm_80"), 108),
    "h1000": (kernels.gpu.CUDA, nvidia("NVIDIA H1000 PCIe"), None),
    "nameless": (kernels.gpu.CUDA, {"device_name": "NVIDIA", "architecture": "sm_90"}, None),
    "nothing": (kernels.gpu.METAL, {}, None),
}


@pytest.mark.parametrize("kind", DEVICES)
def test_blocks_follow_the_device(monkeypatch, kind):
    """So many threadgroups as its cores want; of an unknown one as many as of any."""
    device, info, cores = DEVICES[kind]
    monkeypatch.setattr(kernels.gpu, "here", lambda: device)
    monkeypatch.setattr(kernels.gpu, "_info", lambda name: info)
    assert kernels.gpu.cores() == cores
    want = device.fill if cores is None else device.per_core * cores
    assert plan.fill() == want
    for heads in (1, 4, want, 2 * want):
        assert 0.9 * want <= heads * plan.blocks(2**20, heads).count < max(want, heads) + heads


def test_a_device_is_asked_once(monkeypatch):
    asked = []
    monkeypatch.setattr(mx, "device_info", lambda: asked.append(1) or apple("Apple M3 Max", "applegpu_g15s"))
    kernels.gpu._info.cache_clear()
    try:
        assert kernels.gpu.cores() == kernels.gpu.cores() == 40
        assert asked == [1]
    finally:
        kernels.gpu._info.cache_clear()


@pytest.mark.parametrize("device", kernels.gpu.GPUS, ids=lambda device: device.name)
def test_blocks(monkeypatch, device):
    monkeypatch.setattr(kernels.gpu, "language", lambda: device)
    assert plan.blocks(2 * device.min_block, 1) == plan.Blocks(device.min_block, 2)
    for T in (1, 31, 255, 256, 257, 4096, 65537):
        for heads in (1, 3, 16, 64, 1000):
            cut = plan.blocks(T, heads)
            assert cut.length % 32 == 0
            assert cut.length * (cut.count - 1) < T <= cut.length * cut.count
            assert cut.count == 1 or cut.length >= plan.min_block()
            assert cut.count * heads <= max(heads, 2 * plan.fill())
    assert plan.blocks(65536, 1).count == plan.fill()
    assert plan.blocks(65536, plan.fill()).count == 1


@needs_standin
def test_a_wide_head_runs_pass_by_pass(monkeypatch):
    """Two states of 128 columns do not fit the registers: the same operator by three launches."""
    metal.install(monkeypatch)
    launched = {}
    for D in (96, 104):
        problem = KernelProblem("hla2", Case(T=33, B=1, Hq=1, Hkv=1, D=D, V=8, decay="gates", carried=True))
        with metal.counters() as c:
            o, _ = problem.run()
            mx.eval(o)
        launched[D] = c.kernels
        assert_close("o", o, problem.expected()[0], problem.tolerance())
    assert launched == {96: ["hla_hla2_walk"], 104: ["hla_linear_out"] * 2}


def test_constants_are_made_once():
    """And a state of zeros is one number, however large."""
    assert passes.floats(1, 0.5) is passes.floats(1.0, 0.5)
    assert passes.ints(256) is passes.ints(256)
    zeros = one_pass.zero_state((2, 3, 4, 5))
    assert zeros.dtype == mx.float32
    assert mx.array_equal(zeros, mx.zeros((2, 3, 4, 5)))
    assert np.array(zeros, copy=False).strides == (0, 0, 0, 0)
