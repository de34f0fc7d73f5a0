"""What every causal mixer is made of, whatever it mixes tokens by.

    q, k, v = split(act(conv(x W_qkv)))      short causal convolution with SiLU
    q, k    = norm(q), norm(k)               per head
    o       = attend(q, k, v)                what a kind of mixer is: a recurrence, a window, softmax
    y       = (norm(o) ⊙ act(x W_g)) W_out   norm per head and output gate are optional

One protocol for all kinds: `mixer(x, mask, segment_ids, cache)` and `make_cache()`. A stack of layers, its
caches, padding and packed documents need to know no more of a mixer than that.
"""

# B batch, T time, Hq query heads, Hkv key-value heads, D key dim, Dv value dim

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any, ClassVar, TypedDict

import mlx.core as mx
import mlx.nn as nn

from mlx_hla.ops.parallel import alike, usable

from .cache import Cache
from .conv import ShortConv
from .inputs import check_array, check_input
from .padding import packing
from .stretches import Stretches

ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {"silu": nn.silu, "sigmoid": mx.sigmoid}
QK_EPS = 1e-6


class SharedOptions(TypedDict, total=False):
    """Arguments of all mixers, described at `WindowAttention`."""

    num_kv_heads: int | None
    head_dim: int | None
    value_dim: int | None
    qk_norm: str | None
    conv_size: int | None
    output_gate: bool | str
    bias: bool


class Mixer(nn.Module):
    """Projections, convolution, norms, gate; a kind adds `_attend`, `make_cache` and what these need."""

    conv: ShortConv
    rope: Any
    # The dtype to compute in between the projections, where theirs is too narrow.
    _between: ClassVar[dict[mx.Dtype, mx.Dtype]] = {}

    def __init__(
        self,
        dims: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        qk_norm: str | None = "rms",
        conv_size: int | None = 4,
        rope: bool | float | None = None,
        output_gate: bool | str = False,
        bias: bool = False,
    ):
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self._check_positive(dims=dims, num_heads=num_heads, num_kv_heads=num_kv_heads)
        if num_heads % num_kv_heads:
            raise ValueError(
                f"[{self._who}] num_kv_heads must divide num_heads={num_heads}, got {num_kv_heads}"
            )
        if head_dim is None:
            if dims % num_heads:
                raise ValueError(
                    f"[{self._who}] dims must be a multiple of num_heads={num_heads} "
                    f"unless head_dim is given, got {dims}"
                )
            head_dim = dims // num_heads
        value_dim = head_dim if value_dim is None else value_dim
        self._check_positive(head_dim=head_dim, value_dim=value_dim)
        self._check_choice("qk_norm", qk_norm, ("rms", "l2", None))
        self._check_choice("output_gate", output_gate, (False, True, "silu", "sigmoid"))
        self._check_choice("bias", bias, (False, True))
        whole = isinstance(conv_size, int) and not isinstance(conv_size, bool)
        if conv_size is not None and (not whole or conv_size < 0 or conv_size == 1):
            raise ValueError(
                f"[{self._who}] conv_size must be None, 0 or an integer of at least 2, got {conv_size!r}"
            )
        self.dims, self.num_heads, self.num_kv_heads = dims, num_heads, num_kv_heads
        self.head_dim, self.value_dim = head_dim, value_dim
        self.qk_norm = qk_norm
        self.output_gate = "silu" if output_gate is True else output_gate or None
        self.rope = self._rope_base(rope)
        self._init_shared(conv_size or 0, bias)

    @property
    def _who(self) -> str:
        """Whom errors name."""
        return "Mixer"

    def _init_shared(self, conv_size: int, bias: bool) -> None:
        """The parameters that all kinds have, and how they start.

        qkv_proj, out_proj, gate_proj  uniform with variance 1/fan_in; biases 0
        conv                           uniform in ±1/√width
        q_norm, k_norm                 1
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
            self.q_norm = nn.RMSNorm(self.head_dim, eps=QK_EPS)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=QK_EPS)

    def make_cache(self) -> Any:
        raise NotImplementedError

    def _attend(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        x: mx.array,
        lengths: mx.array | None,
        segment_ids: mx.array | None,
        carried: Any,
        split: Stretches | None,
    ) -> mx.array:
        """q [B, T, Hq, D], k [B, T, Hkv, D], v [B, T, Hkv, Dv] to o [B, T, Hq, Dv].

        lengths [B]: the leading tokens that are real, or None for all; carried: what to continue, and to
        leave as it is after these tokens. split: what other ranks have of the sequence, or None.
        """
        raise NotImplementedError

    def __call__(
        self,
        x: mx.array,
        mask: mx.array | None = None,
        segment_ids: mx.array | None = None,
        cache: Any = None,
        group: Any = None,
    ) -> mx.array:
        """x [B, T, dims] to [B, T, dims].

        mask [B, T], bool, True = real token: a masked token does not exist (see `padding`); its output is 0.
        segment_ids [B, T], integers: memory and convolution start afresh where the id changes from one real
        token to the next. The first real token of a call continues the cache.
        cache: read, and updated in place, so that the next call continues this one.
        group: an `mx.distributed` group over whose ranks T is split, see `mlx_hla.ops`: x, mask and
        segment_ids are this rank's, the cache is that of the whole sequence, the same on every rank. A
        gradient of a parameter is this rank's part of it.
        """
        fresh, group = self.make_cache(), usable(self._who, group)
        if group is not None and isinstance(x, mx.array) and x.ndim == 3 and x.shape[1] == 0:
            # A masked token in the place of none.
            x, no = mx.pad(x, [(0, 0), (0, 1), (0, 0)]), mx.zeros((x.shape[0], 1), mx.bool_)
            ids = None if segment_ids is None else mx.zeros(no.shape, segment_ids.dtype)
            return self(x, no, ids, cache, group)[:, :0]
        check_input(self._who, x, self.dims)
        check_array(self._who, "mask", "bool", mask, x.shape[:2], mx.bool_)
        check_array(self._who, "segment_ids", "integers", segment_ids, x.shape[:2], mx.integer)
        if cache is not None and not isinstance(cache, type(fresh)):
            kind = type(fresh).__name__
            article = "an" if kind.startswith("HLA") else "a"
            raise ValueError(f"[{self._who}] cache must be {article} {kind}, got {type(cache).__name__}")
        if group is not None:
            about = {"the layer": self._extra_repr(), "conv": self.conv.width if "conv" in self else 0}
            about |= {"B": len(x), "dtype": x.dtype, "segment_ids": segment_ids is not None}
            about["tokens in the cache"] = cache is not None and not cache.empty()
            alike(self._who, group, about)
        lengths, packed = None, None
        if mask is not None:
            packed = packing(mask)
            x, lengths = packed.pack(x), packed.lengths
            segment_ids = None if segment_ids is None else packed.pack(segment_ids)

        # The cache changes only when all of the call has gone well.
        carried: Cache = fresh if cache is None else copy.copy(cache)
        if not carried.empty() and (carried.conv is None) == ("conv" in self):
            got = "one without" if carried.conv is None else "one with"
            raise ValueError(f"[{self._who}] cache must be of this layer, got {got} inputs of a convolution")
        qkv = self._project(x)
        dtype = qkv.dtype
        split = None if group is None else Stretches(group, x, lengths, segment_ids)
        qkv = qkv.astype(self._between.get(dtype, dtype))
        q, k, v = self._prepare(qkv, lengths, segment_ids, carried, split)
        o = self._attend(q, k, v, x, lengths, segment_ids, carried, split)
        if "out_norm" in self:
            o = self.out_norm(o)
        o = o.flatten(-2).astype(dtype)
        if self.output_gate:
            o = o * ACTIVATIONS[self.output_gate](self.gate_proj(x))
        y = self._project_out(o)
        if cache is not None:
            cache.assign(carried)
        return y if packed is None else packed.unpack(y)

    def _project(self, x):
        """x [B, T, dims] to queries, keys and values of all heads, one after the other."""
        return self.qkv_proj(x)

    def _project_out(self, o):
        """Outputs of all heads, one after the other, to [B, T, dims]."""
        return self.out_proj(o)

    def _prepare(self, qkv, lengths, segment_ids, carried, split):
        """q [B, T, Hq, D], k [B, T, Hkv, D], v [B, T, Hkv, Dv], convolved and normalised."""
        if "conv" in self:
            before, after = carried.conv, None
            if split is not None:
                width = self.conv.width - 1
                held = None if before is None else (before, mx.full(qkv.shape[:1], width))
                (before, _), (after, _) = split.look_back(qkv, width, held)
            qkv, tail = self.conv(qkv, before, lengths=lengths, segment_ids=segment_ids)
            carried.conv = tail if split is None else after
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
            q, k = mx.fast.rms_norm(q, None, QK_EPS), mx.fast.rms_norm(k, None, QK_EPS)
        return q.astype(v.dtype), k.astype(v.dtype), v  # norm gains may be of a wider type

    def _rotated(self, a: mx.array, offset: Any) -> mx.array:
        """a [B, H, T, D], turned to the positions from offset, a number or [B], on."""
        if self.rope is None:
            return a
        return mx.fast.rope(a, self.head_dim, traditional=False, base=self.rope, scale=1.0, offset=offset)

    def _rope_base(self, rope: bool | float | None) -> float | None:
        if rope is None or rope is False:
            return None
        base = 10000.0 if rope is True else rope
        if not isinstance(base, int | float) or not 0 < base <= sys.float_info.max:
            raise ValueError(
                f"[{self._who}] rope must be None, True or a positive base, got {repr(rope)[:60]}"
            )
        if self.head_dim % 2:
            raise ValueError(f"[{self._who}] rope needs an even head_dim, got {self.head_dim}")
        return float(base)

    def _check_positive(self, **sizes):
        for name, size in sizes.items():
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"[{self._who}] {name} must be a positive integer, got {size!r}")

    def _check_choice(self, name, value, choices):
        if not any(value is c or (isinstance(c, str) and value == c) for c in choices):
            raise ValueError(
                f"[{self._who}] {name} must be one of {', '.join(map(repr, choices))}, got {value!r}"
            )


def _linear(fan_in, fan_out, bias):
    layer = nn.Linear(fan_in, fan_out, bias=bias)
    bound = (3 / fan_in) ** 0.5
    layer.weight = mx.random.uniform(-bound, bound, (fan_out, fan_in))
    if bias:
        layer.bias = mx.zeros((fan_out,))
    return layer
