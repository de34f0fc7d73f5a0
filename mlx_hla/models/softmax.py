"""Softmax attention in the place of `HLAttention`: the baseline that the language model is compared with."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_hla.nn import ShortConv
from mlx_hla.nn.cache import KVCache

# B batch, T time, H heads, D head dim


class SoftmaxAttention(nn.Module):
    """The same projections, short convolution and q/k norms as `HLAttention`; rotary positions; softmax."""

    def __init__(
        self,
        dims: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        qk_norm: str | None = "rms",
        conv_size: int = 4,
        rope: float = 10000.0,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_dim = head_dim or dims // num_heads
        self.rope = rope
        width = self.num_heads * self.head_dim
        kv_width = self.num_kv_heads * self.head_dim
        self.qkv_proj = nn.Linear(dims, width + 2 * kv_width, bias=False)
        self.out_proj = nn.Linear(width, dims, bias=False)
        if conv_size:
            self.conv = ShortConv(width + 2 * kv_width, conv_size)
        if qk_norm == "rms":
            self.q_norm = nn.RMSNorm(self.head_dim, eps=1e-6)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=1e-6)

    def make_cache(self) -> KVCache:
        return KVCache()

    def __call__(
        self,
        x: mx.array,
        mask: mx.array | None = None,
        segment_ids: mx.array | None = None,
        cache: KVCache | None = None,
    ) -> mx.array:
        """x [B, T, dims] to [B, T, dims]. `mask` (True = real; padding on the right) and `segment_ids` as in
        `HLAttention`, but not together with a cache."""
        if cache is not None and (mask is not None or segment_ids is not None):
            raise ValueError("[SoftmaxAttention] a cache takes neither mask nor segment_ids")
        qkv = self.qkv_proj(x)
        if "conv" in self:
            qkv, tail = self.conv(qkv, None if cache is None else cache.conv, segment_ids=segment_ids)
            if cache is not None:
                cache.conv = tail
        heads = mx.unflatten(qkv, -1, (self.num_heads + 2 * self.num_kv_heads, self.head_dim))
        q, k, v = mx.split(heads, [self.num_heads, self.num_heads + self.num_kv_heads], axis=2)
        if "q_norm" in self:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (a.transpose(0, 2, 1, 3) for a in (q, k, v))
        offset = 0 if cache is None else cache.offset
        q, k = (
            mx.fast.rope(a, self.head_dim, traditional=False, base=self.rope, scale=1.0, offset=offset)
            for a in (q, k)
        )
        if cache is not None:
            k, v = cache.append(k, v)
        pattern = (
            "causal" if mask is None and segment_ids is None else _pattern(x.shape[1], mask, segment_ids)
        )
        o = mx.fast.scaled_dot_product_attention(q, k, v, scale=self.head_dim**-0.5, mask=pattern)
        y = self.out_proj(o.transpose(0, 2, 1, 3).flatten(-2))
        return y if mask is None else mx.where(mask[..., None], y, 0)


def _pattern(T: int, mask: mx.array | None, segment_ids: mx.array | None) -> mx.array:
    """True where a query (rows) may see a key (columns), [B or 1, 1, T, T]."""
    position = mx.arange(T)
    seen = (position[:, None] >= position)[None]
    if segment_ids is not None:
        seen = seen & (segment_ids[:, :, None] == segment_ids[:, None, :])
    if mask is not None:
        # A padded query may see itself: a row without any key would be NaN.
        seen = seen & (mask[:, None, :] | (position[:, None] == position))
    return seen[:, None]
