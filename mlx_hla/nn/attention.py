"""The attention layer: projections, short convolution, norms, rotation, decay, an operator, output.

    q, k, v = split(act(conv(x W_qkv)))            short causal convolution with SiLU
    q, k    = rope(norm(q)), rope(norm(k))         per head
    g       = exp(-softplus(x w + b))              decay per token and key-value head
    o       = operator(q, k, v; decay g, scale s)  first order, HLA2, AHLA, HLA3, order n
    y       = (norm(o) ⊙ act(x W_g)) W_out         norm per head; the output gate is optional

Scale. With qk_norm="rms", |q| = |k| = √D, so s = 1/√D makes s q·k of order 1 (standard deviation 1 for
random directions, √D at most), as softmax attention has it: outputs of any operator start at order 1 and stay
above the output norm's epsilon. With "l2", s = 1/D, the product of two unit vectors: |s q·k| ≤ 1. With None,
s = 1/√D and nothing bounds the output.

Range. The worst input under "rms" is T equal tokens with g = 1 and q along k, where |s q·k| = √D. At
T = 131,072 and D = 64 that gives |o| = √D T |v| = 1e6 |v| for the first order, D T²/2 |v| = 5.5e11 |v| for
HLA2 and AHLA, D^1.5 T³/3 |v| = 3.8e17 |v| for HLA3: far above float16's 65,504. So in a float16 layer only
the projections are float16, and everything between them is float32. bfloat16 has the range of float32, and
that is short too: the output norm's gradient holds rms(o)^-3, which is lost above rms(o) = 4e12. The norm
takes out any factor on o, so the operator's scale holds 2^-8 per q·k (exact; the norm's epsilon shrinks with
it), which moves the worst case to 8e6 |v| for HLA2 and 2e10 |v| for HLA3, and o of order 1 to 2e-5 and 6e-8.
Without the output norm, o is as large as it is.
"""

# B batch, T time, Hq query heads, Hkv key-value heads, D key dim, Dv value dim, C convolution channels

import copy
import sys
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from mlx_hla.ops import backend as run
from mlx_hla.ops.operator import Operator
from mlx_hla.ops.order import operator_of

from .cache import HLACache
from .conv import ShortConv
from .gate import DecayGate, fixed_decay
from .inputs import check_array, check_input
from .padding import packing

_ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {"silu": nn.silu, "sigmoid": mx.sigmoid}
_QK_EPS = 1e-6
_OUT_EPS = 1e-5


class HLAttention(nn.Module):
    """Causal self-attention of higher order with a state of constant size.

    Args:
        dims: width of the input and the output.
        num_heads: query heads Hq.
        num_kv_heads: key-value heads Hkv, dividing Hq; default Hq.
        head_dim: key dim D; default dims // num_heads.
        value_dim: value dim Dv; default D.
        operator: "first", "hla2", "ahla", "hla3", "mixed" or "readout" (these two with their default
            coefficients), or an order n ≥ 1.
        decay: "gate" (learned, per token and key-value head), "fixed" (constant per key-value head, not
            trained and not saved), both starting at memories of 8 to 512 tokens, or None.
        qk_norm: "rms" (with learned gains), "l2" (unit vectors), or None.
        conv_size: width of the causal convolution on q, k and v; 0 or None leaves it out.
        rope: True or a base for rotary positions on q and k; None leaves them out.
        output_norm: RMS-normalise each head's output.
        output_gate: False, True or "silu", or "sigmoid": multiply by the activation of a projection of x.
        normalize: divide by the operator's normaliser. It is a signed sum: near zero it is unsafe.
        bias: biases in the projections.
        backend: None, "mlx" or "metal", as the operators take it.
    """

    def __init__(
        self,
        dims: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        operator: str | int = "hla2",
        decay: str | None = "gate",
        qk_norm: str | None = "rms",
        conv_size: int | None = 4,
        rope: bool | float | None = None,
        output_norm: bool = True,
        output_gate: bool | str = False,
        normalize: bool = False,
        bias: bool = False,
        backend: str | None = None,
    ):
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _check_positive(dims=dims, num_heads=num_heads, num_kv_heads=num_kv_heads)
        if num_heads % num_kv_heads:
            raise ValueError(
                f"[HLAttention] num_kv_heads must divide num_heads={num_heads}, got {num_kv_heads}"
            )
        if head_dim is None:
            if dims % num_heads:
                raise ValueError(
                    f"[HLAttention] dims must be a multiple of num_heads={num_heads} "
                    f"unless head_dim is given, got {dims}"
                )
            head_dim = dims // num_heads
        value_dim = head_dim if value_dim is None else value_dim
        _check_positive(head_dim=head_dim, value_dim=value_dim)
        _check_choice("decay", decay, ("gate", "fixed", None))
        _check_choice("qk_norm", qk_norm, ("rms", "l2", None))
        _check_choice("output_gate", output_gate, (False, True, "silu", "sigmoid"))
        _check_choice("backend", backend, (None, "mlx", "metal"))
        for name, flag in {"output_norm": output_norm, "normalize": normalize, "bias": bias}.items():
            _check_choice(name, flag, (False, True))
        whole = isinstance(conv_size, int) and not isinstance(conv_size, bool)
        if conv_size is not None and (not whole or conv_size < 0 or conv_size == 1):
            raise ValueError(
                f"[HLAttention] conv_size must be None, 0 or an integer of at least 2, got {conv_size!r}"
            )

        self.dims, self.num_heads, self.num_kv_heads = dims, num_heads, num_kv_heads
        self.head_dim, self.value_dim = head_dim, value_dim
        self.decay, self.qk_norm, self.normalize, self.backend = decay, qk_norm, normalize, backend
        self.output_gate = "silu" if output_gate is True else output_gate or None
        self.rope = _rope_base(rope, head_dim)
        self._operator = _operator(operator)
        self.scale = 1 / head_dim if qk_norm == "l2" else head_dim**-0.5
        # Normalised keys have the length √D; an option whose default is made for unit keys follows.
        length = head_dim**0.5 if qk_norm else 1.0
        options = self._operator.options
        self._own = {o.name: o.default * length**o.key_degree for o in options if o.key_degree}
        self._out_eps = _OUT_EPS
        degree = self._operator.degree
        if output_norm and degree and not normalize:  # a ratio is in range by itself
            shrink = 2.0 ** -min(8, 32 // degree)
            self.scale *= shrink
            self._out_eps *= shrink ** (2 * degree)
        self._init_parameters(conv_size or 0, output_norm, bias)

    def _init_parameters(self, conv_size, output_norm, bias):
        """Every parameter and how it starts.

        qkv_proj, out_proj, gate_proj  uniform with variance 1/fan_in; biases 0
        conv                           uniform in ±1/√width
        q_norm, k_norm, out_norm       1
        decay_gate                     weight 0; bias: memories of 8 to 512 tokens, even in log over the heads
        """
        q_dim, k_dim = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        v_dim, out_dim = self.num_kv_heads * self.value_dim, self.num_heads * self.value_dim
        # One product and one convolution for q, k and v: at one token a call costs more than its arithmetic.
        self.qkv_proj = _linear(self.dims, q_dim + k_dim + v_dim, bias)
        self.out_proj = _linear(out_dim, self.dims, bias)
        if self.output_gate:
            self.gate_proj = _linear(self.dims, out_dim, bias)
        if conv_size:
            self.conv = ShortConv(q_dim + k_dim + v_dim, conv_size)
        if self.qk_norm == "rms":
            self.q_norm = nn.RMSNorm(self.head_dim, eps=_QK_EPS)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=_QK_EPS)
        if output_norm:
            self.out_norm = nn.RMSNorm(self.value_dim, eps=self._out_eps)
        if self.decay == "gate":
            self.decay_gate = DecayGate(self.dims, self.num_kv_heads)
        elif self.decay == "fixed":
            # The underscore keeps it out of the parameters: neither trained, nor cast, nor saved.
            self._fixed_decay = fixed_decay(self.num_kv_heads)

    @property
    def operator(self) -> str | int:
        return self._operator.selected.get("order", self._operator.label)

    def _extra_repr(self):
        return (
            f"{self.dims}, heads={self.num_heads}/{self.num_kv_heads}, head_dim={self.head_dim}, "
            f"value_dim={self.value_dim}, operator={self.operator!r}, decay={self.decay!r}, "
            f"qk_norm={self.qk_norm!r}, rope={self.rope}, output_gate={self.output_gate!r}"
        )

    def make_cache(self) -> HLACache:
        return HLACache()

    def __call__(
        self,
        x: mx.array,
        mask: mx.array | None = None,
        segment_ids: mx.array | None = None,
        cache: HLACache | None = None,
    ) -> mx.array:
        """x [B, T, dims] to [B, T, dims].

        mask [B, T], bool, True = real token: a masked token does not exist (see `padding`); its output is 0.
        segment_ids [B, T], integers: memory and convolution start afresh where the id changes from one real
        token to the next. The first real token of a call continues the cache.
        cache: read, and updated in place, so that the next call continues this one.
        """
        _check_inputs(x, self.dims, mask, segment_ids, cache)
        lengths, packed = None, None
        if mask is not None:
            packed = packing(mask)
            x, lengths, mask = packed.pack(x), packed.lengths, packed.packed_mask
            segment_ids = None if segment_ids is None else packed.pack(segment_ids)

        # The cache changes only when all of the call has gone well.
        carried = HLACache() if cache is None else copy.copy(cache)
        if carried.memory is not None and (carried.conv is None) == ("conv" in self):
            got = "one without" if carried.conv is None else "one with"
            raise ValueError(f"[HLAttention] cache must be of this layer, got {got} inputs of a convolution")
        qkv = self._project(x)
        dtype = qkv.dtype
        if dtype == mx.float16:
            qkv = qkv.astype(mx.float32)
        q, k, v = self._prepare(qkv, lengths, segment_ids, carried)
        o = self._attend(q, k, v, self._decay_of(x), mask, segment_ids, carried)
        if "out_norm" in self:
            o = self.out_norm(o)
        o = o.flatten(-2).astype(dtype)
        if self.output_gate:
            o = o * _ACTIVATIONS[self.output_gate](self.gate_proj(x))
        y = self._project_out(o)
        if cache is not None:
            cache.state = carried.state
        return y if packed is None else packed.unpack(y)

    def _project(self, x):
        """x [B, T, dims] to queries, keys and values of all heads, one after the other."""
        return self.qkv_proj(x)

    def _project_out(self, o):
        """Outputs of all heads, one after the other, to [B, T, dims]."""
        return self.out_proj(o)

    def _prepare(self, qkv, lengths, segment_ids, carried):
        """q [B, T, Hq, D], k [B, T, Hkv, D], v [B, T, Hkv, Dv], convolved, normalised and rotated."""
        if "conv" in self:
            qkv, carried.conv = self.conv(qkv, carried.conv, lengths=lengths, segment_ids=segment_ids)
        q_end = self.num_heads * self.head_dim
        k_end = q_end + self.num_kv_heads * self.head_dim
        q, k, v = mx.split(qkv, [q_end, k_end], axis=-1)
        q = mx.unflatten(q, -1, (self.num_heads, self.head_dim))
        k = mx.unflatten(k, -1, (self.num_kv_heads, self.head_dim))
        v = mx.unflatten(v, -1, (self.num_kv_heads, self.value_dim))
        if self.qk_norm == "rms":
            q, k = self.q_norm(q), self.k_norm(k)
        elif self.qk_norm == "l2":
            # √D times the unit vectors; the two √D are in the scale 1/D.
            q, k = mx.fast.rms_norm(q, None, _QK_EPS), mx.fast.rms_norm(k, None, _QK_EPS)
        if self.rope is not None:
            q, k = self._rotate(q, k, lengths, carried)
        return q.astype(v.dtype), k.astype(v.dtype), v  # norm gains may be of a wider type

    def _rotate(self, q, k, lengths, carried):
        """Positions count the real tokens of the whole stream.

        They do not start again at a segment: the operators see differences of positions only.
        """
        B, T = q.shape[:2]
        check_array("HLAttention", "cache.offset", "integers", carried.offset, (B,), mx.integer)
        offset = mx.zeros((B,), mx.int32) if carried.offset is None else carried.offset
        carried.offset = offset + (T if lengths is None else lengths)

        def rotate(a):
            return self._rotated(a.transpose(0, 2, 1, 3), offset).transpose(0, 2, 1, 3)

        return rotate(q), rotate(k)

    def _rotated(self, a, offset):
        """a [B, H, T, D], turned to the positions from offset [B] on."""
        return mx.fast.rope(a, self.head_dim, traditional=False, base=self.rope, scale=1.0, offset=offset)

    def _decay_of(self, x):
        if self.decay == "gate":
            return self.decay_gate(x)
        return self._fixed_decay if self.decay == "fixed" else None

    def _attend(self, q, k, v, decay, mask, segment_ids, carried):
        """The operator, from the carried memory and into it. Returns o [B, T, Hq, Dv]."""
        memory = self._operator.restore(carried.memory)
        options = {"scale": self.scale, "normalize": self.normalize, "backend": self.backend}
        # A segment border takes two tokens of one call, so a single token has none.
        if q.shape[1] == 1 and mask is None:
            decay = decay[:, 0] if self.decay == "gate" else decay
            token = (x[:, 0] for x in (q, k, v))
            o, carried.memory = run.step(self._operator, *token, memory, self._own, decay=decay, **options)
            return o[:, None]
        options |= {"mask": mask, "segment_ids": segment_ids}
        o, carried.memory = run.sequence(self._operator, q, k, v, memory, self._own, decay=decay, **options)
        return o


def _operator(operator: str | int) -> Operator:
    try:
        return operator_of(operator)
    except ValueError as e:
        raise ValueError(f"[HLAttention] {e}") from None


def _linear(fan_in, fan_out, bias):
    layer = nn.Linear(fan_in, fan_out, bias=bias)
    bound = (3 / fan_in) ** 0.5
    layer.weight = mx.random.uniform(-bound, bound, (fan_out, fan_in))
    if bias:
        layer.bias = mx.zeros((fan_out,))
    return layer


def _rope_base(rope, head_dim):
    if rope is None or rope is False:
        return None
    base = 10000.0 if rope is True else rope
    if not isinstance(base, int | float) or not 0 < base <= sys.float_info.max:
        raise ValueError(f"[HLAttention] rope must be None, True or a positive base, got {repr(rope)[:60]}")
    if head_dim % 2:
        raise ValueError(f"[HLAttention] rope needs an even head_dim, got {head_dim}")
    return float(base)


def _check_positive(**sizes):
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"[HLAttention] {name} must be a positive integer, got {size!r}")


def _check_choice(name, value, choices):
    if not any(value is c or (isinstance(c, str) and value == c) for c in choices):
        raise ValueError(
            f"[HLAttention] {name} must be one of {', '.join(map(repr, choices))}, got {value!r}"
        )


def _check_inputs(x, dims, mask, segment_ids, cache):
    check_input("HLAttention", x, dims)
    check_array("HLAttention", "mask", "bool", mask, x.shape[:2], mx.bool_)
    check_array("HLAttention", "segment_ids", "integers", segment_ids, x.shape[:2], mx.integer)
    if cache is not None and not isinstance(cache, HLACache):
        raise ValueError(f"[HLAttention] cache must be an HLACache, got {type(cache).__name__}")
