"""Softmax attention over everything read: the baseline, and the full-attention layers of a hybrid.

    o_t = Σ_{j ≤ t} softmax_j(s q_t·k_j) v_j        with rotary positions

Its cache grows with the text, so a model with such a layer has no constant state.
"""

# B batch, T time, L tokens in the cache, H heads, D head dim

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx

from .cache import KVCache
from .mixer import Mixer, SharedOptions
from .padding import runs_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SoftmaxAttention(Mixer):
    """Causal softmax attention with the projections, convolution, norms and call of `HLAttention`.

    The arguments are those of `WindowAttention`, but for `window`.
    """

    def __init__(
        self,
        dims: int,
        num_heads: int,
        *,
        rope: bool | float | None = True,
        **shared: Unpack[SharedOptions],
    ):
        super().__init__(dims, num_heads, rope=rope, **shared)
        self._check_choice("qk_norm", self.qk_norm, ("rms", None))

    @property
    def _who(self) -> str:
        return "SoftmaxAttention"

    def make_cache(self) -> KVCache:
        return KVCache()

    def _attend(self, q, k, v, x, lengths, segment_ids, carried, split):
        if split is not None:
            raise ValueError("[SoftmaxAttention] group must be None: it looks at every token there is")
        q, k, v = (a.transpose(0, 2, 1, 3) for a in (q, k, v))
        before, T = carried.length, q.shape[2]
        offset = before if carried.offset is None else carried.offset
        q, k = self._rotated(q, offset), self._rotated(k, offset)
        k, v = carried.append(k, v)
        pattern = _pattern(before, T, carried, lengths, segment_ids)
        o = mx.fast.scaled_dot_product_attention(q, k, v, scale=self.head_dim**-0.5, mask=pattern)
        return o.transpose(0, 2, 1, 3)


def _pattern(before, T, carried, lengths, segment_ids):
    """Which keys (columns) a query (row) may see, [B, 1, T, L] or "causal"; brings `carried` up to date."""
    if lengths is not None and carried.offset is None:
        carried.offset = mx.full(lengths.shape, before, mx.int32)
    if carried.offset is not None:
        carried.offset = carried.offset + (T if lengths is None else lengths)
    if carried.seen is None and lengths is None and segment_ids is None:
        return "causal"
    B, L = carried.keys.shape[0], before + T
    old = mx.ones((B, before), mx.bool_) if carried.seen is None else carried.seen
    place = mx.arange(T)
    real = mx.ones((B, T), mx.bool_) if lengths is None else place < lengths[:, None]
    carried.seen = mx.concatenate([old, real], axis=1)
    here, there = mx.arange(before, L)[:, None], mx.arange(L)
    # A padded query may see itself: a row without any key would be NaN.
    pattern = (here >= there) & (carried.seen[:, None] | (here == there))
    if segment_ids is not None:
        runs = runs_of(segment_ids, before)
        pattern = pattern & (runs[:, before:, None] == runs[:, None])
        end = L - 1 if lengths is None else mx.maximum(before + lengths - 1, 0)
        last = mx.take_along_axis(runs, mx.broadcast_to(mx.array(end), (B,))[:, None], axis=1)
        carried.seen = carried.seen & (runs == last)
    return pattern[:, None]
