"""What a layer carries from one call to the next, in mlx-lm's cache protocol.

`state` (a tree of arrays, settable), `from_state`, `nbytes`, `empty`, `size`, `is_trimmable`. Arrays are
never changed in place, so `copy.copy(cache)` is a snapshot that costs nothing.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlx_hla.trees import flat

# B batch, H heads, T time, D head dim, C convolution channels

BUFFER_STEP = 256


class Cache:
    """What every cache has in common."""

    state: Any
    conv: mx.array | None
    # Whether the arrays of `state` keep their number and shapes from the first token on.
    constant = True

    @classmethod
    def from_state(cls, state: Any):
        cache = cls()
        cache.state = state
        return cache

    def assign(self, other: Cache) -> None:
        """Hold what the other one holds."""
        vars(self).update(vars(other))

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in arrays(self.state))

    def empty(self) -> bool:
        raise NotImplementedError

    def is_trimmable(self) -> bool:
        """Whether the last tokens can be taken back: a recurrence or a convolution cannot forget them."""
        return False

    def __repr__(self) -> str:
        return f"{type(self).__name__}(empty={self.empty()}, nbytes={self.nbytes})"


class HLACache(Cache):
    """Carried state of one mixer of constant state: so many bytes, whatever was read before.

    memory: the operator's state (a NamedTuple of float32 arrays) or the window's (`WindowState`), or None
        before the first token.
    conv: the last `conv_size - 1` inputs of the short convolution, [B, conv_size - 1, C], or None.
    offset: tokens read per row, int32 [B]; kept only by an `HLAttention` that rotates (`rope`), else None.

    mlx-lm's `generate_step` takes it, and `save_prompt_cache` saves it; `load_prompt_cache` looks a cache's
    class up in its own module, so set `mlx_lm.models.cache.HLACache = HLACache` before it.
    """

    def __init__(self) -> None:
        self.memory: Any = None
        self.conv: mx.array | None = None
        self.offset: mx.array | None = None

    @property
    def state(self) -> Any:
        return self.memory, self.conv, self.offset

    @state.setter
    def state(self, value: Any) -> None:
        # A tree that was saved and loaded holds lists for the operator's NamedTuple: the layer restores it.
        self.memory, self.conv, self.offset = _parts("HLACache", "memory, conv, offset", value)

    def empty(self) -> bool:
        return self.memory is None

    def size(self) -> int:
        """Length of a key-value buffer: there is none."""
        return 0


class KVCache(Cache):
    """Keys and values of everything read so far, for softmax attention, and the convolution's last inputs.

    The buffers grow by `BUFFER_STEP` tokens at a time; only the first `length` of them are filled.
    seen: which of these are real tokens of the row's last segment, bool [B, length]; None: all.
    offset: real tokens read per row, int32 [B]; None: `length` of them.
    """

    constant = False

    def __init__(self) -> None:
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.conv: mx.array | None = None
        self.seen: mx.array | None = None
        self.offset: mx.array | None = None
        self.length = 0

    def append(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Add keys and values [B, H, T, D]; returns all of them."""
        end = self.length + keys.shape[2]
        self.keys = _written(self.keys, keys, self.length)
        self.values = _written(self.values, values, self.length)
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    @property
    def state(self) -> Any:
        if self.keys is None or self.values is None:
            return None, None, self.conv, self.seen, self.offset
        filled = (a[:, :, : self.length] for a in (self.keys, self.values))
        return *filled, self.conv, self.seen, self.offset

    @state.setter
    def state(self, value: Any) -> None:
        names = "keys, values, conv, seen, offset"
        self.keys, self.values, self.conv, self.seen, self.offset = _parts("KVCache", names, value)
        self.length = 0 if self.keys is None else self.keys.shape[2]

    def empty(self) -> bool:
        return self.keys is None

    def size(self) -> int:
        return self.length


def _parts(who: str, names: str, state: Any) -> Any:
    if not isinstance(state, tuple | list) or len(state) != names.count(",") + 1:
        got = f"{len(state)} entries" if isinstance(state, tuple | list) else type(state).__name__
        raise ValueError(f"[{who}] state must be ({names}), got {got}")
    return state


def _written(buffer: mx.array | None, new: mx.array, offset: int) -> mx.array:
    """The buffer with `new` from `offset` on, longer if it has to be.

    `slice_update` writes into the buffer's memory if nobody else holds it, and copies it if a snapshot does;
    `buffer[...] = new` would change the snapshot's array as well.
    """
    batch, heads, length, dim = new.shape
    end = offset + length
    if buffer is None or end > buffer.shape[2]:
        room = -(-end // BUFFER_STEP) * BUFFER_STEP - offset
        blank = mx.zeros((batch, heads, room, dim), new.dtype)
        buffer = blank if buffer is None else mx.concatenate([buffer[:, :, :offset], blank], axis=2)
    return mx.slice_update(buffer, new, mx.array([offset]), axes=(2,))


def arrays(tree: Any) -> list[mx.array]:
    """The arrays of a state, in order, without the Nones."""
    return list(flat(tree).values())


def fill(tree: Any, leaves: Any) -> Any:
    """The tree with its arrays replaced, in order, by `leaves`; named tuples become plain ones."""
    leaves = iter(leaves)

    def walk(node):
        if isinstance(node, mx.array):
            return next(leaves)
        if isinstance(node, list | tuple):
            return list(map(walk, node)) if isinstance(node, list) else tuple(map(walk, node))
        return node

    return walk(tree)


def cache_bytes(cache: list) -> int:
    return sum(c.nbytes for c in cache)


def eval_cache(cache: list) -> None:
    mx.eval([arrays(c.state) for c in cache])
