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

from __future__ import annotations

from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlx_hla.ops import backend as run
from mlx_hla.ops.backend import BACKENDS
from mlx_hla.ops.operator import Operator
from mlx_hla.ops.order import operator_of

from .cache import HLACache
from .gate import DecayGate, StepGate, fixed_decay
from .inputs import check_array
from .mixer import Mixer

_OUT_EPS = 1e-5


class HLAttention(Mixer):
    """Causal self-attention of higher order with a state of constant size.

    Args:
        dims: width of the input and the output.
        num_heads: query heads Hq.
        num_kv_heads: key-value heads Hkv, dividing Hq; default Hq.
        head_dim: key dim D; default dims // num_heads.
        value_dim: value dim Dv; default D.
        operator: "first", "hla2", "ahla", "hla3", "mixed" or "readout", or an order n ≥ 1.
        coefficients: None, the operator's own; or "learned", of mixed and readout: β per token and query
            head, from 0 to twice its default, where it starts (mixed: over the decayed count of tokens).
        decay: "gate" (learned, per token and key-value head), "fixed" (constant per key-value head, not
            trained and not saved), both starting at memories of 8 to 512 tokens, or None.
        qk_norm: "rms" (with learned gains), "l2" (unit vectors), or None.
        conv_size: width of the causal convolution on q, k and v; 0 or None leaves it out.
        rope: True or a base for rotary positions on q and k; None leaves them out.
        output_norm: RMS-normalise each head's output.
        output_gate: False, True or "silu", or "sigmoid": multiply by the activation of a projection of x.
        normalize: divide by the operator's normaliser. It is a signed sum: near zero it is unsafe.
        bias: biases in the projections.
        backend: None, "mlx", "metal" or "cuda", as the operators take it.
    """

    # Of the sums over all tokens, float16 holds none: see Range.
    _between: ClassVar = {mx.float16: mx.float32}

    def __init__(
        self,
        dims: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        operator: str | int = "hla2",
        coefficients: str | None = None,
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
        super().__init__(
            dims,
            num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            value_dim=value_dim,
            qk_norm=qk_norm,
            conv_size=conv_size,
            rope=rope,
            output_gate=output_gate,
            bias=bias,
        )
        self._check_choice("coefficients", coefficients, ("learned", None))
        self._check_choice("decay", decay, ("gate", "fixed", None))
        self._check_choice("backend", backend, BACKENDS)
        for name, flag in {"output_norm": output_norm, "normalize": normalize}.items():
            self._check_choice(name, flag, (False, True))
        self.decay, self.normalize, self.backend = decay, normalize, backend
        self._operator = _operator(operator)
        D = self.head_dim
        self.scale = 1 / D if qk_norm == "l2" else D**-0.5
        # Normalised keys have the length √D; an option whose default is made for unit keys follows.
        length = D**0.5 if qk_norm else 1.0
        options = self._operator.options
        self._own = {o.name: o.default * length**o.key_degree for o in options if o.key_degree or o.learned}
        self._learned = None
        if coefficients == "learned":
            self._learned = next((o for o in options if o.learned), None)
            if self._learned is None:
                raise ValueError(f"[HLAttention] coefficients must be None: {operator!r} has none to learn")
            if self._learned.learned == "sum" and decay is None:
                raise ValueError(f"[HLAttention] to learn coefficients of {operator!r} takes a decay")
        self._out_eps = _OUT_EPS
        degree = self._operator.degree
        if output_norm and degree and not normalize:  # a ratio is in range by itself
            shrink = 2.0 ** -min(8, 32 // degree)
            self.scale *= shrink
            self._out_eps *= shrink ** (2 * degree)
        self._init_own(output_norm)

    def _init_own(self, output_norm: bool) -> None:
        """The parameters beside those of every mixer, and how they start.

        out_norm    1
        decay_gate  weight 0; bias: memories of 8 to 512 tokens, even in log over the heads
        step_gate   0: the operator's own coefficients
        """
        if output_norm:
            self.out_norm = nn.RMSNorm(self.value_dim, eps=self._out_eps)
        if self._learned is not None:
            self.step_gate = StepGate(self.dims, self.num_heads)
        if self.decay == "gate":
            self.decay_gate = DecayGate(self.dims, self.num_kv_heads)
        elif self.decay == "fixed":
            # The underscore keeps it out of the parameters: neither trained, nor cast, nor saved.
            self._fixed_decay = fixed_decay(self.num_kv_heads)

    @property
    def _who(self) -> str:
        return "HLAttention"

    @property
    def operator(self) -> str | int:
        return self._operator.selected.get("order", self._operator.label)

    def _extra_repr(self):
        return (
            f"{self.dims}, heads={self.num_heads}/{self.num_kv_heads}, head_dim={self.head_dim}, "
            f"value_dim={self.value_dim}, operator={self.operator!r}, decay={self.decay!r}, "
            f"qk_norm={self.qk_norm!r}, rope={self.rope}, output_gate={self.output_gate!r}, "
            f"coefficients={'learned' if self._learned else None!r}"
        )

    def make_cache(self) -> HLACache:
        return HLACache()

    def _attend(self, q, k, v, x, lengths, segment_ids, carried, split):
        """The operator, from the carried memory and into it."""
        if self.rope is not None:
            q, k = (a.astype(v.dtype) for a in self._rotate(q, k, lengths, carried, split))
        decay = self._decay_of(x)
        own = self._coefficients(x, decay)
        memory = self._operator.restore(carried.memory)
        options = {
            "scale": self.scale,
            "normalize": self.normalize,
            "backend": self.backend,
        }
        # A segment border takes two tokens of one call, so a single token has none.
        if q.shape[1] == 1 and lengths is None and split is None:
            decay = decay[:, 0] if self.decay == "gate" else decay
            own = {name: a[:, 0] if isinstance(a, mx.array) else a for name, a in own.items()}
            token = (x[:, 0] for x in (q, k, v))
            o, carried.memory = run.step(self._operator, *token, memory, own, decay=decay, **options)
            return o[:, None]
        mask = None if lengths is None else mx.arange(q.shape[1]) < lengths[:, None]
        options |= {"mask": mask, "segment_ids": segment_ids}
        if split is not None:
            options["group"] = split.group
        o, carried.memory = run.sequence(self._operator, q, k, v, memory, own, decay=decay, **options)
        return o

    def _rotate(self, q, k, lengths, carried, split):
        """Positions count the real tokens of the whole stream.

        They do not start again at a segment: the operators see differences of positions only.
        """
        B, T = q.shape[:2]
        check_array("HLAttention", "cache.offset", "integers", carried.offset, (B,), mx.integer)
        offset = mx.zeros((B,), mx.int32) if carried.offset is None else carried.offset
        if split is None:
            carried.offset = offset + (T if lengths is None else lengths)
        else:
            before, tokens = split.tokens()
            offset, carried.offset = offset + before, offset + tokens

        def rotate(a):
            return self._rotated(a.transpose(0, 2, 1, 3), offset).transpose(0, 2, 1, 3)

        return rotate(q), rotate(k)

    def _coefficients(self, x, decay):
        """The operator's own options: numbers, and what is learned as [B, T, Hq]."""
        if self._learned is None:
            return self._own
        step = self._own[self._learned.name] * self.step_gate(x)
        if self._learned.learned == "sum":
            step = step * mx.repeat(1 - decay, self.num_heads // self.num_kv_heads, axis=-1)
        return {**self._own, self._learned.name: step}

    def _decay_of(self, x):
        if self.decay == "gate":
            return self.decay_gate(x)
        return self._fixed_decay if self.decay == "fixed" else None


def _operator(operator: str | int) -> Operator:
    try:
        return operator_of(operator)
    except ValueError as e:
        raise ValueError(f"[HLAttention] {e}") from None
