"""The operators of Higher-order Linear Attention on MLX arrays.

`linear_attention`, `hla2`, `ahla`, `hla3` and `hla(order=n)` share one contract. With B batch, T time,
Hq query heads, Hkv key-value heads (Hkv divides Hq), D key dim and Dv value dim:

q: `[B, T, Hq, D]`; k: `[B, T, Hkv, D]`; v: `[B, T, Hkv, Dv]`, all of one dtype, float16, bfloat16 or float32.
scale: multiplies every q·k; the same as calling with scale·q.
decay: None, a number, `[Hkv]` or `[B, T, Hkv]`, in [0, 1]: token t multiplies the state by g_t before
    it adds its own part, so g_t = 0 forgets everything before t.
normalize: divide by the same operator on v = 1, plus `eps`.
mask: `[B, T]` boolean, True for a real token. Any other changes no state and outputs 0.
segment_ids: `[B, T]` integers. The state starts anew at a real token whose id differs from that of the
    real token before it; the first real token continues `initial_state`.
initial_state: the state that an earlier call returned.
backend: None picks the Metal kernels where they serve the call and the plain MLX ops elsewhere; "metal"
    or "mlx" asks for one.

Returns `(o, state)`: o `[B, T, Hq, Dv]` in the dtype of q, and a NamedTuple of float32 arrays. Gradients
flow to q, k, v, an array decay and the initial state, from o and from the state. Sums and states are
float32 for every input dtype. Raises ValueError naming the operator, what it expected and what came.

The `*_step` functions take one token (no T axis) and its state, None at the start, and return the same pair.
"""

from .ahla import AHLAState, ahla, ahla_step
from .hla2 import HLA2State, HLA2UnmaskedState, hla2, hla2_step
from .hla3 import HLA3PaperState, HLA3State, HLA3UnmaskedState, hla3, hla3_step
from .linear import LinearState, linear_attention, linear_attention_step
from .order import HLAState, hla, hla_step

__all__ = [
    "AHLAState",
    "HLA2State",
    "HLA2UnmaskedState",
    "HLA3PaperState",
    "HLA3State",
    "HLA3UnmaskedState",
    "HLAState",
    "LinearState",
    "ahla",
    "ahla_step",
    "hla",
    "hla2",
    "hla2_step",
    "hla3",
    "hla3_step",
    "hla_step",
    "linear_attention",
    "linear_attention_step",
]
