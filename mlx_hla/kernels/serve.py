"""What the kernels serve: the machine and the shapes. Which calls they are taken for: `plan.worthwhile`."""

from __future__ import annotations

import mlx.core as mx

from .plan import MAX_DIM, MAX_GROUP, fused

DTYPES = (mx.float16, mx.bfloat16, mx.float32)
STEPS = ("linear", "hla2", "ahla", "hla3")  # families that metal/step.metal has a kernel for


def why_not(q: mx.array, k: mx.array, v: mx.array) -> str | None:
    """Why the kernels do not serve this call (shapes of a sequence or of one token), or None if they do."""
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        got = f"{q.dtype}, {k.dtype}, {v.dtype}"
        return f"q, k and v must share one of float16, bfloat16, float32; they are {got}"
    D, DV = q.shape[-1], v.shape[-1]
    if not 8 <= D <= MAX_DIM or not 8 <= DV <= MAX_DIM or D % 8 or DV % 8:
        return f"head and value dimensions must be multiples of 8 up to {MAX_DIM}; they are {D} and {DV}"
    return None


def fuses(family: str | None, D: int, DV: int) -> bool:
    """Whether a kernel of its own runs the family over a sequence; elsewhere it is passes of `linear`."""
    return fused(family, max(D, DV)) is not None


def steps(family: str | None, groups: int) -> bool:
    """Whether one launch steps the family by a token, `groups` query heads to a key-value head."""
    return family in STEPS and groups <= MAX_GROUP
