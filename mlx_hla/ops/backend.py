"""Runs an operator: checks, the choice of a backend, its composition where that says.

`backend=None` takes the kernels where they have proved themselves (`proof`): for sequences that
`kernels.why_not` does not refuse, and for one token where the operator has a kernel for it; on an NVIDIA GPU
for sequences of `GPU.unasked_from` tokens and more, and with MLX_HLA_BACKEND=cuda in the environment for all.
MLX_HLA_BACKEND=mlx turns them off. `backend="metal"` and "cuda" raise where they cannot serve; nothing falls
back in silence.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from mlx_hla.errors import InputError

from .. import kernels
from . import on_kernels, proof
from .checks import Call, canonical, canonical_step, choice
from .operator import Operator
from .parallel import alike
from .places import Sequence, Token

BACKENDS = (None, "mlx", *(device.name for device in kernels.GPUS))


def _why_not(call: Call, backend: str | None, here: kernels.gpu.GPU | None) -> str | None:
    for device in kernels.GPUS:
        if backend == device.name and here is not device:
            return f"MLX's default device is not {device.chip}"
    return kernels.why_not(call.q, call.k, call.v)


def _preferred(operator: Operator, call: Call) -> bool:
    """The rule for `backend=None` among the calls that the kernels serve."""
    dims = call.dims
    if call.q.ndim == 3 and not kernels.steps(operator.family, dims.Hq // dims.Hkv):
        return False
    if proof.asked_for():
        return proof.trusted(operator, call)
    return call.q.ndim == 3 or kernels.worthwhile(
        dims.D, dims.Dv + call.normalize, on_kernels.run_dtype(operator, call)
    )


def _by_kernels(operator: Operator, call: Call, backend: str | None) -> bool:
    choice(call.op, "backend", backend, BACKENDS)
    wish = os.environ.get("MLX_HLA_BACKEND", "")
    if wish and wish not in BACKENDS:
        names = ", ".join(filter(None, BACKENDS))
        raise InputError(
            f"the environment variable MLX_HLA_BACKEND must be one of {names} or unset, got {wish[:60]!r}"
        )
    here = kernels.gpu.here()
    if backend == "mlx":
        return False
    if backend is None:
        tokens = call.q.shape[1] if call.q.ndim == 4 else 1
        if here is None or wish == "mlx" or (wish != here.name and tokens < here.unasked_from):
            return False
    why = _why_not(call, backend, here)
    if backend and why:
        raise ValueError(f"[{call.op}] backend {backend!r} cannot serve this call: {why}")
    return not why and (backend is not None or _preferred(operator, call))


def sequence(
    operator: Operator,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    initial_state: Any = None,
    own: Mapping[str, Any] | None = None,
    *,
    backend: str | None = None,
    **shared: Any,
) -> tuple[mx.array, Any]:
    """(o, state) of an operator over a sequence; own: its own options, shared: those of all operators."""
    call = canonical(operator.name, q, k, v, operator.options, own, **shared)
    if call.group is not None:
        alike(call.op, call.group, {"variant": operator.key, **_kind(call, initial_state, **shared)})
    state = operator.check(call, initial_state)
    place = on_kernels.KernelSequence if _by_kernels(operator, call, backend) else Sequence
    return place(operator, call, state).run()


def _kind(call, initial_state, decay=None, segment_ids=None, **_) -> dict[str, object]:
    """What all ranks of a group must have the same of, by name: arrays by their number of axes."""
    there = {"initial_state": initial_state, "segment_ids": segment_ids}
    own = {"decay": decay, "scale": call.scale, "eps": call.eps, **call.options}
    return {
        **call.dims._asdict(),
        "dtype": call.q.dtype,
        "normalize": call.normalize,
        **{name: f"{x.ndim} axes" if isinstance(x, mx.array) else x for name, x in own.items()},
        **{name: "one" if x is not None else "none" for name, x in there.items()},
    }


def step(
    operator: Operator,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    state: Any = None,
    own: Mapping[str, Any] | None = None,
    *,
    backend: str | None = None,
    **shared: Any,
) -> tuple[mx.array, Any]:
    """(o, state) of an operator for one token."""
    call = canonical_step(f"{operator.name}_step", q, k, v, operator.options, own, **shared)
    state = operator.check(call, state)
    if _by_kernels(operator, call, backend):
        return on_kernels.one_token(operator, call, state)
    return Token(operator, call, state).run()
