"""The problems of `ops_reference` put to the kernels, on the stand-in, under several thread schedules."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import assert_close, to_numpy
from ops_reference import ROUNDOFF, Case, Problem, check_state, function, leaves, rebuild, reference_vjp
from standin import metal

import mlx_hla
from mlx_hla import kernels
from mlx_hla.ops.checks import canonical, canonical_step

needs_standin = pytest.mark.skipif(metal.why_not() is not None, reason=str(metal.why_not()))

FAMILIES = {"first": "linear", "hla2": "hla2", "hla2-ridge": "hla2", "ahla": "ahla", "hla3": "hla3"}
each_family = pytest.mark.parametrize("op", FAMILIES)

# Where each family's normaliser is kept: the last column of a matrix of the state.
NORMALISERS = {
    "linear": {"P": "m"},
    "hla2": {"S": None, "F": "eta"},
    "ahla": {"P": "m", "E": "n"},
    "hla3": {"S": None, "P": "m", "F": "eta"},
}
STATES = {"linear": "LinearState", "hla2": "HLA2State", "ahla": "AHLAState", "hla3": "HLA3State"}

# Orders in which the stand-in runs simdgroups and lanes; every one must give the same bits. Two threads that
# write the same value to one place are refused in the first.
THREADS = (
    {"schedule": "reverse", "strict_writes": True},
    {"schedule": "interleave"},
    {"schedule": "random", "seed": 7},
)

# How a sequence is scheduled, by what `plan` reads: one walk over all of it, or blocks of one chunk.
SCHEDULES = {"walk": {"FILL": 1}, "blocks": {"MIN_BLOCK": 32, "FILL": 64}}


def use_schedule(monkeypatch, name):
    for constant, value in SCHEDULES[name].items():
        monkeypatch.setattr(f"mlx_hla.kernels.plan.{constant}", value)


def _columns(family, state, normalize):
    """A state's NamedTuple as the kernels take it: normalisers as last columns."""
    out = []
    for name, vector in NORMALISERS[family].items():
        x = getattr(state, name)
        if normalize and vector:
            x = mx.concatenate([x, getattr(state, vector)[..., None]], axis=-1)
        out.append(x)
    return tuple(out)


def _named(family, arrays, normalize):
    """The inverse of `_columns`."""
    fields = {}
    for (name, vector), x in zip(NORMALISERS[family].items(), arrays, strict=True):
        fields[name] = x[..., :-1] if normalize and vector else x
        if normalize and vector:
            fields[vector] = x[..., -1]
    return getattr(mlx_hla, STATES[family])(**fields)


def _result(call, o, dtype):
    if call.ones is None:
        return o
    den = o[..., -1:].astype(mx.float32) + call.eps
    if call.mask is not None:
        den = mx.where(call.mask[..., None, None], den, 1.0)
    return (o[..., :-1].astype(mx.float32) / den).astype(dtype)


def _values(call):
    return call.v if call.ones is None else mx.concatenate([call.v, call.ones], axis=-1)


def through_kernels(op):
    """The operator with the public signature, by one call of `mlx_hla.kernels`."""
    family = FAMILIES[op]
    ridge = {"ridge": 0.3} if op == "hla2-ridge" else {}

    def run(q, k, v, *, scale, normalize, eps, decay=None, mask=None, segment_ids=None, initial_state=None):
        call = canonical(family, q, k, v, scale, decay, normalize, eps, mask, segment_ids)
        state = None if initial_state is None else _columns(family, initial_state, normalize)
        o, state = getattr(kernels, family)(
            call.q, call.k, _values(call), call.g, state, scale=scale, **ridge
        )
        return _result(call, o, q.dtype), _named(family, state, normalize)

    return run


def through_steps(op, packed=False):
    """The same by one `kernels.step` for every token; no mask, no segments."""
    family = FAMILIES[op]
    ridge = 0.3 if op == "hla2-ridge" else 0.0

    def run(q, k, v, *, scale, normalize, eps, decay=None, mask=None, segment_ids=None, initial_state=None):
        assert mask is None
        assert segment_ids is None
        state = None if initial_state is None else _columns(family, initial_state, normalize)
        if packed and state:
            state = (kernels.pack(state[0]), *state[1:])
        outputs = []
        for t in range(q.shape[1]):
            g = decay[:, t] if isinstance(decay, mx.array) and decay.ndim == 3 else decay
            call = canonical_step(family, q[:, t], k[:, t], v[:, t], scale, g, normalize, eps)
            o, state = kernels.step(
                family, call.q, call.k, _values(call), call.g, state, scale=scale, ridge=ridge, packed=packed
            )
            outputs.append(_result(call, o, q.dtype))
        if packed:
            state = (kernels.unpack(state[0]), *state[1:])
        return mx.stack(outputs, axis=1), _named(family, state, normalize)

    return run


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

    def wanted(self, given):
        """The same in float64."""
        do, *dstate = (to_numpy(x) for x in given)
        q, k, v, decay, start = self._reference
        options = {n: x for n, x in self.options.items() if n != "decay"}
        dstate = rebuild(self.shape, dstate)
        want = reference_vjp(self.op, q, k, v, decay, start, do, dstate, **options)
        return want | {f"state.{name}": x for name, x in leaves(want.pop("initial_state")).items()}

    def tolerance(self, gradient=False, result=None):
        """`bound`, and what the kernels round to the inputs' dtype on the way.

        In bfloat16 K̃ (or R) is rounded once between two launches, and the gradients that two passes add to
        one input each on their own; float16 keeps everything but the results in float32. A normaliser is a
        column of o: so is its gradient, and the two parts of a ratio's gradient cancel.
        """
        roundings = {"f32": (0, 0), "f16": (0, 1), "bf16": (1, 3)}[self.case.dtype][gradient]
        if gradient and self.case.normalize:
            roundings = 2 * roundings + 1
        return self.bound(gradient, result) + roundings * ROUNDOFF[self.case.dtype]

    def check(self, gradients=True, threads=THREADS):
        """Values and gradients against float64 and the ops path; one and the same bits in every order."""
        given = self.given() if gradients else None
        runs = []
        for how in threads:
            with metal.options(**how):
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
            want, ops = self.wanted(given), self.all_gradients(given, self.ops)
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


__all__ = [
    "FAMILIES", "SCHEDULES", "THREADS", "Case", "KernelProblem", "each_family", "needs_standin", "same_bits",
    "through_kernels", "through_steps", "use_schedule",
]  # fmt: skip
