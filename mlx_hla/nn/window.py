"""Softmax attention over the last W tokens: exact recall of what is near, at a constant state.

    o_t = Σ_{t-W < j ≤ t} softmax_j(s q_t·k_j) v_j        rotary positions count within the window

Beside layers of constant state it does what these are worst at, to repeat what was just read. Sequences are
cut into blocks of W queries, each of which sees its own block and the one before: time and memory are linear
in T, on `mx.fast.scaled_dot_product_attention`.

Keys are kept as they are and rotated where they are read, by their place in the window: only differences of
positions count, and a place is exact where the position after a million tokens is not. That is also why the
buffer is shifted by a token rather than written in a ring: places stay, and attention reads all of it anyway.
"""

# B batch, T time, Hq query heads, Hkv key-value heads, D key dim, Dv value dim, W window, N blocks, b block

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx

from .cache import HLACache
from .mixer import Mixer, SharedOptions
from .padding import runs_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


class WindowState(NamedTuple):
    """The last W tokens of each row, the newest at the end: keys [B, Hkv, W, D] before rotation, values
    [B, Hkv, W, Dv], both in the layer's dtype; n int32 [B], how many of them there are."""

    keys: mx.array
    values: mx.array
    n: mx.array


class WindowAttention(Mixer):
    """Causal softmax attention over a window of the last tokens, with the call of `HLAttention`.

    Args:
        dims: width of the input and the output.
        num_heads: query heads Hq.
        window: tokens W that a token sees, itself among them.
        num_kv_heads: key-value heads Hkv, dividing Hq; default Hq.
        head_dim: key dim D; default dims // num_heads.
        value_dim: value dim Dv; default D.
        qk_norm: "rms" (with learned gains), or None.
        conv_size: width of the causal convolution on q, k and v; 0 or None leaves it out.
        rope: True or a base for rotary positions on q and k; None leaves them out.
        output_gate: False, True or "silu", or "sigmoid": multiply by the activation of a projection of x.
        bias: biases in the projections.
    """

    def __init__(
        self,
        dims: int,
        num_heads: int,
        *,
        window: int,
        rope: bool | float | None = True,
        **shared: Unpack[SharedOptions],
    ):
        super().__init__(dims, num_heads, rope=rope, **shared)
        self._check_choice("qk_norm", self.qk_norm, ("rms", None))
        self._check_positive(window=window)
        self.window = window

    @property
    def _who(self) -> str:
        return "WindowAttention"

    def _extra_repr(self):
        return (
            f"{self.dims}, heads={self.num_heads}/{self.num_kv_heads}, head_dim={self.head_dim}, "
            f"value_dim={self.value_dim}, window={self.window}, qk_norm={self.qk_norm!r}, rope={self.rope}, "
            f"output_gate={self.output_gate!r}"
        )

    def make_cache(self) -> HLACache:
        return HLACache()

    def _attend(self, q, k, v, x, lengths, segment_ids, carried, split):
        q, k, v = (a.transpose(0, 2, 1, 3) for a in (q, k, v))
        state, after = self._restored(carried.memory, k, v), None
        if split is not None:
            held = None if state is None else (self._flat(state.keys, state.values), state.n)
            flat = self._flat(k, v)
            state, after = (self._unflat(*a) for a in split.look_back(flat, self.window, held))
        options = {"window": self.window, "rotate": self._rotated}
        o, last = window_attention(q, k, v, state, lengths, segment_ids, **options)
        carried.memory = last if after is None else after
        return o.transpose(0, 2, 1, 3)

    def _flat(self, keys, values):
        """Keys and values [B, Hkv, T, ..] of all heads, one after the other, [B, T, C]."""
        return mx.concatenate([a.transpose(0, 2, 1, 3).flatten(2) for a in (keys, values)], axis=-1)

    def _unflat(self, x, n):
        keys, values = mx.split(x, [self.num_kv_heads * self.head_dim], axis=-1)
        heads = (mx.unflatten(a, -1, (self.num_kv_heads, -1)).transpose(0, 2, 1, 3) for a in (keys, values))
        return WindowState(*heads, n)

    def _restored(self, memory, k, v):
        """The state's NamedTuple from the plain lists that a saved one comes back as, checked."""
        if memory is None:
            return None
        B, H, W = k.shape[0], self.num_kv_heads, self.window
        want = [(B, H, W, self.head_dim), (B, H, W, self.value_dim), (B,)]
        if not isinstance(memory, tuple | list) or [getattr(a, "shape", None) for a in memory] != want:
            raise ValueError(f"[WindowAttention] cache must be of this layer: keys, values, n of {want}")
        keys, values, n = memory
        return WindowState(keys.astype(k.dtype), values.astype(v.dtype), n)


def window_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    state: WindowState | None,
    lengths: mx.array | None,
    segment_ids: mx.array | None,
    *,
    window: int,
    rotate: Callable[[mx.array, int], mx.array],
) -> tuple[mx.array, WindowState]:
    """q [B, Hq, T, D], k [B, Hkv, T, D], v [B, Hkv, T, Dv] to (o [B, Hq, T, Dv], state), scale 1/√D.

    lengths [B]: leading real tokens of a row, None for all. segment_ids [B, T]: a token sees its own run of
    equal ids only. rotate(a, position): a [..., L, D] turned to the positions from `position` on.
    """
    B, _, T, D = q.shape
    W = window
    runs = None if segment_ids is None else runs_of(segment_ids, W)
    if state is None:
        state = WindowState(
            mx.zeros((B, k.shape[1], W, D), k.dtype),
            mx.zeros((B, v.shape[1], W, v.shape[3]), v.dtype),
            mx.zeros((B,), mx.int32),
        )
        if T <= W and runs is None:  # no token is out of sight of a later one
            o = _sdpa(rotate(q, 0), rotate(k, 0), v, "causal")
            return o, _next(state, *_frame(state, k, v), None, lengths, T, W)
    keys, values = _frame(state, k, v)
    if T == 1 and lengths is None and runs is None:
        keys, values = (mx.contiguous(a[:, :, 1:]) for a in (keys, values))
        new = WindowState(keys, values, mx.minimum(state.n + 1, W))
        seen = mx.arange(W) >= W - new.n[:, None]
        return _sdpa(rotate(q, W - 1), rotate(keys, 0), values, seen[:, None, None]), new
    o = _blocks(q, keys, values, state.n, runs, W, rotate)
    return o, _next(state, keys, values, runs, lengths, T, W)


def _frame(state: WindowState, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
    """Carried and new keys and values, [B, Hkv, W + T, D]: query t has the place W + t among them."""
    return mx.concatenate([state.keys, k], axis=2), mx.concatenate([state.values, v], axis=2)


def _sdpa(q, k, v, mask):
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask=mask)


def _blocks(q, keys, values, n, runs, W, rotate):
    """Blocks of b queries, each against the W + b places that end with it."""
    B, H, T, D = q.shape
    b = min(W, T)
    N = -(-T // b)
    pad = N * b - T
    q = mx.pad(q, [(0, 0), (0, 0), (0, pad), (0, 0)]).reshape(B, H, N, b, D)
    q = q.transpose(0, 2, 1, 3, 4).reshape(B * N, H, b, D)

    def paired(a):
        """[B, ..., W + T, last] to [B N, ..., W + b, last]; with several blocks b is W."""
        if N == 1:
            return a
        a = mx.pad(a, [(0, 0), (0, 0), (0, pad), (0, 0)])
        a = a.reshape(B, a.shape[1], N + 1, b, a.shape[3]).transpose(0, 2, 1, 3, 4)
        return mx.concatenate([a[:, :-1], a[:, 1:]], axis=3).flatten(0, 1)

    # Place c is seen by the query at place W + r of a block if it is at most W - 1 before it and not after.
    ahead = mx.arange(W + b) - mx.arange(b)[:, None]
    seen = ((ahead >= 1) & (ahead <= W))[None]
    there = mx.arange(W + T) >= W - n[:, None]
    seen = seen & paired(there[:, None, :, None]).squeeze(3)
    if runs is not None:
        places = paired(runs[:, None, :, None]).squeeze(3)
        seen = seen & (places == places[:, :, -b:].swapaxes(1, 2))
    seen = seen | (ahead == W)  # itself: a row of padding without any key would be NaN
    o = _sdpa(rotate(q, W), rotate(paired(keys), 0), paired(values), seen[:, None])
    o = o.reshape(B, N, H, b, -1).transpose(0, 2, 1, 3, 4)
    return o.reshape(B, H, N * b, -1)[:, :, :T]


def _next(state, keys, values, runs, lengths, T, W):
    """The state after the real tokens: the W places that end with the last of them."""
    if lengths is None:
        kept = (a[:, :, T:] for a in (keys, values))
        count = mx.minimum(state.n + T, W)
        ends = None if runs is None else runs[:, T:]
    else:
        index = lengths[:, None] + mx.arange(W)
        kept = (mx.take_along_axis(a, index[:, None, :, None], axis=2) for a in (keys, values))
        count = mx.minimum(state.n + lengths, W)
        ends = None if runs is None else mx.take_along_axis(runs, index, axis=1)
    if ends is not None:  # of the last segment only
        count = mx.minimum(count, (ends == ends[:, -1:]).sum(axis=1))
    # A slice would keep the whole prompt's keys alive as long as the cache lives.
    return WindowState(*(mx.contiguous(a) for a in kept), count.astype(mx.int32))
