"""What the stand-in for CUDA finds: faults planted in sound kernels."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import assert_close
from standin import cuda
from standin.metal import why_not

import mlx_hla

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

NO_AWAIT = ("  await_copies();\n  __syncthreads();", "  __syncthreads();")
NO_BARRIER = ("  __syncthreads();", "")
WAIT = "wait for ever"
BFLOAT16 = 1e-2  # of the largest: its 8 bits, in the operands, the result and the plain ops
FAULTS = {  # (what stands there, what is planted, of the error)
    "a barrier of one warp": ("  __syncthreads();", "  if (threadIdx.x < 32) __syncthreads();", WAIT),
    "a shuffle of some lanes": ("if (lane >= distance) x += before;", "if (lane >= distance) break;", WAIT),
    "lanes at two operations": (
        "    const float before = __shfl_up_sync(0xffffffffu, x, distance);\n",
        "    const float before = lane > 3 ? __shfl_up_sync(0xffffffffu, x, distance) : 0.0f;\n"
        "    if (lane <= 3) { Frag f = frag_zero(); mma_tf32(f, f, 0, 0, 0, 0, 0, 0); }\n",
        "meet at different operations",
    ),
    "a mask of some lanes": ("__shfl_up_sync(0xffffffffu,", "__shfl_up_sync(0xffffu,", "name all lanes"),
    "copies that nobody awaits": (*NO_AWAIT, "before its copies came"),
    "a copy of odd bytes": (
        "copy_sixteen(dst + i.row * ld + c,",
        "copy_sixteen(dst + i.row * ld + c + 1,",
        "aligned",
    ),
    "a result that is not written": (
        "if (count > 0) Floats<N>::template write",
        "if (count > 8) Floats<N>::template write",
        "never written",
    ),
}
WRONG = {
    "rows for columns": ("at.row = lane / 4;", "at.row = lane / 4 ^ 1;"),
    "a place of the sum": ("static_cast<float>(p[4])", "static_cast<float>(p[3])"),
    "the upper half for the lower": ("lower.first[0], upper.first[1]", "upper.first[0], upper.first[1]"),
    "the rest left out": ("  if (B) {", "  if (false) {"),
    "a causal block too many": ("TURNED ? k >= r : k <= r)", "TURNED ? k >= r : k <= r + 1)"),
    "no barrier": NO_BARRIER,
}
WRONG_IN_BFLOAT16 = {
    "other lanes' rows": ("% 8 * ld", "% 4 * ld"),
    "a fragment not turned": ("x.first = turned(x.first);", "x.first = x.first;"),
    "its rest not turned": ("x.rest = turned(x.rest);", "x.rest = x.first;"),
    "the lower half for the upper": (
        "upper.first, lower.first, right.first",
        "lower.first, lower.first, right.first",
    ),
    "no barrier": NO_BARRIER,
}


@pytest.fixture
def run(monkeypatch):
    qkv = [mx.array(np.random.default_rng(i).normal(size=(1, 45, 2, 24)), mx.float32) for i in range(3)]
    g = mx.full((1, 45, 2), 0.9)

    def run(backend, *edits, dtype=mx.float32):
        def maker(**definition):
            header = definition["header"]
            for old, new in edits:
                assert old in header
                header = header.replace(old, new)
            return cuda.cuda_kernel(**definition | {"header": header})

        cuda.install(monkeypatch, maker)
        q, k, v = (x.astype(dtype) for x in qkv)
        o, state = mlx_hla.hla2(q, k, v, decay=g, scale=0.2, backend=backend)
        mx.eval(o, state)
        return o.astype(mx.float32)

    return run


@pytest.mark.parametrize("order", cuda.ORDERS)
def test_a_sound_kernel(run, order):
    with cuda.options(order):
        assert_close("o", run("cuda"), run("mlx"), 2e-6)
        assert_close("o", run("cuda", dtype=mx.bfloat16), run("mlx", dtype=mx.bfloat16), BFLOAT16)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_an_error(run, fault):
    old, new, message = FAULTS[fault]
    with pytest.raises((RuntimeError, AssertionError), match=message), cuda.options("reverse"):
        run("cuda", (old, new))


@pytest.mark.parametrize("fault", WRONG)
def test_a_fault_changes_numbers(run, fault):
    with pytest.raises(AssertionError, match=r"not finite|relative error"), cuda.options("reverse"):
        assert_close("o", run("cuda", WRONG[fault]), run("mlx"), 2e-6)


@pytest.mark.parametrize("fault", WRONG_IN_BFLOAT16)
def test_a_fault_changes_bfloat16(run, fault):
    want = run("mlx", dtype=mx.bfloat16)
    with pytest.raises(AssertionError, match=r"not finite|relative error"), cuda.options("reverse"):
        assert_close("o", run("cuda", WRONG_IN_BFLOAT16[fault], dtype=mx.bfloat16), want, BFLOAT16)
