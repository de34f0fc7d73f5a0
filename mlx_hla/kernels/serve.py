"""What the kernels serve: the machine, the shapes, and the rule that chooses them."""

from __future__ import annotations

import mlx.core as mx

from .plan import MAX_DIM, MAX_GROUP, worthwhile

FAMILIES = ("linear", "hla2", "ahla", "hla3")
DTYPES = (mx.float16, mx.bfloat16, mx.float32)


def metal_available() -> bool:
    """True where MLX's default device is an Apple GPU."""
    return mx.metal.is_available() and mx.default_device() == mx.gpu


def why_not(family: str, q: mx.array, k: mx.array, v: mx.array, *, normalize: bool = False) -> str | None:
    """Why the kernels do not serve this call (shapes of a sequence or of one token), or None if they do."""
    if family not in FAMILIES:
        return f"there is no kernel for {family}, only for {', '.join(FAMILIES)}"
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        got = f"{q.dtype}, {k.dtype}, {v.dtype}"
        return f"q, k and v must share one of float16, bfloat16, float32; they are {got}"
    D, DV = q.shape[-1], v.shape[-1]
    if not 8 <= D <= MAX_DIM or not 8 <= DV <= MAX_DIM or D % 8 or DV % 8:
        return f"head and value dimensions must be multiples of 8 up to {MAX_DIM}; they are {D} and {DV}"
    groups = q.shape[-2] // k.shape[-2]
    if q.ndim == 3 and groups > MAX_GROUP:
        return f"a step serves at most {MAX_GROUP} query heads per key-value head, here {groups}"
    return None


def prefers(family: str, q: mx.array, k: mx.array, v: mx.array, *, normalize: bool = False) -> bool:
    """The rule for `backend=None`: the kernels where they serve the call and `plan.worthwhile` says so."""
    if why_not(family, q, k, v, normalize=normalize) is not None:
        return False
    return q.ndim == 3 or worthwhile(q.shape[-1], v.shape[-1] + normalize, q.dtype)
