"""A stand-in for `mlx.nn.MultiHeadAttention` where that is used as causal self-attention."""

import mlx.core as mx
import mlx.nn as nn

from .attention import HLAttention
from .inputs import check_input

# What an additive mask hides has at most this: exp(-1000) is 0 in float32, and -1e4 is -9984 in bfloat16.
HIDDEN = -1000


class SelfAttentionAdapter(nn.Module):
    """Gives `HLAttention` the call of `nn.MultiHeadAttention`: (queries, keys, values, mask).

    The three inputs must be one array: the recurrence has one stream of tokens. The mask must say "causal":
    pass the string, or a [T, T] causal mask (additive, or bool with True = visible), which is compared with
    the causal one. Padding and packed documents have arguments of their own on `HLAttention` itself.
    """

    def __init__(self, attention: HLAttention):
        super().__init__()
        if not isinstance(attention, HLAttention):
            raise ValueError(
                f"[SelfAttentionAdapter] attention must be an HLAttention, got {type(attention)}"
            )
        self.attention = attention

    def __call__(self, queries: mx.array, keys: mx.array, values: mx.array, mask=None) -> mx.array:
        if keys is not queries or values is not queries:
            raise ValueError(
                "[SelfAttentionAdapter] queries, keys and values must be the same array: HLAttention is "
                "self-attention and has no cross-attention"
            )
        check_input("SelfAttentionAdapter", queries, self.attention.dims)
        _check_causal(mask, queries.shape[1])
        return self.attention(queries)


def _check_causal(mask, T):
    if isinstance(mask, str) and mask == "causal":
        return
    if mask is None:
        raise ValueError(
            "[SelfAttentionAdapter] mask=None means attention in both directions; HLAttention is causal: "
            'pass mask="causal"'
        )
    if not isinstance(mask, mx.array) or mask.shape[-2:] != (T, T) or mask.size != T * T:
        got = mask.shape if isinstance(mask, mx.array) else repr(mask)[:60]
        raise ValueError(
            f'[SelfAttentionAdapter] mask must be "causal" or a [{T}, {T}] causal mask, got {got}; '
            "for padding call HLAttention with mask=[B, T]"
        )
    visible = mask if mask.dtype == mx.bool_ else mask == 0
    hidden = ~mask if mask.dtype == mx.bool_ else mask <= HIDDEN
    causal = mx.tril(mx.ones((T, T), mx.bool_))
    same = mx.all(mx.where(causal, visible.reshape(T, T), hidden.reshape(T, T)))
    try:
        same = same.item()
    except ValueError as error:
        raise ValueError(
            "[SelfAttentionAdapter] cannot look at a mask inside a compiled or checkpointed function: "
            'pass mask="causal"'
        ) from error
    if not same:
        raise ValueError("[SelfAttentionAdapter] mask is not causal; HLAttention is")
