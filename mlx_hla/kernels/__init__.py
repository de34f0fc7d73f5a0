"""GPU kernels for the operators, by `mx.fast.metal_kernel` or `cuda_kernel`. They know arrays, not options.

The interface for `mlx_hla.ops`:

    o, P = kernels.linear(q, k, v, g, P, scale=1.0, power=1)               one pass LA_{g^power}
    o, S, F = kernels.FUSED["hla2"](q, k, v, g, S, F, scale=1.0, ridge=0.0)     where `fuses("hla2", D, DV)`
    o, P, E = kernels.FUSED["ahla"](q, k, v, g, P, E, scale=1.0)                and so on
    o, S, P, F = kernels.FUSED["hla3"](q, k, v, g, S, P, F, scale=1.0)
    o, matrices, vectors = kernels.step(family, q, k, v, g, matrices, vectors, scale=1.0, ..)    one token

- q `[B, T, Hq, D]`, k `[B, T, Hkv, D]`, v `[B, T, Hkv, DV]`, float16, bfloat16 or float32, any strides;
  a step takes them without T. g is None or float32 `[Hkv]` or `[B, T, Hkv]` (`[B, Hkv]` in a step).
  States are float32, S and P `[B, Hkv, ..]`, F and E `[B, Hq, ..]`.
- Masks and segments come folded in, as `ops.checks.canonical` does: q = k = v = 0 and g = 1 at a masked
  token, g = 0 at the first token of a segment. Normalising: append a column of ones to v and divide; DV
  need not be a multiple of 8. A step does that itself if it gets the normalisers as vectors.
- `linear` and FUSED are differentiable in all their arrays, through o and the returned states. `linear`
  takes operands of different dtypes and head counts and any decay power, so that every operator can be
  composed of it. `step` is the launch alone.
- A step of hla2 or hla3 with `packed=True` takes and returns the symmetric S as its upper triangle,
  `pack(S)` `[B, Hkv, D (D + 1) / 2]`; `unpack` is the inverse. Nearly half of S's bytes less.

`gpu.here()` is the GPU that runs them on this machine, if any, `why_not` says why a call is not served.
`worthwhile` is the rule for `backend=None` where they are not proved first, see `ops.proof`. Nothing is built
at import; the function that makes kernels, such as `mx.fast.metal_kernel`, is looked up at each call.
"""

from __future__ import annotations

from . import gpu
from .gpu import GPUS
from .one_pass import between, linear
from .one_token import pack, step, unpack
from .plan import worthwhile
from .routed import ahla, hla3
from .second_order import hla2
from .serve import fuses, steps, why_not

FUSED = {"hla2": hla2, "ahla": ahla, "hla3": hla3}  # operators whose passes run in one walk, by family

__all__ = [
    "FUSED",
    "GPUS",
    "between",
    "fuses",
    "gpu",
    "linear",
    "pack",
    "step",
    "steps",
    "unpack",
    "why_not",
    "worthwhile",
]
