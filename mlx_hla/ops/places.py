"""Where an operator's passes run: over a whole sequence in chunks, or over one token, on MLX ops.

An operator's composition is written once, in terms of a place: its arrays q, k, v and

    la(slot, q, k, v)         LA_g(q, k, v) from the state `slot` before the first token, which it moves on
    la_before(slot, q, k, v)  the same, read before each token is added, and the state left where it was
    count(slot)               n_t = g_t n_{t-1} + 1, the decayed number of tokens

v None stands for the keys themselves. The places differ in layout only, which `per_query` (k once for each
query head), `coefficient` (a number per token and query head) and `scaled_q` hide.
"""

# B batch, T time, H kv heads, G query heads per kv head, D key dim, V value dim, N chunks, W chunk width

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

import mlx.core as mx

from ..devices import on_gpu
from .checks import Call, fail
from .operator import Held, Operator
from .parallel import Turns, left
from .primitive import chunked_la
from .scan import make_decay

# Chunk width. A token costs W (D + Dv) products with the others of its chunk and 2 D Dv with states, and a
# chunk's state is written and scanned: measured on CPUs, with and without a fast BLAS, the first is best
# half of the second. A GPU runs short of bandwidth first and prefers fewer states.
WIDTH_CPU, WIDTH_GPU = 64, 128  # the widest


def chunk_width(T: int, D: int, Dv: int) -> int:
    balanced = D * Dv // (D + Dv) // 8 * 8
    return min(T, WIDTH_GPU if on_gpu() else min(WIDTH_CPU, max(16, balanced)))


class Place(ABC):
    """One run of an operator: its inputs in the place's layout, its states before and after."""

    q: mx.array
    k: mx.array
    v: mx.array  # normalising, with a last column of ones

    def __init__(self, operator: Operator, call: Call, state: Any):
        self.operator, self.call, self.dims = operator, call, call.dims
        held = {} if state is None else operator.held(state)
        self.before = {key: self._enter(x) for key, x in held.items()}
        self.after: dict[str, mx.array] = {}
        self.turns = None if call.group is None else Turns(call.group, call.q)

    @abstractmethod
    def la(
        self,
        slot: str,
        q: mx.array,
        k: mx.array,
        v: mx.array | None,
        *,
        power: int = 1,
        scale: float | None = None,
        last: bool = False,
    ) -> mx.array:
        """LA_{g^power}: `S_t = g_t^power S_{t-1} + k_t v_tᵀ`, `o_t = scale · S_tᵀ q_t`.

        scale None: the call's.
        last: o is what the operator gives, and no pass reads it any more.
        """

    @abstractmethod
    def la_before(self, slot: str, q: mx.array, k: mx.array, v: mx.array | None) -> mx.array:
        """`o_t = S_{t-1}ᵀ q_t` for the state that `la` with this slot, k and v goes through, at scale 1."""

    @abstractmethod
    def count(self, slot: str) -> mx.array:
        """`n_t = g_t n_{t-1} + 1`, float32, to divide by: 1 where no token has been counted yet."""

    @abstractmethod
    def per_query(self, x: mx.array) -> mx.array:
        """An array of key-value heads once for each query head."""

    @abstractmethod
    def coefficient(self, name: str) -> float | mx.array:
        """The call's option of this name: a number, or float32 with one for each token and query head."""

    @abstractmethod
    def result(self, o: mx.array) -> mx.array:
        """o `[B, T, Hq, V]` (a token: `[B, Hq, V]`) in the dtype of q, normalised where asked."""

    def _enter(self, held: Held) -> mx.array:
        """A state in this place's layout, its normaliser as one more column."""
        matrix, vector = held
        return matrix if vector is None else mx.concatenate([matrix, vector[..., None]], axis=-1)

    def _leave(self, x: mx.array) -> mx.array:
        """The inverse of `_enter`, but for the column: `[B, heads, D, V]`, or a count `[B, heads]`."""
        return x

    def scaled_q(self, by: float = 1.0) -> mx.array:
        """by · scale · q, for passes in which a query is a key or a value, or part of one."""
        q = self.q if self.call.scale == 1 else (self.q * self.call.scale).astype(self.q.dtype)
        return q if by == 1 else by * q

    def state(self) -> Any:
        """The operator's state after the last token."""
        held = {}
        for slot in self.operator.slots:
            x = self._leave(self.after[slot.key])
            parted = self.call.normalize and slot.normaliser
            held[slot.key] = Held(x[..., :-1], x[..., -1]) if parted else Held(x)
        return self.operator.state_of(held)

    def run(self) -> tuple[mx.array, Any]:
        o = self.operator.compose(self)
        return self.result(o), self.state()


def mixture(a: float | mx.array, x: mx.array, b: float | mx.array, y: mx.array) -> mx.array:
    """a x + b y, rounded once, to the dtype of y."""
    return (a * x.astype(mx.float32) + b * y.astype(mx.float32)).astype(y.dtype)


def number(call: Call, name: str) -> float:
    """The call's option of this name, one that takes numbers only."""
    value = call.options[name]
    assert isinstance(value, float)
    return value


def earlier(x: mx.array, fill: float = 0.0) -> mx.array:
    """`[B, T, ..]` one token later: at t stands what was at t - 1."""
    return mx.pad(x[:, :-1], [(0, 0), (1, 0), *[(0, 0)] * (x.ndim - 2)], constant_values=fill)


class Tokens(Place):
    """What places of several tokens share."""

    def count(self, slot: str) -> mx.array:
        call, first = self.call, self.before.get(slot)
        B, T = call.q.shape[:2]
        real = mx.ones((B, T)) if call.mask is None else call.mask.astype(mx.float32)
        first = None if first is None else self._leave(first)
        if call.g is None and call.group is None:
            start = mx.zeros((B, self.dims.Hkv)) if first is None else first
            n = mx.cumsum(real, axis=1)[..., None] + start[:, None]
            last = n[:, -1]
        else:  # the pass on q = k = v = 1
            k = mx.broadcast_to(real[..., None, None], (B, T, self.dims.Hkv, 1))
            one = mx.ones_like(k)
            ones = replace(call, q=one, k=k, v=one, scale=1.0, normalize=False, options={}, empty=False)
            place = Sequence(self.operator, ones, None)
            place.turns = self.turns
            if first is not None:
                place.before[slot] = first[..., None, None, None]
            n = place.result(place.la(slot, place.q, place.k, place.v))[..., 0]
            last = place.after[slot][..., 0, 0, 0]
        self.after[slot] = self._enter(Held(last))
        if call.mask is not None:  # masked tokens before the first real one
            n = mx.where(call.mask[..., None], n, 1.0)
        return self._token_heads(n)

    @abstractmethod
    def _token_heads(self, x: mx.array) -> mx.array:
        """float32 `[B, T, heads]` in the layout of q, one column wide."""

    def coefficient(self, name: str) -> float | mx.array:
        value = self.call.options[name]
        return value if isinstance(value, float) else self._token_heads(value)

    @abstractmethod
    def _pass(
        self, first: mx.array | None, q: mx.array, k: mx.array, v: mx.array | None, **options: Any
    ) -> tuple[mx.array, mx.array]:
        """(o, the state after the last token) of a pass from the state `first`; options as `la` has them."""

    @abstractmethod
    def _left(self, k: mx.array, v: mx.array, power: int) -> mx.array:
        """The state that a pass on k and v alone leaves."""

    @abstractmethod
    def _through(self, state: mx.array, power: int) -> mx.array:
        """Π_t g_t^power, in a shape that multiplies this state."""

    def la(self, slot, q, k, v, *, power=1, scale=None, last=False):
        options = {"power": power, "scale": self.call.scale if scale is None else scale, "last": last}
        first = self.before.get(slot)
        if self.turns is None:
            o, self.after[slot] = self._pass(first, q, k, v, **options)
            return o
        own = self._left(k, k if v is None else v, power)
        first, self.after[slot] = self.turns.joined(first, own, self._through(own, power))
        return self._pass(first, q, k, v, **options)[0]

    def _decay_product(self, power: int) -> mx.array:
        """Π_t g_t^power, `[B, Hkv]`."""
        g = self.call.g
        return mx.ones((self.dims.B, self.dims.Hkv)) if g is None else mx.prod(g, axis=1) ** power

    def _check_alone(self) -> None:
        if self.call.group is not None:
            fail(self.call.op, "group must be None: this variant reads states before their tokens", "a group")


class _Grouped(Place):
    """States `[B, H, G or 1, D, V]`: the query heads of a key-value head have an axis of their own."""

    def _enter(self, held):
        x = super()._enter(held)
        return x if x.ndim == 2 else x.reshape(x.shape[0], self.dims.Hkv, -1, *x.shape[2:])

    def _leave(self, x):
        return x if x.ndim == 2 else x.flatten(1, 2)

    def per_query(self, x):
        return mx.broadcast_to(x, (*self.q.shape[:-2], *x.shape[-2:]))


class Sequence(Tokens, _Grouped):
    """All tokens at once. q, k, v in chunk layout, see `primitive`."""

    def __init__(self, operator: Operator, call: Call, state: Any):
        super().__init__(operator, call, state)
        self.T = call.q.shape[1]
        self.width = chunk_width(self.T, self.dims.D, self.dims.Dv)
        # float16 has too little range for sums of products; the CPU's half-precision products are slow.
        native = on_gpu() and call.q.dtype != mx.float16 and not operator.wide
        self.dtype = call.q.dtype if native else mx.float32
        self.q, self.k, self.v = (self._chunks(x, self.dtype) for x in (call.q, call.k, call.values))
        g = call.g
        self.g = None if g is None else self._decay(g)
        self.decay = None if self.g is None else make_decay(self.g)

    @property
    def _padding(self) -> int:
        return -self.T % self.width

    def _chunks(self, x: mx.array, dtype: mx.Dtype, fill: float = 0.0) -> mx.array:
        """[B, T, H·G, D] -> [B, H, N, G, W, D]."""
        if self._padding:
            x = mx.pad(x, [(0, 0), (0, self._padding), (0, 0), (0, 0)], constant_values=fill)
        B, _, heads, D = x.shape
        Hkv = self.dims.Hkv
        x = x.reshape(B, -1, self.width, Hkv, heads // Hkv, D).transpose(0, 3, 1, 4, 2, 5)
        return mx.contiguous(x.astype(dtype))

    def _decay(self, g: mx.array) -> mx.array:
        """[B, T, H] -> [B, H, N, W]."""
        g = mx.pad(g, [(0, 0), (0, self._padding), (0, 0)], constant_values=1.0)
        return g.reshape(g.shape[0], -1, self.width, self.dims.Hkv).transpose(0, 3, 1, 2)

    def _token_heads(self, x: mx.array) -> mx.array:
        return self._chunks(x[..., None], mx.float32, fill=1.0)  # somebody may divide by it

    def _pass(self, first, q, k, v, *, power, scale, last):
        return chunked_la(q, k, k if v is None else v, self.decay, first, scale, power)

    def _left(self, k, v, power):
        def tokens(x):  # [B, H, N, G, W, D] -> [B, H, G, N W, D]
            return x.transpose(0, 1, 3, 2, 4, 5).flatten(3, 4)

        g = None if self.g is None else tokens(self.g[:, :, :, None, :, None])
        return left(tokens(k), tokens(v), g, power)

    def _through(self, state, power):
        return self._decay_product(power)[..., None, None, None]

    def la_before(self, slot, q, k, v):
        self._check_alone()
        decay = None
        if self.g is not None:
            decay = make_decay(self._earlier(self.g[..., None, :, None], 1.0)[..., 0, :, 0])
        k, v = self._earlier(k), self._earlier(k if v is None else v)
        o = chunked_la(q, k, v, decay, self.before.get(slot), 1.0, 1)[0]
        if self.call.starts is None:
            return o
        # Before the first token of a segment there is nothing, whatever its own decay.
        starts = mx.pad(self.call.starts, [(0, 0), (0, self._padding)])
        starts = starts.reshape(starts.shape[0], 1, -1, 1, self.width, 1)
        return mx.where(starts, mx.zeros((), o.dtype), o)

    def _earlier(self, x: mx.array, fill: float = 0.0) -> mx.array:
        """`earlier` in chunk layout."""
        flat = x.transpose(0, 1, 3, 2, 4, 5)
        shape = flat.shape
        flat = flat.reshape(*shape[:3], -1, shape[-1])
        flat = mx.pad(flat[..., :-1, :], [(0, 0)] * 3 + [(1, 0), (0, 0)], constant_values=fill)
        return flat.reshape(shape).transpose(0, 1, 3, 2, 4, 5)

    def result(self, o):
        """[B, H, N, G, W, V] -> [B, T, Hq, V]."""
        B, V = o.shape[0], o.shape[-1]
        o = o.transpose(0, 2, 4, 1, 3, 5).reshape(B, -1, self.dims.Hq, V)
        return self.call.result(o[:, : self.T])


class Token(_Grouped):
    """One token in float32. q `[B, H, G, 1, D]`, k and v `[B, H, 1, 1, D]`, states `[B, H, G or 1, D, V]`."""

    def __init__(self, operator: Operator, call: Call, state: Any):
        super().__init__(operator, call, state)
        self.q, self.k, self.v = (self._heads(x) for x in (call.q, call.k, call.values))
        self.g = None if call.g is None else call.g[..., None, None, None]

    def _heads(self, x: mx.array) -> mx.array:
        return x.astype(mx.float32).reshape(self.dims.B, self.dims.Hkv, -1, 1, x.shape[-1])

    def la(self, slot, q, k, v, *, power=1, scale=None, last=False):
        state, first = k.swapaxes(-1, -2) * (k if v is None else v), self.before.get(slot)
        if first is not None:
            state = state + (first if self.g is None else self.g**power * first)
        self.after[slot] = state
        scale = self.call.scale if scale is None else scale
        return scale * (q @ state)

    def la_before(self, slot, q, k, v):
        first = self.before.get(slot)
        if first is None:
            return mx.zeros((*q.shape[:-1], (k if v is None else v).shape[-1]))
        return q @ first

    def count(self, slot):
        n, first = mx.ones((self.dims.B, self.dims.Hkv)), self.before.get(slot)
        if first is not None:
            n = n + (first if self.call.g is None else self.call.g * first)
        self.after[slot] = n
        return n[..., None, None, None]

    def coefficient(self, name):
        value = self.call.options[name]
        return value if isinstance(value, float) else self._heads(value[..., None])

    def result(self, o):
        return self.call.result(o.reshape(o.shape[0], self.dims.Hq, o.shape[-1]))
