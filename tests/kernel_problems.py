"""The problems of `ops_reference` put to the kernels, on the stand-in, under several thread schedules."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import assert_close, to_numpy
from ops_reference import OPERATORS, ROUNDOFF, Problem, check_state, function, leaves, rebuild
from ops_reference import Case as Case
from standin import metal

from mlx_hla import kernels
from mlx_hla.ops import on_kernels
from mlx_hla.ops.checks import Call, canonical_step
from mlx_hla.ops.operator import Held

needs_standin = pytest.mark.skipif(metal.why_not() is not None, reason=str(metal.why_not()))

# Operators that have kernels of their own, and those that are passes on the kernels of first order.
FAMILIES = [op for op, tested in OPERATORS.items() if tested.operator.family]
COMPOSED = [op for op in OPERATORS if op not in FAMILIES]
PACKED = [op for op in FAMILIES if any(slot.symmetric for slot in OPERATORS[op].operator.slots)]
PLAIN = [op for op in FAMILIES if not OPERATORS[op].options]
each_family = pytest.mark.parametrize("op", FAMILIES)
each_composed = pytest.mark.parametrize("op", COMPOSED)

# Orders in which the stand-in runs simdgroups and lanes; every one must give the same bits. Two threads that
# write the same value to one place are refused in the first.
THREADS = (
    {"schedule": "reverse", "strict_writes": True},
    {"schedule": "interleave"},
    {"schedule": "random", "seed": 7},
)

# How a sequence is scheduled, by what `plan` reads: one walk over all of it, or blocks of one chunk.
SCHEDULES = {"walk": {"fill": lambda: 1}, "blocks": {"min_block": lambda: 32, "fill": lambda: 64}}


def use_schedule(monkeypatch, name):
    for constant, value in SCHEDULES[name].items():
        monkeypatch.setattr(f"mlx_hla.kernels.plan.{constant}", value)


def through_kernels(op):
    """The public operator on the kernels of the GPU that a stand-in stands for."""
    f = function(op)
    return lambda *qkv, **options: f(*qkv, backend=kernels.gpu.language().name, **options)


def through_steps(op, packed=False):
    """The same token by token; no mask, no segments. packed: S comes and goes as its upper triangle."""
    tested = OPERATORS[op]

    def run(q, k, v, *, mask=None, segment_ids=None, initial_state=None, **options):
        assert mask is None
        assert segment_ids is None
        state, outputs = initial_state, []
        if packed and state is not None:
            state = state._replace(S=kernels.pack(state.S))
        for t in range(q.shape[1]):
            here = {n: x[:, t] if isinstance(x, mx.array) and x.ndim == 3 else x for n, x in options.items()}
            token = (x[:, t] for x in (q, k, v))
            if packed:
                call = canonical_step(op, *token, tested.operator.options, tested.options, **here)
                o, state = on_kernels.step(tested.operator, call, state, packed=True)
            else:
                o, state = function(op, step=True)(*token, state, backend=kernels.gpu.language().name, **here)
            outputs.append(o)
        return mx.stack(outputs, axis=1), state._replace(S=kernels.unpack(state.S)) if packed else state

    return run


# ---- the kernels with states as tuples of arrays, in the order of the state's fields


def _call(op, q, k, v, g, scale, eps, ridge, decay_gradient=True):
    options = {o.name: ridge for o in OPERATORS[op].operator.options}
    normalize = eps is not None
    return Call(
        op,
        q,
        k,
        v,
        g,
        scale,
        normalize,
        eps or 0.0,
        decay_gradient=decay_gradient and g is not None,
        options=options,
    )


def _state(op, arrays):
    """The state of `arrays`: its matrices, then, if there are more, their normalisers."""
    if arrays is None:
        return None
    slots = OPERATORS[op].operator.slots
    vectors = iter(arrays[len(slots) :])
    held = {
        s.key: Held(x, next(vectors, None) if s.normaliser else None)
        for s, x in zip(slots, arrays, strict=False)
    }
    return OPERATORS[op].operator.state_of(held)


def _arrays_of(op, state):
    held = OPERATORS[op].operator.held(state).values()
    return (*(x.matrix for x in held), *(x.vector for x in held if x.vector is not None))


def sequence(op, q, k, v, g=None, state=None, *, scale=1.0, eps=None, ridge=0.0, decay_gradient=True):
    """(o, state) of a sequence by the kernels."""
    call = _call(op, q, k, v, g, scale, eps, ridge, decay_gradient)
    o, state = on_kernels.KernelSequence(OPERATORS[op].operator, call, _state(op, state)).run()
    return o, _arrays_of(op, state)


def step(op, q, k, v, g=None, state=None, *, scale=1.0, eps=None, ridge=0.0, packed=False):
    """(o, state) of one token by its kernel."""
    call = _call(op, q, k, v, g, scale, eps, ridge)
    o, state = on_kernels.step(OPERATORS[op].operator, call, _state(op, state), packed)
    return o, _arrays_of(op, state)


class KernelProblem(Problem):
    """A problem whose operator is `make(op)`: `through_kernels` or one of its like."""

    def __init__(self, op, case, seed=0, poison=True, make=through_kernels):
        super().__init__(op, case, seed, poison)
        self.function = make(op)

    def _decay(self):
        """Zeros and tiny decays at the borders of chunks of 32 and 64 tokens, and beside each other."""
        if self.case.decay != "extreme":
            return super()._decay()
        c = self.case
        g = self.rng.uniform(0.5, 1.0, (c.B, c.T, c.Hkv))
        for t, value in (
            (0, 0.0),
            (6, 1e-12),
            (7, 0.0),
            (8, 0.0),
            (31, 0.0),
            (32, 1e-30),
            (63, 1e-30),
            (64, 0.0),
        ):
            if t < c.T:
                g[0, t, 0] = value
        for t, value in ((5, 1e-30), (30, 1e-20), (31, 1e-30), (32, 0.0), (33, 0.0)):
            if t < c.T:
                g[-1, t, -1] = value
        g[-1, c.T // 2 : c.T // 2 + 6, 0] = 1.0
        return g

    def call(self, *arrays, f=None):
        return super().call(*arrays, f=f or self.function)

    def ops(self, *arrays):
        """The same call through MLX's ops."""
        f = function(self.op)
        return super().call(*arrays, f=lambda *a, **options: f(*a, backend="mlx", **options))

    def flat(self, call=None):
        """f(arrays) -> [o, the state's leaves]."""

        def f(*arrays):
            o, state = (call or self.call)(*arrays)
            return [o, *leaves(state).values()]

        return f

    def given(self):
        """Incoming gradients of o and of the state's leaves."""
        o, state = self.run()
        do, dstate = self.cotangents(o, state)
        return [do, *dstate]

    def all_gradients(self, given, call=None):
        """By input name, through o and the final state at once."""
        _, grads = mx.vjp(self.flat(call), list(self.arrays.values()), given)
        for (name, x), d in zip(self.arrays.items(), grads, strict=True):
            assert x.dtype == d.dtype, f"d{name} is {d.dtype}, expected {x.dtype}"
        return dict(zip(self.arrays, grads, strict=True))

    def in_float64(self, given):
        """The same in float64."""
        do, *dstate = (to_numpy(x) for x in given)
        return self.wanted(do, rebuild(self.shape, dstate))

    def tolerance(self, gradient=False, result=None):
        """`bound`, and what the kernels round to the inputs' dtype on the way.

        In bfloat16 K̃ (or R) is rounded once between two launches, and the gradients that two passes add to
        one input each on their own; float16, and any half type that is normalised, keeps everything but the
        results in float32.
        """
        dtype = self.case.dtype
        if self.case.normalize and dtype == "bf16":
            roundings = (0, 1)[gradient]
        else:
            roundings = {"f32": (0, 0), "f16": (0, 1), "bf16": (1, 3)}[dtype][gradient]
        return self.bound(gradient, result) + roundings * ROUNDOFF[dtype]

    def check(self, gradients=True, threads=THREADS, options=metal.options):
        """Values and gradients against float64 and the ops path; one and the same bits in every order."""
        given = self.given() if gradients else None
        runs = []
        for how in threads:
            with options(**how):
                o, state = self.run()
                runs.append((o, state, self.all_gradients(given) if gradients else {}))
                mx.eval(runs[-1])
        o, state, grads = runs[0]
        for how, other in zip(threads[1:], runs[1:], strict=True):
            assert same_bits(runs[0], other), f"{how} gives other bits than {threads[0]}"
        want_o, want_state = self.expected()
        assert o.dtype == self.arrays["q"].dtype
        assert_close(f"{self.op} o", o, want_o, self.tolerance(result=o))
        check_state(self.op, state, want_state, self.tolerance())
        if self.mask is not None:
            assert not to_numpy(o)[~self.mask].any(), "a masked token must give 0"
        ops_o, ops_state = self.ops(*self.arrays.values())
        assert_close(f"{self.op} o, kernels and ops", o, ops_o, 2 * self.tolerance(result=o))
        for name, x in leaves(ops_state).items():
            assert_close(f"{self.op} {name}, kernels and ops", leaves(state)[name], x, 2 * self.tolerance())
        if gradients:
            want, ops = self.in_float64(given), self.all_gradients(given, self.ops)
            for name, x in grads.items():
                tol = self.tolerance(True, x)
                assert_close(f"{self.op} d{name}", x, want[name], tol)
                assert_close(f"{self.op} d{name}, kernels and ops", _visible(x), _visible(ops[name]), 2 * tol)
        return o, state, grads


def _visible(x):
    """Zeros for what comes through a decay of 0: the ops path's reverse mode takes that for 1e-30."""
    x = to_numpy(x)
    return np.where(np.abs(x) < 1e-25, 0.0, x)


def _arrays(tree):
    if isinstance(tree, mx.array):
        return [tree]
    items = tree.values() if isinstance(tree, dict) else tree or ()
    return [x for item in items for x in _arrays(item)]


def bits(x):
    return np.array(x.view({2: mx.uint16, 4: mx.uint32}[x.dtype.size]))


def same_bits(a, b):
    a, b = _arrays(a), _arrays(b)
    return len(a) == len(b) and all(np.array_equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True))
