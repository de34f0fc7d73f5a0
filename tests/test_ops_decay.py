"""One rule for the values of a decay that comes as an array, in sequences, steps and their gradients.

Below 0 counts as 0 and above 1 as 1, with a gradient of 0; NaN makes NaN of every output from its token on.
(Of earlier ones of the same call too, where a product holds 0 · NaN: as with a NaN in q, k or v.)
"""

import mlx.core as mx
import numpy as np
import pytest
from conftest import to_numpy
from ops_reference import Case, Problem, each_operator, function, leaves, tiny_chunks

AT = 11  # in the second chunk of 8
CASE = Case(T=21, B=1, Hq=4, Hkv=2, decay="gates")


def spoiled(problem, value, head=0):
    """The problem's arrays with one decay replaced."""
    here = mx.zeros((1, CASE.T, 2), mx.bool_)
    here[0, AT, head] = True
    return problem.arrays | {"decay": mx.where(here, value, problem.arrays["decay"])}


def by_steps(problem, arrays, op):
    state, outputs = problem.start(arrays), []
    for t in range(CASE.T):
        token, options = problem.at(t, arrays)
        o, state = function(op, step=True)(*token, state, **options)
        outputs.append(o)
    return mx.stack(outputs, axis=1), state


@each_operator
def test_nan_goes_through(op, monkeypatch):
    tiny_chunks(monkeypatch)
    problem = Problem(op, CASE)
    arrays = spoiled(problem, float("nan"))
    for o, state in (problem.call(*arrays.values()), by_steps(problem, arrays, op)):
        o = to_numpy(o)
        assert np.isnan(o[0, AT:, :2]).all(), "the heads of the key-value head whose decay is NaN"
        assert np.isfinite(o[0, :, 2:]).all(), "the other heads"
        assert any(np.isnan(to_numpy(x)[0, 0]).any() for x in leaves(state).values())


@each_operator
def test_nan_goes_through_the_gradients(op, monkeypatch):
    """A loss that sees the NaN has NaN gradients: a diverged gate must not look like a sound one."""
    tiny_chunks(monkeypatch)
    problem = Problem(op, CASE)
    arrays = spoiled(problem, float("nan"))

    def loss(*arrays):
        return problem.call(*arrays)[0].sum()

    grads = mx.grad(loss, argnums=tuple(range(len(arrays))))(*arrays.values())
    for name, d in zip(arrays, grads, strict=True):
        assert np.isnan(to_numpy(d)).any(), f"d{name} is finite"


@pytest.mark.parametrize(("value", "bound"), [(-0.5, 0.0), (-1e30, 0.0), (1.5, 1.0), (float("inf"), 1.0)])
@each_operator
def test_values_beyond_the_bounds_are_the_bounds(op, value, bound, monkeypatch):
    tiny_chunks(monkeypatch)
    problem = Problem(op, CASE)
    beyond, at = spoiled(problem, value), spoiled(problem, bound)
    for run in (lambda a: problem.call(*a.values()), lambda a: by_steps(problem, a, op)):
        (o, state), (want_o, want) = run(beyond), run(at)
        assert mx.array_equal(o, want_o)
        assert all(
            mx.array_equal(x, y) for x, y in zip(leaves(state).values(), leaves(want).values(), strict=True)
        )

    def loss(decay):
        return problem.call(*(beyond | {"decay": decay}).values())[0].square().sum()

    d = mx.grad(loss)(beyond["decay"])
    assert d[0, AT, 0] == 0
    assert mx.isfinite(d).all()
