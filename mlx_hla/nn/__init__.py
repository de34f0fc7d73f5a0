"""Layers: the mixers and their parts."""

from .adapter import SelfAttentionAdapter
from .attention import HLAttention
from .cache import HLACache, KVCache
from .conv import ShortConv
from .gate import DecayGate, StepGate, fixed_decay, spread_memories
from .softmax import SoftmaxAttention
from .window import WindowAttention, WindowState

__all__ = [
    "DecayGate",
    "HLACache",
    "HLAttention",
    "KVCache",
    "SelfAttentionAdapter",
    "ShortConv",
    "SoftmaxAttention",
    "StepGate",
    "WindowAttention",
    "WindowState",
    "fixed_decay",
    "spread_memories",
]
