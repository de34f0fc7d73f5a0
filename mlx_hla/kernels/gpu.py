"""The GPUs that the kernels run on: each one's name, its maker of kernels, and how it differs from others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import mlx.core as mx

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class GPU:
    """name: what `backend` calls it; title: what people do. chip: what it is, in words.

    maker_name: the function of `mx.fast` that builds a kernel. suffix: of the files in metal/ whose sections
    take the place of those of *.metal. rounds: calls in bfloat16 have a variant of their own. bounds: its
    compiler is told how many threads a threadgroup has, and how many of these a core is to have room for.
    heads_first: the heads are the grid's x axis, not its z. unasked_from: so many tokens of a call, a step's
    one among them, and `backend=None` takes its kernels.
    core_bytes: threadgroup memory of a core. per_core: threadgroups that keep one busy; fill: those that keep
    a GPU busy whose cores are unknown. min_block: tokens of the shortest block, for each one's states are
    written and read.
    """

    name: str
    title: str
    chip: str
    maker_name: str
    core_bytes: int
    per_core: int
    fill: int
    min_block: int
    suffix: str = ".metal"
    rounds: bool = False
    bounds: bool = False
    heads_first: bool = False
    unasked_from: int = 1

    def maker(self) -> Callable:
        return getattr(mx.fast, self.maker_name)

    def grid(self, threads: Grid, threadgroup: Grid) -> Grid:
        """The grid as this GPU counts it. Axes other than x have threadgroups of one thread."""
        if not self.heads_first:
            return threads
        width = threadgroup[0]
        return threads[2] * width, threads[1], threads[0] // width


# core_bytes: of an M1 by philipturner's metal-benchmarks, taken for all; the least of NVIDIA's from 8.0 on,
# by its programming guide. per_core of an Apple GPU is a guess from that: it has room for 1 to 5 threadgroups
# of the sequence kernels.
# On CUDA the kernels were measured to be 3 to 6 times as fast as compiled plain ops from 1,024 tokens on, the
# shortest measured, and to compile in a third of the time (HLA2, 16 heads of 64, metal/README.md); steps are
# not faster. min_block there: HLA2's forward on 4,096 tokens takes 0.136, 0.142, 0.125, 0.122 and 0.146 ms by
# blocks of 64, 96, 128, 192 and 256; with the backward 128 and 192 are equal, and best (an H200).
METAL = GPU(
    "metal",
    "Metal",
    "an Apple GPU",
    "metal_kernel",
    core_bytes=60 * 1024,
    per_core=3,
    fill=64,
    min_block=256,
)
CUDA = GPU(
    "cuda",
    "CUDA",
    "an NVIDIA GPU of compute capability 8.0 or later",
    "cuda_kernel",
    core_bytes=100 * 1024,
    per_core=4,
    fill=512,
    min_block=128,
    suffix=".cuh",
    rounds=True,
    bounds=True,
    heads_first=True,
    unasked_from=1024,
)
GPUS = (METAL, CUDA)


def here() -> GPU | None:
    """The GPU that is MLX's default device, or None where that is none, or one too old."""
    if mx.default_device() != mx.gpu:
        return None
    if mx.metal.is_available():
        return METAL
    return CUDA if mx.cuda.is_available() and _capability() >= 8 else None


# Cores by what MLX calls a GPU, less "Apple" and "NVIDIA": of a chip that is sold with several counts, the
# most, for MLX does not tell. As the makers' specifications are remembered, not looked up one by one: a wrong
# count costs time, never a number.
CORES = {
    **{"M1": 8, "M1 Pro": 16, "M1 Max": 32, "M1 Ultra": 64},
    **{"M2": 10, "M2 Pro": 19, "M2 Max": 38, "M2 Ultra": 76},
    **{"M3": 10, "M3 Pro": 18, "M3 Max": 40, "M3 Ultra": 80},
    **{"M4": 10, "M4 Pro": 20, "M4 Max": 40},
    **{"M5": 10, "M5 Pro": 20, "M5 Max": 40},
    **{"A100": 108, "H100": 132, "H200": 132, "GH200": 132, "B200": 148, "L40": 142, "L40S": 142},
}
# Of a later Apple chip, a guess by the last letter of its architecture, "applegpu_g17s": as MLX's own kernels
# read it, phones, plain and Pro, Max, Ultra.
CORES_BY_SIZE = {"p": 6, "g": 10, "s": 40, "d": 80}


def cores_of(info: Mapping[str, str | int]) -> int | None:
    """Cores of the GPU that `mx.device_info` tells of, or None where nothing is known of it."""
    name, architecture = str(info.get("device_name", "")), str(info.get("architecture", ""))
    make, _, model = name.partition(" ")
    if make == "Apple" and architecture.startswith("applegpu"):
        return CORES.get(model) or CORES_BY_SIZE.get(architecture[-1])
    words = model.split()  # "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"
    return CORES.get(words[0].partition("-")[0]) if make == "NVIDIA" and words else None


@cache
def _info(device: str) -> Mapping[str, str | int]:
    return mx.device_info()


def cores() -> int | None:
    """Cores of MLX's default device."""
    return cores_of(_info(str(mx.default_device())))


def language() -> GPU:
    """The GPU whose language kernels are written in: that which is here, else Metal's."""
    return here() or METAL


def _capability() -> int:
    return int(_info(str(mx.default_device())).get("compute_capability_major", 0))
