"""Block sizes and schedules: one table, with what each entry needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from . import gpu

THREADGROUP_BYTES = 32 * 1024
SPARE = 256  # bytes of a threadgroup that a step leaves free, for alignment
TINY = 1e-30  # stands for a decay of 0 where its gradient divides by it
MAX_DIM = 128
STRIPE = 2  # fragments of 8 columns that a simdgroup owns
SCANNED, CUDA_SCANNED = 4, 1  # elements of a state that a thread of a scan owns


def _on_cuda() -> bool:
    return gpu.language() is gpu.CUDA


def scanned() -> int:
    return CUDA_SCANNED if _on_cuda() else SCANNED


def fill() -> int:
    """Threadgroups that keep this GPU busy; fewer heads than this are cut into blocks."""
    device, cores = gpu.language(), gpu.cores()
    return device.fill if cores is None else device.per_core * cores


def min_block() -> int:
    """Tokens of the shortest block."""
    return gpu.language().min_block


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def tile_bytes(rows: int, dim: int, dtype: mx.Dtype) -> int:
    """A staged tile of `rows` tokens, padded to whole fragments and against bank conflicts."""
    return rows * (8 * ceil_div(dim, 8) * dtype.size + 16)


@dataclass(frozen=True)
class Blocks:
    """How a sequence is cut: `count` blocks of `length` tokens, walked in chunks of `width`."""

    length: int
    count: int


def chunk_bytes(width: int, staged: list[tuple[int, mx.Dtype]]) -> int:
    """Threadgroup bytes of a chunk's staged tiles (dim, dtype), its scores and its decay."""
    return 4 * width * (width + 4) + 16 * width + sum(tile_bytes(width, *tile) for tile in staged)


def staged_width(staged: list[tuple[int, mx.Dtype]], room: int = THREADGROUP_BYTES) -> int:
    """32 tokens to a chunk where that fits the room, else 16."""
    for width in (32, 16):
        if chunk_bytes(width, staged) <= room:
            return width
    raise ValueError(f"no chunk width fits {staged}")


def blocks(T: int, heads: int, length: int | None = None) -> Blocks:
    """As few blocks as fill the GPU with threadgroups, none shorter than `min_block` tokens."""
    if length is None:
        want = ceil_div(fill(), heads)
        length = max(min_block(), 32 * ceil_div(T, 32 * want))
    return Blocks(length, ceil_div(T, length))


# Stripe (in fragments of 8 columns) of the kernels that keep two states in registers, or three (HLA3), by the
# larger width: two states of 64 x 16 floats are 64 registers of a thread, of 96 x 8 they are 48. At 128 they
# and 512 threads overrun the register file, so wider heads run pass by pass. So do three of 96: on CUDA a
# thread would take up to 194 registers, of 168. There a stripe of one fragment leaves half of an instruction
# empty, and half as many threads may have 255 registers each.
TWO_STATES, CUDA_TWO_STATES = ((64, 2), (96, 1)), ((96, 2),)
FUSED = {"hla2": TWO_STATES, "ahla": TWO_STATES, "hla3": ((80, 1),)}
CUDA_FUSED = {"hla2": CUDA_TWO_STATES, "ahla": CUDA_TWO_STATES, "hla3": ((64, 2), (80, 1))}


def fused(family: str | None, width: int) -> int | None:
    """The stripe of the kernels that run the family's passes in one walk, None where there are none."""
    table = CUDA_FUSED if _on_cuda() else FUSED
    return next((stripe for limit, stripe in table.get(family or "", ()) if width <= limit), None)


def sums_stripe(values: bool, squares: bool) -> int:
    """The stripe of the kernel that adds up what blocks add to a state, to a symmetric one, or to both."""
    return 1 if values and squares and not _on_cuda() else STRIPE


RESIDENT = 3  # threadgroups with two states that a core is to have room for: one computes while others wait


def wide_chunk(dim: int, dtype: mx.Dtype) -> int:
    """Chunk width of a kernel that stages q, k and a float32 K̃.

    On an Apple GPU a chunk of 32 tokens of 64 columns leaves room for two threadgroups of 4 simdgroups to a
    core, too few to hide what they wait for; of 16 tokens five fit, with a tenth less arithmetic in all.
    """
    staged = [(dim, dtype), (dim, dtype), (dim, mx.float32)]
    room = max(gpu.language().core_bytes // RESIDENT, chunk_bytes(16, staged))
    return staged_width(staged, min(room, THREADGROUP_BYTES))


MAX_GROUP = 16  # query heads per key-value head that one step keeps sums for in registers


def step_bytes(D: int, DV: int, groups: int, simdgroups: int) -> int:
    """Threadgroup bytes of the largest step kernel."""
    M = max(D, DV)
    return 4 * (2 * groups * (D + 1) + D + 2 * DV + simdgroups * M + groups * DV) + 64


def step_simdgroups(D: int, DV: int, groups: int) -> int:
    """Simdgroups of a step's threadgroup: four rows of a state each, as far as their sums fit.

    A pipeline's limit of threads falls with its registers, and MLX cannot ask for more; 384 always launch.
    """
    want = min(12 if groups * max(D, DV) >= 12 * 128 else 16, max(1, D // 4))
    while want > 1 and step_bytes(D, DV, groups, want) > THREADGROUP_BYTES - SPARE:
        want -= 1
    return want


# Columns of a head up to which one threadgroup walks back over all of them: its two states take two
# simdgroups for every 16 columns. 96 are 384 threads, which on CUDA want 190 registers each, of 170.
UNDIVIDED, CUDA_UNDIVIDED = 96, 64


# Chunks to a state that the backward keeps for the decay's gradient, by the bytes of the smallest operand's
# numbers. One for every chunk is as many bytes as four half tensors at D = 64. Where there are fewer, sums
# are followed from chunk to chunk by subtraction (backward.metal), which costs digits that half types lack.
KEEP = {2: 8, 4: 1}


@dataclass(frozen=True)
class Back:
    """Shape of a pass's backward: width of a chunk, tokens to a state that is kept, stripe, and threadgroups
    that divide the columns of a head."""

    width: int
    keep: int
    stripe: int
    halves: int


def back_bytes(width: int, dims: list[tuple[int, mx.Dtype]], halves: int) -> int:
    """Threadgroup bytes of the backward walk: its staged tiles, two matrices of scores, parts of dg."""
    widest = max(dim for dim, _ in dims)
    simdgroups = ceil_div(ceil_div(widest, 8), STRIPE * halves)
    tiles = sum(tile_bytes(width, widest, dtype) for _, dtype in dims)
    sums = 4 * (width * (width // 4 + 9 + simdgroups) + simdgroups)
    return tiles + 8 * width * (width + 4) + 16 * width + sums + 64


def back_shape(*staged: tuple[int, mx.Dtype]) -> Back:
    """The widest chunk whose staged tiles (dim, dtype) fit.

    Above `UNDIVIDED` columns two threadgroups share the head: with 128, one would be 512 threads with 80
    registers of tiles each.
    """
    dims = list(staged)
    halves = 1 if max(dim for dim, _ in dims) <= (CUDA_UNDIVIDED if _on_cuda() else UNDIVIDED) else 2
    for width in (32, 16, 8):
        if back_bytes(width, dims, halves) <= THREADGROUP_BYTES:
            keep = KEEP[min(dtype.size for _, dtype in dims)]
            return Back(width, keep * width, STRIPE, halves)
    raise ValueError(f"no chunk width fits {staged}")


MIN_CHUNK = 16  # tokens, see `worthwhile`


def worthwhile(D: int, DV: int, dtype: mx.Dtype) -> bool:
    """The rule by which unproved kernels are taken for a sequence that they serve (for a step always).

    Both paths make the same products. The kernels read a tile once a pass where the ops write scores,
    running products and chunk states to memory between their launches, so they move fewer bytes in fewer
    launches at every length and head count. What they can lose by is a short chunk: four barriers and the
    decay's sums for each. So: wherever a chunk of the backward, which stages the most, has `MIN_CHUNK`
    tokens, which is everywhere but in float32 above 104 columns. Reasoned from counts, not timed: where
    kernels are proved before they are taken, what was timed on the device goes before it.
    """
    return back_shape((D, dtype), (D, dtype), (DV, dtype), (DV, dtype)).width >= MIN_CHUNK


# Registers. Of a thread, a tile takes 2 for every 8 x 8 fragment that its simdgroup holds. A thread has 128
# of 32 bits, and about 104 where a threadgroup has 512 threads (208 KiB to a core); a kernel that wants
# more spills, or its launch fails. So no sequence kernel has more than `MAX_THREADS`, and none holds more
# than `REGISTERS` in tiles: the rest is for fragments in flight, addresses and sums.
REGISTERS, MAX_THREADS = 96, 384


def tile_registers(dim: int, stripe: int, states: int, width: int, tiles: int) -> int:
    """Of a thread whose simdgroup holds `states` of dim rows and `tiles` of `width` tokens, a stripe wide."""
    return 2 * stripe * (states * ceil_div(dim, 8) + tiles * width // 8)


# On CUDA a core has 65,536 registers, and hides what its threads wait for by having many of them: 512 have
# 128 each, which is enough for the sequence kernels in bfloat16 up to this width, but for a walk of AHLA and
# for HLA3's three states. Elsewhere one threadgroup is to fit.
CORE_THREADS, CORE_THREADS_ROUTED, CORE_THREADS_THIRD, BOUNDED = 512, 384, 256, 64


def resident(threads: int, dtypes: Iterable[mx.Dtype], template: Mapping[str, Any]) -> int | None:
    """Threadgroups that a core is to have room for of a sequence kernel, None of another one."""
    if "NC" not in template:
        return None
    widest = max(template[name] for name in ("D", "DV", "DY", "DZ") if name in template)
    if mx.bfloat16 not in dtypes or widest > BOUNDED:
        return 1
    if template.get("THIRD"):
        return CORE_THREADS_THIRD // threads
    walks = "THIRD" in template and "TK" not in template
    return (CORE_THREADS_ROUTED if walks else CORE_THREADS) // threads


# Watchdog: macOS stops a launch that holds the GPU for seconds. One walk of a head of 64 x 64 costs about
# 64 kflop a token, so 2^22 (token, head) pairs are 0.27 Tflop: a fifth of a second on an M1 (2.6 Tflop/s)
# at half its peak. Longer calls are cut along T into launches of at most that much.
LAUNCH_WORK = 2**22 * 64 * 64

# Memory: a decay's gradient keeps float32 states of the pass that is gone through. So many bytes at most:
# 131,072 tokens of 16 heads of 64, one every 16.
KEPT_BYTES = 2**31


def segments(heads: int, T: int, D: int, DV: int, kept_every: int | None = None) -> list[slice]:
    """Stretches of T, each of at most `LAUNCH_WORK` token-heads times D times the larger width.

    kept_every: tokens to a state that the backward keeps if the decay's gradient may be wanted, so that no
    stretch may keep more than `KEPT_BYTES`.
    """
    most = LAUNCH_WORK // (heads * D * max(D, DV))
    if kept_every:
        most = min(most, kept_every * KEPT_BYTES // (4 * heads * D * max(D, DV)))
    least = min_block()
    most = max(least, most // least * least)
    return [slice(t, min(T, t + most)) for t in range(0, T, most)] if most < T else [slice(None)]
