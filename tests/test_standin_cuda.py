"""What the stand-in for CUDA finds: faults planted in sound kernels."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import assert_close
from standin import cuda
from standin.metal import why_not

import mlx_hla
from mlx_hla.kernels import gpu, source

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
        "    if (lane <= 3) { float f[2] = {}; mma_tf32(f, f, 0, 0, 0, 0, 0, 0); }\n",
        "meet at different operations",
    ),
    "a mask of some lanes": ("__shfl_up_sync(0xffffffffu,", "__shfl_up_sync(0xffffu,", "name all lanes"),
    "copies that nobody awaits": (*NO_AWAIT, "before its copies came"),
    "a copy of odd bytes": (
        "copy_sixteen(dst + row * ld + c,",
        "copy_sixteen(dst + row * ld + c + 1,",
        "aligned",
    ),
    "a result that is not written": (
        "i < 2 * R; i++) {\n      Floats<C>::template write",
        "i < 2 * R - 1; i++) {\n      Floats<C>::template write",
        "never written",
    ),
}
WRONG = {
    "rows for columns": ("at.row = lane / 4;", "at.row = lane / 4 ^ 1;"),
    "a place of the sum": ("static_cast<float>(q[ld])", "static_cast<float>(q[0])"),
    "the upper half for the lower": ("a[0], b[0], a[1], b[1], c[0]", "a[0], a[0], a[1], b[1], c[0]"),
    "the rest left out": ("__float_as_uint(of[e] - __uint_as_float(x.first[e]))", "0"),
    "a causal block too many": ("k / 2 > r / 2)", "k / 2 > r / 2 + 1)"),
    "no barrier": NO_BARRIER,
}
WRONG_IN_BFLOAT16 = {
    "other lanes' rows": ("row = lane % 8;", "row = lane % 4;"),
    "blocks in another order": ("n = lane / 16, m = lane / 8 % 2;", "n = lane / 8 % 2, m = lane / 16;"),
    "blocks not turned": ("read_blocks_turned(of, p", "read_blocks(of, p"),
    "a first part for the rest": ("PARTS ? upper.rest", "PARTS ? upper.first"),
    "the lower half for the upper": ("a[0], b[0], a[1], b[1], right", "b[0], b[0], b[1], b[1], right"),
    "a decay of another row": ("by + 8 * r + at.col", "by + 8 * r"),
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


# ---- instructions, by the layouts of their operands in the PTX manual: of a matrix lane 4 g + t has so many
# elements, and where the i-th of them is

LAYOUTS = {  # (A's columns, elements of A and B, where they are)
    "mma_bf16": (
        16,
        (8, lambda i: (f"g + {8 * (i // 2 % 2)}", f"2 * t + {i % 2 + 8 * (i // 4)}")),
        (4, lambda i: (f"2 * t + {i % 2 + 8 * (i // 2)}", "g")),
    ),
    "mma_half_bf16": (
        8,
        (4, lambda i: (f"g + {8 * (i // 2)}", f"2 * t + {i % 2}")),
        (2, lambda i: (f"2 * t + {i % 2}", "g")),
    ),
    "mma_tf32": (
        8,
        (4, lambda i: (f"g + {8 * (i % 2)}", f"t + {4 * (i // 2)}")),
        (2, lambda i: (f"t + {4 * i}", "g")),
    ),
}


def run_one_warp(body, inputs, shape, rounded):
    """What a warp writes to `out`, with the words of CUDA."""
    kernel = source.sources("linear", gpu.CUDA)["linear_out"]
    kernel = kernel.rounded() if rounded else kernel
    definition = {"name": "one_warp", "input_names": ["a", "b"], "output_names": ["out"]}
    made = cuda.cuda_kernel(**definition, source=body, header=kernel.header)
    out = made(
        inputs=inputs,
        output_shapes=[shape],
        output_dtypes=[mx.float32],
        grid=(32, 1, 1),
        threadgroup=(32, 1, 1),
        template=[],
    )
    return np.array(out[0])


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_product_lies_as_documented(name):
    """C (16 x 8) = A B: lane 4 g + t has (g, 2 t), (g, 2 t + 1) of it, and the same of row g + 8."""
    K, *operands = LAYOUTS[name]
    rng = np.random.default_rng(0)
    a, b = rng.integers(-9, 10, (16, K)), rng.integers(-9, 10, (K, 8))
    given = []
    for x, width, (count, place) in zip("ab", (K, 8), operands, strict=True):
        numbers = [f"{x}[({row}) * {width} + {col}]" for row, col in map(place, range(count))]
        if "bf16" in name:
            pairs = zip(numbers[::2], numbers[1::2], strict=True)
            given += [f"packed({first}, {second})" for first, second in pairs]
        else:
            given += [f"__float_as_uint({number})" for number in numbers]
    body = f"""
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  float top[2] = {{}}, bottom[2] = {{}};
  {name}(top, bottom, {", ".join(given)});
  for (int e = 0; e < 2; e++) {{
    out[8 * g + 2 * t + e] = top[e];
    out[8 * (g + 8) + 2 * t + e] = bottom[e];
  }}
"""
    got = run_one_warp(body, [mx.array(x, mx.float32) for x in (a, b)], (16, 8), "bf16" in name)
    np.testing.assert_array_equal(got, a @ b)


@pytest.mark.parametrize("turned", [False, True], ids=["plain", "turned"])
@pytest.mark.parametrize("count", [1, 4])
def test_blocks_are_read_as_documented(count, turned):
    """Lane 8 n + i names row i of block n; lane 4 g + t gets (g, 2 t), (g, 2 t + 1), or what mirrors them."""
    a = np.random.default_rng(1).permutation(256).reshape(4, 8, 8)
    one, four = ("read_turned", "read_blocks_turned") if turned else ("read_block", "read_blocks")
    call = f"of[0] = {one}(row);" if count == 1 else f"{four}(of, row);"
    body = f"""
  SHARED __nv_bfloat16 room[256];
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  for (int i = 0; i < 8; i++) room[8 * lane + i] = static_cast<__nv_bfloat16>(a[8 * lane + i]);
  sync_threadgroup();
  const void* row = room + 8 * (lane % {8 * count});
  unsigned of[4];
  {call}
  for (int n = 0; n < {count}; n++) {{
    out[64 * n + 8 * g + 2 * t] = __uint_as_float(of[n] << 16);
    out[64 * n + 8 * g + 2 * t + 1] = __uint_as_float(of[n] & 0xffff0000u);
  }}
"""
    x = mx.array(a, mx.float32)
    got = run_one_warp(body, [x, x], (count, 8, 8), True)
    want = a[:count]
    np.testing.assert_array_equal(got, want.transpose(0, 2, 1) if turned else want)
