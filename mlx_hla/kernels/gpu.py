"""The GPUs that the kernels run on: each one's name, its maker of kernels, and how it differs from others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import mlx.core as mx

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class GPU:
    """name: what `backend` calls it; title: what people do. chip: what it is, in words.

    maker_name: the function of `mx.fast` that builds a kernel. words: the file in metal/ whose sections take
    the place of those of tiles.metal, if any. rounds: calls in bfloat16 have a variant of their own.
    heads_first: the heads are the grid's x axis, not its z. unasked: `backend=None` takes its kernels.
    """

    name: str
    title: str
    chip: str
    maker_name: str
    words: str | None = None
    rounds: bool = False
    heads_first: bool = False
    unasked: bool = True

    def maker(self) -> Callable:
        return getattr(mx.fast, self.maker_name)

    def grid(self, threads: Grid, threadgroup: Grid) -> Grid:
        """The grid as this GPU counts it. Axes other than x have threadgroups of one thread."""
        if not self.heads_first:
            return threads
        width = threadgroup[0]
        return threads[2] * width, threads[1], threads[0] // width


# On CUDA compiled plain ops are on a par with the kernels at 65,536 tokens and faster at 4,096 (HLA2, 16
# heads of 64, metal/README.md), and every process compiles what it uses of the kernels for seconds.
METAL = GPU("metal", "Metal", "an Apple GPU", "metal_kernel")
CUDA = GPU(
    "cuda",
    "CUDA",
    "an NVIDIA GPU of compute capability 8.0 or later",
    "cuda_kernel",
    "tiles.cuh",
    rounds=True,
    heads_first=True,
    unasked=False,
)
GPUS = (METAL, CUDA)


def here() -> GPU | None:
    """The GPU that is MLX's default device, or None where that is none, or one too old."""
    if mx.default_device() != mx.gpu:
        return None
    if mx.metal.is_available():
        return METAL
    return CUDA if mx.cuda.is_available() and _capability() >= 8 else None


def language() -> GPU:
    """The GPU whose language kernels are written in: that which is here, else Metal's."""
    return here() or METAL


@cache
def _capability() -> int:
    return int(mx.device_info().get("compute_capability_major", 0))
