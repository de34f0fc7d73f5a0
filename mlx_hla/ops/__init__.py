"""The operators of Higher-order Linear Attention on MLX arrays.

`linear_attention`, `hla2`, `ahla`, `hla3`, `hla(order=n)`, `mixed` and `readout` share one contract.
With B batch, T time, Hq query heads, Hkv key-value heads (Hkv divides Hq), D key dim and Dv value dim:

q: `[B, T, Hq, D]`; k: `[B, T, Hkv, D]`; v: `[B, T, Hkv, Dv]`, all of one dtype, float16, bfloat16 or float32.
scale: multiplies every q·k; the same as calling with scale·q.
decay: None, a number, `[Hkv]` or `[B, T, Hkv]`, in [0, 1]: token t multiplies the state by g_t before
    it adds its own part, so g_t = 0 forgets everything before t. In an array, a value below 0 counts as 0
    and one above 1 as 1, without a gradient; NaN makes NaN of every output from its token on, and may of
    earlier ones of the same call, as a NaN in q, k or v does.
normalize: divide by the same operator on v = 1, plus `eps`.
mask: `[B, T]` boolean, True for a real token. Any other changes no state and outputs 0.
segment_ids: `[B, T]` integers. The state starts anew at a real token whose id differs from that of the
    real token before it; the first real token continues `initial_state`.
initial_state: the state that an earlier call returned.
group: an `mx.distributed` group over whose ranks T is split. Each gives its stretch, in the order of ranks
    and of any length, with the same options and the same initial_state. The state that comes back is the
    whole sequence's, on every rank. Not for Algorithm 3. The first call of a kind exchanges under a kilobyte
    at once, and raises on every rank if their shapes (but T), dtypes or options differ. For ranks that may
    end or fall silent, `mlx_hla.launched.join` makes a group with a clock.
backend: None picks the Metal kernels where they serve the call, CUDA's from 1,024 tokens on or if
    MLX_HLA_BACKEND=cuda is in the environment, and the plain MLX ops elsewhere; "metal", "cuda" or "mlx" asks
    for one.

Returns `(o, state)`: o `[B, T, Hq, Dv]` in the dtype of q, and a NamedTuple of float32 arrays. Gradients
flow to q, k, v, an array decay and the initial state, from o and from the state. Sums and states are
float32 for every input dtype. Raises ValueError naming the operator, what it expected and what came.

The `*_step` functions take one token (no T axis) and its state, None at the start, and return the same pair.
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for type checkers, which cannot follow the loop below
    from .ahla import *  # noqa: F403
    from .hla2 import *  # noqa: F403
    from .hla3 import *  # noqa: F403
    from .linear import *  # noqa: F403
    from .mixed import *  # noqa: F403
    from .order import *  # noqa: F403
    from .readout import *  # noqa: F403

# Every file of this folder that has public names is an operator's: its names become those of the package.
__all__: list[str] = []
for _found in iter_modules(globals()["__path__"]):
    _module = import_module(f"{__name__}.{_found.name}")
    for _name in getattr(_module, "__all__", ()):
        globals()[_name] = getattr(_module, _name)
        __all__.append(_name)
