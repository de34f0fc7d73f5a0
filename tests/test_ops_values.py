"""Every operator against its float64 recurrence and reverse mode: o, state and all gradients."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import assert_close, relative, to_numpy
from ops_reference import (
    Case,
    Problem,
    each_case,
    each_operator,
    error_bound,
    function,
    leaves,
    serial,
    tiny_chunks,
)

import mlx_hla

# Lengths around the chunk width, which stays as it is for these.
SHAPES = [
    Case(T=1, Hq=2, Hkv=1, D=8, V=4, decay="gates", carried=True),
    Case(T=63, D=16, V=16),
    Case(T=64, B=1, Hq=1, Hkv=1, D=4, V=4, decay="heads", carried=True),
    Case(T=257, B=1, Hq=2, Hkv=1, D=8, V=12, decay="gates", carried=True),
]
# One option after another, then together. In chunks of 8 these take five chunks and three levels.
OPTIONS = [
    Case(decay="float", scale=0.4),
    Case(decay="heads", Hq=3, Hkv=3),
    Case(decay="extreme", carried=True),
    Case(normalize=True),
    Case(normalize=True, decay="extreme", carried=True, scale=0.7),
    Case(mask="left", decay="gates", carried=True),
    Case(mask="right", normalize=True, eps=0.0),
    Case(mask="holes", decay="heads"),
    Case(segments=True, carried=True),
    Case(mask="holes", segments=True, normalize=True, decay="gates", carried=True, Hq=4, Hkv=1),
    Case(dtype="f16", decay="heads", carried=True),
    Case(dtype="bf16", decay="half", normalize=True, mask="left", segments=True),
]


@each_case(*SHAPES)
@each_operator
def test_shapes(op, case):
    problem = Problem(op, case)
    problem.check_values()
    problem.check_gradients()


@each_case(*OPTIONS)
@each_operator
def test_options(op, case, monkeypatch):
    tiny_chunks(monkeypatch)
    problem = Problem(op, case)
    problem.check_values()
    problem.check_gradients()


@pytest.mark.parametrize("through", ["o", "state"])
@each_operator
def test_gradients_through_one_result(op, through, monkeypatch):
    """Through o alone and through the final state alone, each without the other in the graph."""
    tiny_chunks(monkeypatch)
    Problem(op, Case(decay="extreme", carried=True, normalize=True)).check_gradients(through)


@each_operator
def test_gradients_at_zero_and_tiny_decays(op, monkeypatch):
    """One by one: a norm over all tokens would hide the few that matter."""
    tiny_chunks(monkeypatch)
    problem = Problem(op, Case(decay="extreme", carried=True))
    got, want = problem.check_gradients()
    got, want = to_numpy(got["decay"]), want["decay"]
    tiny = problem.numbers["decay"] < 1e-6
    assert tiny.sum() >= 8
    for index in np.argwhere(tiny):
        i = tuple(index)
        # A gradient that is small beside its neighbours has lost digits to them, not more.
        assert abs(got[i] - want[i]) <= problem.bound(gradient=True) * max(abs(want[i]), abs(want).mean()), (
            f"d decay at {i}, decay {problem.numbers['decay'][i]:g}: {got[i]:g}, expected {want[i]:g}"
        )


def views(x, kind):
    """The same numbers as x, laid out in memory in another way; x itself as `kind` shows it."""
    if kind == "transposed":
        return mx.contiguous(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    if kind == "sliced":
        wide = mx.pad(x, [(0, 0), (0, 0), (0, 0), (1, 2)], constant_values=float("nan"))
        return mx.repeat(wide, 2, axis=1)[:, ::2, :, 1:-2]
    return mx.broadcast_to(x[:1, :, :1], x.shape)


@pytest.mark.parametrize("kind", ["transposed", "sliced", "broadcast"])
@each_operator
def test_strided_inputs(op, kind, monkeypatch):
    tiny_chunks(monkeypatch)
    problem = Problem(op, Case(decay="gates"))
    arrays = [views(x, kind) if x.ndim == 4 else x for x in problem.arrays.values()]
    plain = [mx.array(np.array(x, order="C")) for x in arrays]  # without it, laid out as x is

    def results(arrays):
        def f(*arrays):
            o, state = problem.call(*arrays)
            return [o, *leaves(state).values()]

        out = f(*arrays)
        return [*out, *mx.vjp(f, arrays, [mx.ones_like(x) for x in out])[1]]

    for got, want in zip(results(arrays), results(plain), strict=True):
        assert_close(f"{op} {kind}", got, want, 1e-6)


@each_operator
def test_a_zero_decay_forgets_exactly(op, monkeypatch):
    """After a reset o and state are those of a run alone, and no gradient comes through it."""
    tiny_chunks(monkeypatch)
    if op == "hla3-paper":
        pytest.skip("Algorithm 3's cross-summaries read the undecayed moments of the token before")
    problem, cut = Problem(op, Case(T=41, decay="gates", carried=True)), 19
    arrays = dict(problem.arrays)
    here = (mx.arange(41) == cut)[None, :, None]
    arrays["decay"] = mx.where(here, 0.0, arrays["decay"])
    huge = mx.where((mx.arange(41) < cut)[None, :, None, None], 1e4, 1.0)
    arrays["v"] = arrays["v"] * huge  # what is forgotten must not leave its rounding behind either

    def after(*args):
        return problem.call(*args)[0][:, cut:]

    o, state = problem.call(*arrays.values())
    qkv, options = problem.at(slice(cut, None), arrays)
    alone, last = function(op)(*qkv, **options)
    assert_close(f"{op} o", o[:, cut:], alone, 1e-6)
    for name, x in leaves(last).items():
        assert_close(f"{op} state.{name}", leaves(state)[name], x, 1e-6)
    _, grads = mx.vjp(after, list(arrays.values()), [mx.ones_like(o[:, cut:])])
    for name, d in zip(arrays, grads, strict=True):
        if d.ndim == 1:
            continue  # an option of a head, which has a part in every token
        before = d if name.startswith("state.") else d[:, :cut]
        # The reverse mode takes a zero for 1e-30.
        leak, size = np.abs(to_numpy(before)).max(), np.abs(to_numpy(d)).max()
        assert leak <= 1e-20 * max(1.0, size), f"a gradient of {name} came through the reset: {leak:g}"


@pytest.mark.parametrize("order", [1, 2, 3])
def test_low_orders_are_the_named_operators(order):
    problem = Problem(("first", "hla2", "hla3")[order - 1], Case(decay="gates", carried=True))
    o, state = problem.run()
    same, other = problem.call(*problem.arrays.values(), f=lambda *a, **k: mlx_hla.hla(*a, order=order, **k))
    assert mx.array_equal(o, same)
    assert type(state) is type(other)
    assert all(
        mx.array_equal(a, b) for a, b in zip(leaves(state).values(), leaves(other).values(), strict=True)
    )


@each_operator
def test_scale_is_a_scaled_query(op):
    problem = Problem(op, Case(decay="gates"))
    (q, k, v), options = problem.at(slice(None))
    o, state = function(op)(q, k, v, scale=0.3, **options)
    want_o, want = function(op)(0.3 * q, k, v, **options)
    tol = problem.bound() * 2
    assert_close("o", o, want_o, tol)
    for name, x in leaves(want).items():
        assert_close(f"state.{name}", leaves(state)[name], x, tol)


def test_decay_of_one_is_no_decay():
    q, k, v = Problem("hla2", Case()).arrays.values()
    o, _ = mlx_hla.hla2(q, k, v)
    for decay in (1, 1.0, mx.ones((2,)), mx.ones((2, 37, 2))):
        assert relative(mlx_hla.hla2(q, k, v, decay=decay)[0], o) < 1e-6


def test_a_decay_of_zero_sees_one_token():
    q, k, v = Problem("hla2", Case(normalize=False)).arrays.values()
    got, _ = mlx_hla.hla2(q, k, v, decay=0.0)
    want, _ = serial("hla2", *(to_numpy(x) for x in (q, k, v)), decay=0.0)
    assert_close("o", got, want, error_bound("hla2", 1, 6))


@each_operator
def test_everything_masked(op):
    """No real token: o is 0, the state is the initial one, gradients are 0 and none is NaN."""
    problem = Problem(op, Case(T=9, decay="gates", normalize=True, eps=0.0, carried=True), poison=False)
    problem.mask = np.zeros((2, 9), bool)
    o, state = problem.run()
    assert not to_numpy(o).any()
    start = [x for name, x in problem.arrays.items() if name.startswith("state.")]
    for x, y in zip(leaves(state).values(), start, strict=True):
        assert_close("state", x, y, 1e-6)
    got, _ = problem.gradients("o")
    assert not any(to_numpy(x).any() for x in got.values())
