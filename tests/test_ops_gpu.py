"""A GPU's arithmetic on a CPU: chunks in bfloat16, states between them too, sums and results in float32."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import assert_close, relative, to_numpy
from ops_reference import (
    OPERATORS,
    ROUNDOFF,
    Case,
    Problem,
    each_operator,
    error_bound,
    gpu_dtypes,
    leaves,
    reference_vjp,
    serial,
)

import mlx_hla
from mlx_hla.ops import primitive
from mlx_hla.ops.scan import make_decay

CASES = [
    Case(T=70, dtype="bf16"),
    Case(T=70, dtype="bf16", decay="extreme", carried=True),
    Case(T=70, dtype="bf16", decay="gates", normalize=True, mask="holes", segments=True),
    Case(T=70, dtype="bf16", decay="heads", Hq=2, scale=0.5, carried=True),
]


def rounding_bound(op, gradient=False):
    """Each pass rounds its scores, its decayed operands, its states and its result: 4 roundings, no sums.

    They are random and average out over a result's terms, so their number is a generous bound.
    """
    passes = OPERATORS[op].passes * (3 if gradient else 1)
    return (4 * passes + 1) * ROUNDOFF["bf16"]


@pytest.mark.parametrize("case", CASES, ids=str)
@each_operator
def test_bfloat16_chunks(op, case, monkeypatch):
    gpu_dtypes(monkeypatch)
    problem = Problem(op, case)
    o, state = problem.run()
    want_o, want = problem.expected()
    if OPERATORS[op].operator.wide:  # in float32 there, too: its passes cancel
        problem.check_values()
        problem.check_gradients()
        return
    tol = rounding_bound(op)
    assert_close(f"{op} o", o, want_o, tol)
    assert o.dtype == mx.bfloat16
    for name, x in leaves(want).items():
        assert leaves(state)[name].dtype == mx.float32
        assert_close(f"{op} state.{name}", leaves(state)[name], x, tol)
    # What is summed from q, k and v themselves never meets a rounded number.
    first = next(iter(leaves(want)))
    assert_close(first, leaves(state)[first], leaves(want)[first], error_bound(op, case.T, case.D))
    for through in ("o", "state", "both"):
        got, want = problem.gradients(through)
        for name, x in got.items():
            tol = rounding_bound(op, gradient=True)
            assert_close(f"{op} d{name} through {through}", x, want[name], tol)


@each_operator
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_other_dtypes_keep_float32_there(op, dtype, monkeypatch):
    gpu_dtypes(monkeypatch)
    problem = Problem(op, Case(T=70, dtype=dtype, decay="gates", carried=True))
    problem.check_values()
    problem.check_gradients()


def chunks(heads, D, seed, dtype=mx.bfloat16, B=2, H=2, N=5, W=8):
    x = np.random.default_rng(seed).normal(size=(B, H, N, heads, W, D)) / np.sqrt(D)
    return mx.array(x).astype(dtype)


def in_time(x):
    """[B, H, N, G, W, D] -> [B, T, H·G, D] in float64."""
    x = to_numpy(x)
    B, H, N, G, W, D = x.shape
    return x.transpose(0, 2, 4, 1, 3, 5).reshape(B, N * W, H * G, D)


@pytest.mark.parametrize("power", [1, 3])
@pytest.mark.parametrize("groups", [1, 3], ids=["G1", "G3"])
@pytest.mark.parametrize("carried", [False, True], ids=["fresh", "carried"])
@pytest.mark.parametrize("decayed", [False, True], ids=["plain", "decayed"])
def test_the_primitive_in_bfloat16(decayed, carried, groups, power):
    """`chunked_la` itself: `output` and `state` are two functions there, with a reverse mode each."""
    q, k, v = chunks(groups, 6, 0), chunks(1, 6, 1), chunks(1, 4, 2)
    rng = np.random.default_rng(3)
    g = mx.array(rng.uniform(0.6, 1.0, (2, 2, 5, 8)).astype(np.float32)) if decayed else None
    P = mx.array(rng.normal(size=(2, 2, 1, 6, 4)).astype(np.float32)) if carried else None
    arrays = [x for x in (q, k, v, g, P) if x is not None]

    def f(q, k, v, *rest):
        rest = list(rest)
        decay = make_decay(rest.pop(0)) if decayed else None
        return primitive.chunked_la(q, k, v, decay, rest[0] if rest else None, 0.5, power)

    o, last = f(*arrays)
    assert (o.dtype, last.dtype) == (mx.bfloat16, mx.float32)
    given = [mx.array(rng.normal(size=x.shape)).astype(x.dtype) for x in (o, last)]
    options = {"decay": None, "initial_state": None}
    if decayed:
        options["decay"] = to_numpy(g).transpose(0, 2, 3, 1).reshape(2, 40, 2) ** power
    if carried:
        options["initial_state"] = mlx_hla.LinearState(to_numpy(P)[:, :, 0])
    qkv = [in_time(x) for x in (q, k, v)]
    want, end = serial("first", *qkv, scale=0.5, **options)
    assert_close("o", in_time(o), want, rounding_bound("first"))
    assert_close("state", last[:, :, 0], end.P, error_bound("first", 40, 6))
    dstate = mlx_hla.LinearState(to_numpy(given[1])[:, :, 0])
    for name, used in (("o", (1, 0)), ("state", (0, 1)), ("both", (1, 1))):
        pick = [i for i in (0, 1) if used[i]]
        _, got = mx.vjp(lambda *a, pick=pick: [f(*a)[i] for i in pick], arrays, [given[i] for i in pick])
        grads = reference_vjp(
            "first",
            *qkv,
            *options.values(),
            used[0] * in_time(given[0]),
            dstate if used[1] else None,
            scale=0.5,
        )
        # Through the state alone everything is float32 but the result.
        tol = rounding_bound("first", gradient=True) if used[0] else 2 * ROUNDOFF["bf16"]
        for x, n in zip(got, "qkv", strict=False):
            assert_close(f"d{n} through {name}", in_time(x), grads[n], tol)
        rest = list(got[3:])
        if decayed:
            d = to_numpy(rest.pop(0)).transpose(0, 2, 3, 1).reshape(2, 40, 2)
            chain = power * to_numpy(g).transpose(0, 2, 3, 1).reshape(2, 40, 2) ** (power - 1)
            assert_close(f"d decay through {name}", d, chain * grads["decay"], tol)
        if carried:
            assert_close(f"d state through {name}", rest[0][:, :, 0], grads["initial_state"].P, tol)


@each_operator
def test_twice_the_error_of_the_cast(op, monkeypatch):
    """bfloat16 chunks add no more error than the inputs' own rounding to bfloat16 has made."""
    gpu_dtypes(monkeypatch, width=64)
    case = Case(T=512, B=1, Hq=2, Hkv=1, D=32, V=32, decay="gates")
    exact, cast = Problem(op, case), Problem(op, Case(**{**vars(case), "dtype": "bf16"}))
    want = exact.expected()[0]
    allowed = 2 * relative(cast.expected()[0], want)
    assert relative(cast.run()[0], want) <= allowed
