"""Short causal convolution: one width-W filter per channel over the last W tokens.

y_t = act(Σ_{i<W} w_i ⊙ x_{t-W+1+i}), with x before the start from the carried state, or 0 without one.

Written as W shifted products rather than as a grouped `conv1d`: measured on a CPU at width 4 that is several
times as fast forward and backward, and it lets each tap be cut at a segment border.
"""

# B batch, T time, C channels, W filter width

import mlx.core as mx
import mlx.nn as nn

from mlx_hla.settings import check_whole

from .inputs import check_array, check_input
from .padding import runs_of


class ShortConv(nn.Module):
    """Depthwise causal convolution with carried state.

    Args:
        channels: number of channels C.
        width: filter width W ≥ 2; the state holds the last W - 1 inputs.
        activation: apply SiLU to the result.
    """

    def __init__(self, channels: int, width: int = 4, *, activation: bool = True):
        super().__init__()
        check_whole("[ShortConv] channels", channels, 1)
        if not isinstance(width, int) or isinstance(width, bool) or width < 2:
            raise ValueError(f"[ShortConv] width must be an integer of at least 2, got {width!r}")
        self.channels = channels
        self.width = width
        self.activation = activation
        bound = width**-0.5
        self.weight = mx.random.uniform(-bound, bound, (channels, width))

    def _extra_repr(self):
        return f"{self.channels}, width={self.width}, activation={self.activation}"

    def __call__(
        self,
        x: mx.array,
        state: mx.array | None = None,
        *,
        lengths: mx.array | None = None,
        segment_ids: mx.array | None = None,
    ) -> tuple[mx.array, mx.array]:
        """Convolve x [B, T, C]; returns (y [B, T, C], new state [B, W-1, C]).

        state: the W - 1 inputs before x.
        lengths [B]: how many leading tokens of each row are real; the rest is right padding, which comes
        after every real token and so only has to be kept out of the new state.
        segment_ids [B, T]: no tap reaches over a change of id, and the new state holds zeros for inputs of
        an earlier segment; the first token continues the state.
        """
        check_input("ShortConv", x, self.channels)
        B, T, C = x.shape
        check_array("ShortConv", "lengths", "integers", lengths, (B,), mx.integer)
        check_array("ShortConv", "segment_ids", "integers", segment_ids, (B, T), mx.integer)
        carry = self.width - 1
        if state is None:
            state = mx.zeros((B, carry, C), x.dtype)
        elif not isinstance(state, mx.array) or state.shape != (B, carry, C):
            got = state.shape if isinstance(state, mx.array) else type(state).__name__
            raise ValueError(f"[ShortConv] state must be {(B, carry, C)}, got {got}")
        padded = mx.concatenate([state.astype(x.dtype), x], axis=1)
        runs = None if segment_ids is None else runs_of(segment_ids, carry)

        weight = self.weight.astype(x.dtype)
        y = mx.array(0, x.dtype)
        for i in range(self.width):
            tap = padded[:, i : i + T]
            if runs is not None and i < carry:
                tap = mx.where((runs[:, i : i + T] == runs[:, carry:])[..., None], tap, 0)
            y = y + tap * weight[:, i]
        if self.activation:
            y = nn.silu(y)
        return y, self._tail(padded, runs, lengths)

    def _tail(self, padded, runs, lengths):
        """The last W - 1 inputs among carried state and real tokens."""
        carry = self.width - 1
        if lengths is None:
            tail = padded[:, -carry:]
            run = None if runs is None else runs[:, -carry:]
        else:
            index = lengths[:, None] + mx.arange(carry)
            tail = mx.take_along_axis(padded, index[..., None], axis=1)
            run = None if runs is None else mx.take_along_axis(runs, index, axis=1)
        if run is not None:
            tail = mx.where((run == run[:, -1:])[..., None], tail, 0)
        # A slice would keep the whole prompt's activations alive as long as the cache lives.
        return mx.contiguous(tail)
