"""What the stand-in catches: one sound kernel, and a list of ways to break it.

Every mutant is an edit of the sound kernel's source or launch, and must end in an error that names its fault.
Most of them also run to their end in the unchecked mode: the check, and nothing else, finds them.
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest
from standin import metal

pytestmark = pytest.mark.skipif(metal.why_not() is not None, reason=str(metal.why_not()))

# c = a @ b by tiles of 16x16 staged in threadgroup memory, four simdgroups of one 8x8 product each; then the
# sums of c's 8x8 blocks through device memory.
HEADER = """
#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;
constant constexpr int TILE = 16;
constant constexpr int PAD = 20;
float halved(float x) { return 0.5f * x; }
template <typename T>
METAL_FUNC void stage(threadgroup T* tile, const device T* from, int row, uint t) {
  for (uint i = t; i < TILE * TILE; i += 128)
    tile[i / TILE * PAD + i % TILE] = from[i / TILE * row + i % TILE];
}
"""
SOURCE = """
  threadgroup T As[TILE * PAD], Bs[TILE][PAD];
  const int K = a_shape[1], N = b_shape[1];
  const uint t = thread_index_in_threadgroup, sg = simdgroup_index_in_threadgroup;
  const int row = threadgroup_position_in_grid.y * TILE, col = threadgroup_position_in_grid.x * TILE;
  const int r = sg / 2 * 8, s = sg % 2 * 8;
  device float* sums_ = sums + (row * (N / TILE) + col) * 8;
  simdgroup_matrix<float, 8, 8> acc = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  for (int k = 0; k < K; k += TILE) {
    stage(As, a + row * K + k, K, t);
    stage(&Bs[0][0], b + k * N + col, N, t);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int j = 0; j < TILE; j += 8) {
      simdgroup_matrix<T, 8, 8> x, y;
      simdgroup_load(x, As + r * PAD + j, PAD);
      simdgroup_load(y, &Bs[j][s], PAD);
      simdgroup_multiply_accumulate(acc, x, y, acc);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  simdgroup_store(acc, c + (row + r) * N + col + s, N);
  sums_[t] = halved(acc.thread_elements()[0] + acc.thread_elements()[1]);
  threadgroup_barrier(mem_flags::mem_device);
  float total = 0;
  for (int i = 0; i < 32; i++) total += sums_[sg * 32 + (i + t) % 32];
  totals[(row / TILE * (N / TILE) + col / TILE) * 128 + t] = simd_max(total);
"""
M, K, N = 32, 48, 32
FIRST_BARRIER = (
    "stage(&Bs[0][0], b + k * N + col, N, t);\n    threadgroup_barrier(mem_flags::mem_threadgroup);"
)
LAST_BARRIER = "    }\n    threadgroup_barrier(mem_flags::mem_threadgroup);"
DEVICE_BARRIER = "threadgroup_barrier(mem_flags::mem_device);"


def product(edit=lambda text: text, threads=128, dtype=mx.float32, init_value=None, **options):
    """Run the kernel after `edit`; returns the error of c and of the totals."""
    header, source = edit((HEADER, SOURCE))
    kernel = metal.metal_kernel("product", ["a", "b"], ["c", "sums", "totals"], source, header)
    rng = np.random.default_rng(0)
    a, b = (mx.array(rng.standard_normal(s), dtype) for s in ((M, K), (K, N)))
    tiles = (M // 16) * (N // 16)
    with metal.options(**options):
        c, _, totals = kernel(
            inputs=[a, b], template=[("T", dtype)], grid=(N // 16 * threads, M // 16, 1),
            threadgroup=(threads, 1, 1), output_shapes=[(M, N), (tiles * 128,), (tiles * 128,)],
            output_dtypes=[mx.float32] * 3, init_value=init_value,
        )  # fmt: skip
    want = np.array(a.astype(mx.float32)).astype(np.float64) @ np.array(b.astype(mx.float32))
    eighths = want.reshape(M // 8, 8, N // 8, 8).sum((1, 3)) / 2  # what one simdgroup adds up
    eighths = eighths.reshape(M // 16, 2, N // 16, 2).transpose(0, 2, 1, 3)
    errors = np.abs(np.array(c) - want), np.abs(np.array(totals).reshape(-1, 32) - eighths.reshape(-1, 1))
    return max(e.max() for e in errors)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=["f32", "f16", "bf16"])
@pytest.mark.parametrize("schedule", metal.SCHEDULES)
@pytest.mark.parametrize("checked", [True, False], ids=["checked", "fast"])
def test_the_sound_kernel(dtype, schedule, checked):
    assert product(dtype=dtype, schedule=schedule, checked=checked, strict_writes=True) < 5e-5


@dataclass
class Mutant:
    name: str
    old: str
    new: str
    message: str
    silent: bool = True  # runs to its end where nothing watches
    error: type = metal.MetalError
    threads: int = 128
    count: int = 1


BUILD = {"silent": False, "error": metal.MetalCompileError}
NO_SPACE = "without an address space"
MUTANTS = [
    # Barriers and races
    Mutant(
        "no barrier after staging",
        FIRST_BARRIER,
        FIRST_BARRIER.split("\n")[0],
        "nothing has written yet|race",
    ),
    Mutant(
        "no barrier before restaging", LAST_BARRIER, "    }", "data race on threadgroup.*write after read"
    ),
    Mutant(
        "barrier without its flag",
        FIRST_BARRIER,
        FIRST_BARRIER.replace("_threadgroup)", "_device)"),
        "data race on threadgroup.*read after write",
    ),
    Mutant(
        "simdgroup barrier for a threadgroup's",
        LAST_BARRIER,
        LAST_BARRIER.replace("threadgroup_b", "simdgroup_b"),
        "data race on threadgroup",
    ),
    Mutant("no barrier on device memory", DEVICE_BARRIER, "", "nothing has written yet|race"),
    Mutant(
        "a sum for a barrier",
        DEVICE_BARRIER,
        "sums_[t] += simd_sum(0.0f);",
        "data race on device.*read after write",
    ),
    Mutant(
        "device barrier with the wrong flag",
        DEVICE_BARRIER,
        DEVICE_BARRIER.replace("device", "threadgroup"),
        "data race on device.*read after write",
    ),
    Mutant(
        "threadgroups write one place",
        "col = threadgroup_position_in_grid.x * TILE",
        "col = 0",
        "data race on device.*another threadgroup",
    ),
    Mutant(
        "a threadgroup reads another's output",
        "sums_[sg * 32",
        "(t == 0 && row == 16 ? sums : sums_)[sg * 32",
        "data race on device.*read after write.*another threadgroup",
    ),
    Mutant(
        "two threads write one place",
        "totals[(row",
        "totals[0] = total; totals[(row",
        "write different values",
    ),
    Mutant(
        "matrix stored and loaded without a barrier",
        "float total = 0;",
        "simdgroup_store(acc, As, 8); simdgroup_load(acc, As, 8); float total = 0;",
        "data race on threadgroup",
    ),
    # Divergence
    Mutant(
        "barrier that half the threads reach",
        DEVICE_BARRIER,
        f"if (t < 64) {DEVICE_BARRIER}",
        "divergent barrier|nothing has written yet",
        silent=False,
    ),
    Mutant(
        "two barriers in two branches",
        DEVICE_BARRIER,
        f"if (t < 64) {DEVICE_BARRIER} else {DEVICE_BARRIER}",
        "divergent barrier",
        silent=False,
    ),
    Mutant(
        "barrier in a loop of uneven length",
        DEVICE_BARRIER,
        f"for (uint i = 0; i <= t / 64; i++) {DEVICE_BARRIER}",
        "divergent barrier",
        silent=False,
    ),
    Mutant(
        "early return", "const int r =", "if (t >= 96) return; const int r =", "has returned", silent=False
    ),
    Mutant(
        "a lane skips a product",
        "simdgroup_multiply_acc",
        "if (t % 32 != 5) simdgroup_multiply_acc",
        "divergent simdgroup",
        silent=False,
    ),
    Mutant(
        "a lane skips a sum",
        "= simd_max(total)",
        "= t % 2 ? simd_max(total) : total",
        "divergent simdgroup",
        silent=False,
    ),
    Mutant(
        "lanes load different matrices",
        "r * PAD + j, PAD",
        "r * PAD + j, PAD + t % 2",
        "arguments that differ",
        silent=False,
    ),
    # Bounds
    Mutant(
        "device read past the end",
        "from[i / TILE * row + i % TILE]",
        "from[i / TILE * row + i % TILE + 1]",
        "out-of-bounds read of 4 bytes at byte offset 6144 of buffer `.`",
    ),
    Mutant(
        "device read before the start",
        "stage(As, a +",
        "stage(As, a - 1 +",
        "out-of-bounds read.*offset -4 of buffer `a`",
    ),
    Mutant("device write past the end", "* 128 + t] =", "* 128 + t + 1] =", "out-of-bounds write.*`totals`"),
    Mutant(
        "matrix stored past the end",
        "col + s, N);",
        "col + s + 1, N);",
        "out-of-bounds write of 32 bytes.*`c`",
    ),
    Mutant(
        "threadgroup read past the end",
        "As + r * PAD + j",
        "As + r * PAD + j + 176",
        "out-of-bounds threadgroup read",
    ),
    Mutant("threadgroup write past the end", "tile[i /", "tile[64 + i /", "out-of-bounds threadgroup write"),
    Mutant(
        "threadgroup index past the end",
        "&Bs[j][s]",
        "&Bs[j + 9][s]",
        "bounds of a fixed-size array|out-of-bounds",
    ),
    Mutant(
        "private index past the end",
        "float total = 0;",
        "float z[4]; z[sg + 1] = 0; float total = z[sg + 1];",
        "bounds of a fixed-size array",
    ),
    Mutant(
        "member index past the end",
        "float total = 0;",
        "struct { float of[4]; } z; z.of[sg + 1] = 0; float total = z.of[sg + 1];",
        "bounds of a fixed-size array",
    ),
    Mutant(
        "write to an input",
        "float total = 0;",
        "((device T*)a)[t] = 0; float total = 0;",
        "write to input buffer `a`",
    ),
    Mutant(
        "misaligned vector",
        "float total = 0;",
        "float total = 0 * (*(const device float4*)(sums_ + 1)).x;",
        "misaligned read",
    ),
    # Values that nobody wrote
    Mutant("half a tile staged", "i < TILE * TILE", "i < TILE * TILE / 2", "nothing has written yet"),
    Mutant(
        "outputs never written",
        "* 128 + t] =",
        "* 128 + t / 2 * 2] =",
        "`totals`: 256 elements never written",
    ),
    Mutant(
        "output read before it is written",
        "float total = 0;",
        "float total = 0 * totals[0];",
        "nothing has written yet",
    ),
    # Limits
    Mutant(
        "40 KiB of threadgroup memory",
        "As[TILE * PAD]",
        "As[TILE * PAD + 9600]",
        "bytes of threadgroup memory",
        silent=False,
    ),
    Mutant("1,056 threads", "128", "1056", "1056 threads", silent=False, threads=1056),
    Mutant("endless loop", "k += TILE", "k += 0", "did not finish", silent=False, error=metal.MetalTimeout),
    Mutant(
        "division by zero",
        "float total = 0;",
        "float total = 0 * (K / (int)(t - 9));",
        "division by zero",
        silent=False,
    ),
    # What Metal's compiler refuses
    Mutant("device left out", "const device T* from", "const T* from", "no matching function", **BUILD),
    Mutant("threadgroup left out", "threadgroup T* tile", "T* tile", "no matching function", **BUILD),
    Mutant(
        "thread left out",
        "float total = 0;",
        "float total = 0; float* p = &total; *p = 0;",
        NO_SPACE,
        **BUILD,
    ),
    Mutant(
        "reference without a space",
        "float halved(float x)",
        "float halved(const float& x)",
        NO_SPACE,
        **BUILD,
    ),
    Mutant(
        "wrong space", "const device T* from", "const threadgroup T* from", "no matching function", **BUILD
    ),
    Mutant(
        "threadgroup pointer to device memory",
        "float total = 0;",
        "float total = 0; threadgroup float* p = c;",
        "cannot initialize",
        **BUILD,
    ),
    Mutant("double", "float total = 0;", "double total = 0;", "no double", **BUILD),
    Mutant(
        "recursion", "return 0.5f * x;", "return x > 9 ? halved(x / 2) * 2 : 0.5f * x;", "recursion", **BUILD
    ),
    Mutant(
        "silent conversion to bfloat",
        "float total = 0;",
        "float total = 0; bfloat16_t z = total;",
        "no implicit",
        **BUILD,
    ),
    Mutant(
        "threadgroup initialiser",
        "Bs[TILE][PAD];",
        "Bs[TILE][PAD]; threadgroup float z = 0;",
        "no initialiser",
        **BUILD,
    ),
    Mutant(
        "threadgroup array in a helper",
        "{ return 0.5f",
        "{ threadgroup float z[2]; return 0.5f",
        "kernel functions only",
        **BUILD,
    ),
    Mutant("std::", "halved(acc", "std::exp(acc", "no std::", **BUILD),
    Mutant(
        "write to a const pointer",
        "float total = 0;",
        "float total = 0; a[t] = 0;",
        "not assignable",
        **BUILD,
    ),
    Mutant("unknown name", "halved(acc", "doubled(acc", "undeclared identifier", **BUILD),
]


def edited(mutant):
    def edit(texts):
        assert sum(t.count(mutant.old) for t in texts) >= 1, f"{mutant.name}: the edit does not apply"
        return [t.replace(mutant.old, mutant.new) for t in texts]

    return edit


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_mutant_is_caught(mutant):
    with pytest.raises(mutant.error, match=f"(?s){mutant.message}"):
        product(edited(mutant), mutant.threads, time_limit=2)


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m.silent], ids=lambda m: m.name)
def test_it_runs_to_its_end_unwatched(mutant):
    product(edited(mutant), mutant.threads, init_value=0, checked=False)
