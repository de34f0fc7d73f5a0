"""What the layer carries from one call to the next: a constant number of bytes, whatever was read before."""

from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten


class HLACache:
    """Carried state of one `HLAttention`.

    memory: the operator's state (a NamedTuple of float32 arrays), or None before the first token.
    conv: the last `conv_size - 1` inputs of the short convolution, [B, conv_size - 1, C], or None.
    offset: tokens read per row, int32 [B]; kept only by layers that rotate (`rope`), else None.

    Speaks mlx-lm's cache protocol: `state` (a tree of arrays, settable), `nbytes`, `empty`, `is_trimmable`
    (False: a recurrence cannot forget its last tokens) and `from_state`. mlx-lm's `generate_step` takes
    it, and `save_prompt_cache` saves it; `load_prompt_cache` looks a cache's class up in its own module, so
    set `mlx_lm.models.cache.HLACache = HLACache` before it. Arrays are never changed in place, so
    `copy.copy(cache)` is a snapshot that costs nothing.
    """

    def __init__(self):
        self.memory: Any = None
        self.conv: mx.array | None = None
        self.offset: mx.array | None = None

    @property
    def state(self):
        return self.memory, self.conv, self.offset

    @state.setter
    def state(self, value):
        # A tree that was saved and loaded holds lists for the operator's NamedTuple: the layer restores it.
        self.memory, self.conv, self.offset = value

    @classmethod
    def from_state(cls, state) -> "HLACache":
        cache = cls()
        cache.state = state
        return cache

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for _, a in tree_flatten(self.state) if isinstance(a, mx.array))

    def empty(self) -> bool:
        return self.memory is None

    def size(self) -> int:
        """Length of a key-value buffer: there is none."""
        return 0

    def is_trimmable(self) -> bool:
        return False

    def __repr__(self):
        return f"HLACache(empty={self.empty()}, nbytes={self.nbytes})"
