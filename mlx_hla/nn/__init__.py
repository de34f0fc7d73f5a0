"""Layers: the attention and its parts."""

from .adapter import SelfAttentionAdapter
from .attention import HLAttention
from .cache import HLACache
from .conv import ShortConv
from .gate import DecayGate, fixed_decay, spread_memories

__all__ = [
    "DecayGate",
    "HLACache",
    "HLAttention",
    "SelfAttentionAdapter",
    "ShortConv",
    "fixed_decay",
    "spread_memories",
]
