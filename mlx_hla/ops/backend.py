"""Which backend serves a call: the Metal kernels or the plain MLX ops."""

from __future__ import annotations

from .checks import Call, fail


def use_metal(call: Call, backend: str | None) -> bool:
    """True where the Metal kernels take the call; raises where they are asked for and cannot."""
    if backend not in (None, "mlx", "metal"):
        fail(call.op, "backend must be None, 'mlx' or 'metal'", repr(backend))
    if backend == "metal":
        fail(call.op, "backend 'metal' needs an Apple GPU", "a device without Metal")
    return False
