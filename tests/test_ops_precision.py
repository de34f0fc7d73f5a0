"""How close to float64 long sequences stay, in every dtype."""

from functools import cache

import mlx.core as mx
import numpy as np
import pytest
from conftest import assert_close, relative
from ops_reference import Case, Problem, each_operator, function, leaves

from mlx_hla.ops.operator import choices

LONG = {"T": 4096, "B": 1, "Hq": 2, "Hkv": 2, "D": 64, "V": 64}
DECAYS = pytest.mark.parametrize("decay", [None, "gates"], ids=["plain", "decay"])


@cache
def long_run(op, decay, dtype):
    """(problem, o in float64) at 4096 tokens."""
    problem = Problem(op, Case(**LONG, decay=decay, dtype=dtype))
    return problem, problem.expected()


@DECAYS
@each_operator
def test_float32_at_4096(op, decay):
    """The target for every operator is 1e-5; Algorithm 3 loses what its differences cancel."""
    problem, (want_o, want) = long_run(op, decay, "f32")
    o, state = problem.run()
    tol = 1e-5 * problem.cancellation
    assert_close("o", o, want_o, tol)
    for name, x in leaves(want).items():
        assert_close(f"state.{name}", leaves(state)[name], x, tol)


@DECAYS
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("op", choices())
def test_half_at_4096(op, dtype, decay):
    """No worse than twice what rounding the inputs costs. float16 holds no output beyond 65504."""
    want = long_run(op, decay, "f32")[1][0]
    problem, (cast, _) = long_run(op, decay, dtype)
    if dtype == "f16":
        assert np.abs(want).max() < 65504
    assert relative(problem.run()[0], want) <= 2 * relative(cast, want)


def blocked_la(q, k, v, logs, S, width=64):
    """LA_g over one head in float64, in blocks of `width` tokens: (o, S). logs: log g, T a multiple."""
    qb, kb, vb = (x.reshape(-1, width, x.shape[-1]) for x in (q, k, v))
    total = np.cumsum(logs.reshape(-1, width), axis=1)
    D = np.tril(np.exp(np.minimum(total[:, :, None] - total[:, None], 0.0)))
    o = (D * (qb @ kb.swapaxes(1, 2))) @ vb
    added = (np.exp(total[:, -1:] - total)[..., None] * kb).swapaxes(1, 2) @ vb
    carry = np.empty(added.shape)
    for n, (rho, x) in enumerate(zip(np.exp(total[:, -1]), added, strict=True)):
        carry[n] = S
        S = rho * S + x
    return (o + np.exp(total)[..., None] * (qb @ carry)).reshape(v.shape), S


def blocked_hla2(q, k, v, g, S, F):
    kt, S = blocked_la(q, k, k, np.log(g), S)
    o, F = blocked_la(q, kt, v, 2 * np.log(g), F)
    return o, S, F


def test_the_blocked_oracle():
    problem = Problem("hla2", Case(T=640, B=1, Hq=1, Hkv=1, D=4, V=3, decay="gates"))
    q, k, v, g = (x[0, :, 0] for x in problem.numbers.values())
    o, S, F = blocked_hla2(q, k, v, g, np.zeros((4, 4)), np.zeros((4, 3)))
    want_o, want = problem.expected()
    assert_close("o", o, want_o[0, :, 0], 1e-12)
    assert_close("S", S, want.S[0, 0], 1e-12)
    assert_close("F", F, want.F[0, 0], 1e-12)


@pytest.mark.parametrize("decayed", [False, True], ids=["plain", "decay"])
def test_a_million_tokens_in_segments(decayed):
    """1,048,576 tokens, 65,536 a call, against the float64 state; with a memory of 100 to 100,000 tokens."""
    total, part, D = 1 << 20, 1 << 16, 8
    rng = np.random.default_rng(0)
    state, S, F = None, np.zeros((D, D)), np.zeros((D, D))
    for _ in range(total // part):
        q, k, v = (rng.standard_normal((part, D), np.float32) for _ in range(3))
        g = 1 - 10 ** rng.uniform(-5, -2, part) if decayed else np.ones(part)
        g = g.astype(np.float32)
        given = (mx.array(x)[None, :, None] for x in (q, k, v))
        decay = mx.array(g)[None, :, None] if decayed else None
        o, state = function("hla2")(*given, decay=decay, initial_state=state)
        mx.eval(o, state)
        want_o, S, F = blocked_hla2(*(x.astype(np.float64) for x in (q, k, v, g)), S, F)
    assert_close("S", state.S[0, 0], S, 1e-4)
    assert_close("F", state.F[0, 0], F, 1e-4)
    assert_close("o of the last segment", o[0, :, 0], want_o, 1e-4)


def test_a_long_sequence_forgets_its_largest_values():
    """Numbers 1e6 times larger, long decayed away, leave no rounding error in what comes after them."""
    T = 2048
    problem = Problem("hla2", Case(T=T, B=1, Hq=1, Hkv=1, D=8, V=8, decay="gates"))
    early = (np.arange(T) < 100)[None, :, None, None]
    problem.arrays["v"] = problem.arrays["v"] * mx.array(np.where(early, 1e6, 1.0).astype(np.float32))
    problem.numbers["v"] = np.array(problem.arrays["v"], np.float64)
    want = problem.expected()[0]
    o = problem.run()[0]
    assert_close("o at the end", o[:, 400:], want[:, 400:], 1e-5)
