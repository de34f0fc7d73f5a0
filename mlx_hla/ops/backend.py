"""Which backend serves a call: the Metal kernels (`mlx_hla.kernels`) or the plain MLX ops.

`backend=None` takes the kernels where `kernels.prefers` says so: on an Apple GPU, for every call that
`kernels.why_not` does not refuse. The environment variable MLX_HLA_BACKEND=mlx turns them off.
`backend="metal"` raises where they cannot serve; nothing falls back in silence.
"""

from __future__ import annotations

import os

import mlx.core as mx

from .. import kernels
from ..kernels.steps import MATRICES, NORMALISERS
from .checks import Call, fail

Pair = tuple[mx.array, "mx.array | None"]


def divide(call: Call, o: mx.array) -> mx.array:
    """o in the dtype of q; normalising, its last column is the denominator (Eq. 3.4)."""
    if call.ones is None:
        return o.astype(call.q.dtype)
    o = o.astype(mx.float32)
    num, den = o[..., :-1], o[..., -1:] + call.eps
    if call.mask is not None:  # with ε = 0 a masked token is 0 / 0, and so is its gradient
        den = mx.where(call.mask[..., None, None], den, 1.0)
    return (num / den).astype(call.q.dtype)


def _why_not(call: Call, family: str | None) -> str | None:
    if not kernels.metal_available():
        return "MLX's default device is not an Apple GPU"
    if family is None:
        return "this variant of the operator has no kernel"
    return kernels.why_not(family, call.q, call.k, call.v, normalize=call.ones is not None)


def _chosen(call: Call, family: str | None, backend: str | None) -> bool:
    if backend not in (None, "mlx", "metal"):
        fail(call.op, "backend must be None, 'mlx' or 'metal'", repr(backend))
    if backend == "mlx" or (backend is None and os.environ.get("MLX_HLA_BACKEND") == "mlx"):
        return False
    why = _why_not(call, family)
    if backend == "metal" and why:
        raise ValueError(f"[{call.op}] backend 'metal' cannot serve this call: {why}")
    normalize = call.ones is not None
    return not why and (
        backend == "metal" or kernels.prefers(family, call.q, call.k, call.v, normalize=normalize)
    )


def on_metal(
    call: Call, family: str | None, backend: str | None, state: list[Pair] | None, **options
) -> tuple[mx.array, list[Pair]] | None:
    """(o, state) from the kernels, or None where the MLX ops serve the call.

    family is the kernels' name of the operator, None for a variant that has no kernel. state holds, for
    each array of the kernel's state, the public array and its normaliser (None where there is none).
    """
    if not _chosen(call, family, backend):
        return None
    if call.q.ndim == 3:
        return _step(call, family, state, options)
    q, k, v = call.q, call.k, call.v
    if call.ones is not None:  # the operator on [v, 1]; a quotient of float16 sums would overflow first
        v = mx.concatenate([v, call.ones], axis=-1)
        if q.dtype == mx.float16:
            q, k, v = (x.astype(mx.float32) for x in (q, k, v))
    arrays = None
    if state is not None:
        arrays = tuple(x if n is None else mx.concatenate([x, n[..., None]], axis=-1) for x, n in state)
    options["decay_gradient"] = call.decay_gradient
    o, arrays = getattr(kernels, family)(q, k, v, call.g, arrays, scale=call.scale, **options)
    pairs = [(x, None) for x in arrays]
    if call.ones is not None:  # every state but S holds values
        keys_only = {"hla2", "hla3"}
        pairs = [
            (x, None) if family in keys_only and i == 0 else (x[..., :-1], x[..., -1])
            for i, x in enumerate(arrays)
        ]
    return divide(call, o), pairs


def _step(call: Call, family: str, state: list[Pair] | None, options: dict) -> tuple[mx.array, list[Pair]]:
    """One token. The kernel takes the normalisers as they are and divides, so nothing is joined or copied."""
    arrays = None
    if state is not None:
        arrays = (*(x for x, _ in state), *(n for _, n in state if n is not None))
    eps = None if call.ones is None else call.eps
    o, arrays = kernels.step(
        family, call.q, call.k, call.v, call.g, arrays, scale=call.scale, eps=eps, **options
    )
    names = MATRICES[family]
    vectors = dict(zip(NORMALISERS[family], arrays[len(names) :], strict=False))  # none without eps
    return o, [(x, vectors.get(name)) for name, x in zip(names, arrays, strict=False)]
