"""Where an operator's passes run on a GPU's kernels: on those of first order, or in its own kernel."""

# B batch, T time, Hq query heads, Hkv key-value heads, D key dim, V value dim

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import mlx.core as mx

from .. import kernels
from ..kernels.one_pass import whole_decay, zero_state
from ..transforms import differentiable
from .checks import Call
from .operator import Held, Operator
from .parallel import left
from .places import Tokens, earlier, number


class KernelSequence(Tokens):
    """All tokens at once. q, k, v as the call has them, `[B, T, heads, D]`, states `[B, heads, D, V]`."""

    def __init__(self, operator: Operator, call: Call, state: Any):
        super().__init__(operator, call, state)
        self.dtype = run_dtype(operator, call)
        self.q, self.k, self.v = (x.astype(self.dtype) for x in (call.q, call.k, call.values))

    def _pass(self, first, q, k, v, *, power, scale, last):
        return kernels.linear(
            q,
            k,
            v,
            self.call.g,
            first,
            scale=scale,
            power=power,
            dtype=self.dtype if last else kernels.between(self.dtype),
            decay_gradient=self.call.decay_gradient,
        )

    def _left(self, k, v, power):
        heads = max(k.shape[2], v.shape[2])

        def tokens(x):  # [B, T, H, D] -> [B, heads, T, D]
            return mx.repeat(x, heads // x.shape[2], axis=2).transpose(0, 2, 1, 3)

        g = None if self.call.g is None else tokens(self.call.g[..., None])
        return left(tokens(k), tokens(v), g, power)

    def _through(self, state, power):
        heads = state.shape[1] // self.dims.Hkv
        return mx.repeat(self._decay_product(power), heads, axis=1)[..., None, None]

    def la_before(self, slot, q, k, v):
        self._check_alone()
        k, v = earlier(k), None if v is None else earlier(v)
        g = None if self.call.g is None else earlier(self.call.g, 1.0)
        first = self.before.get(slot)
        o, _ = kernels.linear(q, k, v, g, first, dtype=kernels.between(self.dtype))
        if self.call.starts is None:
            return o
        return mx.where(self.call.starts[..., None, None], mx.zeros((), o.dtype), o)

    def scaled_q(self, by=1.0):
        factor = by * self.call.scale
        return self.q if factor == 1 else factor * self.q.astype(kernels.between(self.dtype))

    def per_query(self, x):
        return mx.repeat(x, self.dims.Hq // x.shape[2], axis=2)

    def _token_heads(self, x):
        return self.per_query(x)[..., None]

    def result(self, o):
        return self.call.result(o)

    def run(self):
        family = self.operator.family
        if not kernels.fuses(family, self.dims.D, self.v.shape[-1]) or self.call.group is not None:
            return super().run()
        before = self.before or self._zeros()
        options = {name: number(self.call, name) for name in self.call.options}
        o, *after = kernels.FUSED[family](
            self.q,
            self.k,
            self.v,
            self.call.g,
            *(before[slot.key] for slot in self.operator.slots),
            scale=self.call.scale,
            decay_gradient=self.call.decay_gradient,
            **options,
        )
        self.after = dict(zip((slot.key for slot in self.operator.slots), after, strict=True))
        return self.result(o), self.state()

    def _zeros(self) -> dict[str, mx.array]:
        dims = self.dims._replace(Dv=self.v.shape[-1])
        return {slot.key: zero_state(slot.shape(dims)) for slot in self.operator.slots}


def run_dtype(operator: Operator, call: Call) -> mx.Dtype:
    """The dtype in which the kernels run a sequence.

    A quotient of float16 sums would overflow first, and the two parts of its gradient cancel: rounded to
    bfloat16 between launches they would leave an error of up to 2% (0.3% in float32).
    """
    return mx.float32 if operator.wide or call.normalize else call.q.dtype


# ---- one token


class Token(NamedTuple):
    """One token: q `[B, Hq, D]`, k and v `[B, Hkv, ..]`, g `[B, Hkv]`, states and normalisers."""

    q: mx.array
    k: mx.array
    v: mx.array
    g: mx.array
    matrices: tuple[mx.array, ...]
    vectors: tuple[mx.array, ...]


class Stepped(NamedTuple):
    o: mx.array
    matrices: tuple[mx.array, ...]
    vectors: tuple[mx.array, ...]


@lru_cache(maxsize=256)
def _step(
    operator: Operator,
    options: tuple[tuple[str, float], ...],
    scale: float,
    eps: float | None,
    decay: bool,
    packed: bool,
) -> Callable[[Token], Stepped]:
    """The step of an operator that has a kernel for it; its gradient is that of a sequence of one token."""
    symmetric = any(slot.symmetric for slot in operator.slots)
    assert operator.family is not None
    launch: Callable = partial(kernels.step, operator.family)
    factors = {"scale": scale, "eps": eps or 0.0, "packed": packed if symmetric else None, **dict(options)}

    def run(t: Token) -> Stepped:
        o, matrices, vectors = launch(t.q, t.k, t.v, t.g, list(t.matrices), list(t.vectors), **factors)
        return Stepped(o, tuple(matrices), tuple(vectors))

    def whole(*arrays: mx.array) -> list[mx.array]:
        q, k, v, g, *state = arrays
        n = len(operator.slots)
        matrices = [kernels.unpack(state[0]), *state[1:n]] if packed else state[:n]
        normalize = eps is not None
        token = Call(
            operator.name, q, k, v, g if decay else None, scale, normalize, eps or 0.0, options=dict(options)
        )
        o, after = KernelSequence(
            operator, token.as_sequence(), operator.state_of(_named(operator, matrices, state[n:]))
        ).run()
        matrices, vectors = _listed(operator, after)
        return [o[:, 0], *([kernels.pack(matrices[0]), *matrices[1:]] if packed else matrices), *vectors]

    def run_vjp(t: Token, out: Stepped, d: Stepped) -> Token:
        primals = [t.q, t.k, t.v, t.g, *t.matrices, *t.vectors]
        _, (q, k, v, g, *state) = mx.vjp(whole, primals, [d.o, *d.matrices, *d.vectors])
        n = len(operator.slots)
        return Token(q, k, v, g, tuple(state[:n]), tuple(state[n:]))

    return differentiable(run, run_vjp)


def _named(operator: Operator, matrices, vectors) -> dict[str, Held]:
    rest = iter(vectors)
    normalising = bool(vectors)
    return {
        slot.key: Held(x, next(rest) if normalising and slot.normaliser else None)
        for slot, x in zip(operator.slots, matrices, strict=True)
    }


def _listed(operator: Operator, state: Any) -> tuple[list[mx.array], list[mx.array]]:
    held = operator.held(state).values()
    return [x.matrix for x in held], [x.vector for x in held if x.vector is not None]


def step(operator: Operator, call: Call, state: Any, packed: bool = False) -> tuple[mx.array, Any]:
    """One token in one launch, which takes the normalisers as they are and divides: nothing is copied.

    packed: S is symmetric, and comes and goes as its upper triangle, `kernels.pack(S)`.
    """
    dims = call.dims
    if state is None:
        state = operator.zeros(dims, call.normalize)
        if packed:
            state = state._replace(S=kernels.pack(state.S))
    options = tuple((option.name, number(call, option.name)) for option in operator.options)
    eps = call.eps if call.normalize else None
    run = _step(operator, options, call.scale, eps, call.g is not None, packed)
    matrices, vectors = _listed(operator, state)
    g = whole_decay(call.g, (dims.B,))
    out = run(Token(call.q, call.k, call.v, g, tuple(matrices), tuple(vectors)))
    return out.o, operator.state_of(_named(operator, out.matrices, out.vectors))


def one_token(operator: Operator, call: Call, state: Any) -> tuple[mx.array, Any]:
    """One token: by the step's kernel where there is one, else by the passes of a sequence of one."""
    if kernels.steps(operator.family, call.dims.Hq // call.dims.Hkv):
        return step(operator, call, state)
    o, state = KernelSequence(operator, call.as_sequence(), state).run()
    return o[:, 0], state
