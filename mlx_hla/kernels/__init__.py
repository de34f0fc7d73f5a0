"""The operators as Metal kernels, through `mx.fast.metal_kernel`.

The interface for `mlx_hla.ops`. A family is one of `linear`, `hla2`, `ahla`, `hla3`:

    o, state = kernels.linear(q, k, v, g, state, scale=1.0, power=1)     state (P,)
    o, state = kernels.hla2(q, k, v, g, state, scale=1.0, ridge=0.0)     state (S, F)
    o, state = kernels.ahla(q, k, v, g, state, scale=1.0)                state (P, E)
    o, state = kernels.hla3(q, k, v, g, state, scale=1.0)                state (S, P, F)
    o, state = kernels.step(family, q, k, v, g, state, scale=1.0, ridge=0.0, packed=False, eps=None)

- q `[B, T, Hq, D]`, k `[B, T, Hkv, D]`, v `[B, T, Hkv, DV]`, float16, bfloat16 or float32, any strides;
  a step takes them without T. g is None or float32 `[Hkv]` or `[B, T, Hkv]` (`[B, Hkv]` in a step).
  state is None or a tuple of float32 arrays as above, S and P `[B, Hkv, ..]`, F and E `[B, Hq, ..]`.
- Masks and segments come folded in, as `ops.checks.canonical` does: q = k = v = 0 and g = 1 at a masked
  token, g = 0 at the first token of a segment. Normalising: append a column of ones to v and divide; DV
  need not be a multiple of 8. A step does that itself if it gets `eps`, and its state ends in the
  normalisers, as those of `mlx_hla.ops` do: (P, m), (S, F, eta), (P, E, m, n), (S, P, F, m, eta).
- Differentiable in q, k, v, g and the state, through o and the returned state.
- A step of hla2 or hla3 with `packed=True` takes and returns the symmetric S as its upper triangle,
  `pack(S)` `[B, Hkv, D (D + 1) / 2]`; `unpack` is the inverse. Nearly half of S's bytes less.
- `linear` takes operands of different dtypes and head counts and any decay power, so every other
  operator of `mlx_hla.ops` can be composed of it.

`metal_available()` says whether this machine runs them, `why_not` in words why a call is not served, and
`prefers` is the rule for `backend=None`. Nothing is built at import; kernels are made by
`mx.fast.metal_kernel`, looked up at each call.
"""

from __future__ import annotations

from .families import ahla, hla2, hla3, linear
from .one_token import pack, unpack
from .serve import metal_available, prefers, why_not
from .steps import step

__all__ = [
    "ahla",
    "hla2",
    "hla3",
    "linear",
    "metal_available",
    "pack",
    "prefers",
    "step",
    "unpack",
    "why_not",
]
