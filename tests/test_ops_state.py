"""The carried state: any way to cut a sequence gives the same numbers, down to one token at a time."""

import mlx.core as mx
import pytest
from conftest import assert_close, to_numpy
from ops_reference import (
    Case,
    Problem,
    check_state,
    each_operator,
    function,
    leaves,
    mlx_state,
    reference_vjp,
    tiny_chunks,
)

SPLITS = {
    "halves": (20, 20),
    "1-39": (1, 39),
    "39-1": (39, 1),
    "odd": (3, 16, 1, 1, 9, 10),
    "chunks": (8, 8, 24),
}
PLAIN = Case(T=40)
FULL = Case(T=40, decay="extreme", normalize=True, carried=True, scale=0.6)


def pieces(problem, sizes, call):
    """The sequence in parts, each from the last one's state: (o of all, final state)."""
    arrays = problem.arrays
    start = [x for name, x in arrays.items() if name.startswith("state.")]
    state, out, t = mlx_state(problem.shape, start) if start else None, [], 0
    for size in sizes:
        cut = {n: arrays[n][:, t : t + size] for n in ("q", "k", "v", "decay") if n in arrays}
        o, state = call(cut.pop("q"), cut.pop("k"), cut.pop("v"), state, **cut)
        out.append(o)
        t += size
    return mx.concatenate(out, axis=1), state


def settings(problem):
    return {"scale": problem.case.scale, "normalize": problem.case.normalize, "eps": problem.eps}


@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("case", [PLAIN, FULL], ids=str)
@each_operator
def test_any_split(op, case, sizes, monkeypatch):
    tiny_chunks(monkeypatch)
    problem = Problem(op, case)

    def call(q, k, v, state, **extra):
        return function(op)(q, k, v, initial_state=state, **settings(problem), **extra)

    o, state = pieces(problem, sizes, call)
    want_o, want = problem.expected()
    assert_close("o", o, want_o, problem.bound())
    check_state(op, state, want, problem.bound())


@pytest.mark.parametrize("case", [PLAIN, FULL], ids=str)
@each_operator
def test_steps_are_the_sequence(op, case):
    problem = Problem(op, case)

    def call(q, k, v, state, decay=None):
        decay = {} if decay is None else {"decay": decay[:, 0]}
        token = (x[:, 0] for x in (q, k, v))
        o, state = function(op, step=True)(*token, state, **settings(problem), **decay)
        return o[:, None], state

    o, state = pieces(problem, [1] * case.T, call)
    want_o, want = problem.expected()
    assert_close("o", o, want_o, problem.bound())
    check_state(op, state, want, problem.bound())


@pytest.mark.parametrize("decay", [0.8, "heads"])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@each_operator
def test_one_step(op, dtype, decay):
    """From a random state, with the decays that have no token axis; o in the dtype of q."""
    problem = Problem(op, Case(T=1, dtype=dtype, carried=True))
    decay = mx.array([0.9, 0.5]) if decay == "heads" else decay
    q, k, v, *start = problem.arrays.values()
    state = mlx_state(problem.shape, start)
    o, after = function(op, step=True)(q[:, 0], k[:, 0], v[:, 0], state, decay=decay)
    same, other = function(op)(q, k, v, initial_state=state, decay=decay)
    assert o.dtype == q.dtype
    tol = problem.bound() + problem.bound(result=o)  # each of the two is rounded
    assert_close("o", o, same[:, 0], tol)
    for name, x in leaves(after).items():
        assert x.dtype == mx.float32
        assert_close(f"state.{name}", x, leaves(other)[name], problem.bound())


@each_operator
def test_gradients_of_a_step(op):
    problem = Problem(op, Case(T=1, decay="gates", carried=True, scale=0.7))
    names = list(problem.arrays)

    def f(*arrays):
        q, k, v, g, *start = arrays
        state = mlx_state(problem.shape, start)
        o, after = function(op, step=True)(q[:, 0], k[:, 0], v[:, 0], state, decay=g[:, 0], scale=0.7)
        return [o[:, None], *leaves(after).values()]

    out = f(*problem.arrays.values())
    do, *dstate = [mx.random.normal(x.shape, key=mx.random.key(i)) for i, x in enumerate(out)]
    _, got = mx.vjp(f, list(problem.arrays.values()), [do, *dstate])
    q, k, v, decay, start = problem._reference
    dstate = mlx_state(problem.shape, [to_numpy(x) for x in dstate])
    want = reference_vjp(op, q, k, v, decay, start, to_numpy(do), dstate, scale=0.7)
    want |= {f"state.{name}": x for name, x in leaves(want["initial_state"]).items()}
    for name, x in zip(names, got, strict=True):
        assert_close(f"d{name}", x, want[name], problem.bound(gradient=True))


@each_operator
def test_gradients_cross_the_pieces(op, monkeypatch):
    """A loss on the second half reaches the first half's inputs through the state between them."""
    tiny_chunks(monkeypatch)
    problem = Problem(op, Case(T=30, decay="gates"))
    arrays = list(problem.arrays.values())

    def split(q, k, v, g):
        _, state = function(op)(q[:, :13], k[:, :13], v[:, :13], decay=g[:, :13])
        return function(op)(q[:, 13:], k[:, 13:], v[:, 13:], decay=g[:, 13:], initial_state=state)[0]

    do = mx.random.normal(split(*arrays).shape, key=mx.random.key(1))
    _, got = mx.vjp(split, arrays, [do])
    _, want = mx.vjp(lambda *a: problem.call(*a)[0][:, 13:], arrays, [do])
    for name, x, y in zip(problem.arrays, got, want, strict=True):
        if (op, name) != ("first", "q"):  # whose state holds no query
            assert to_numpy(x)[:, :13].any(), f"d{name} does not reach the first half"
        assert_close(f"d{name}", x, y, 2 * problem.bound(gradient=True))


@each_operator
def test_the_first_token_never_resets(op):
    """A new call continues its state whatever segment its first real token belongs to."""
    problem = Problem(op, Case(T=9, carried=True, mask="left"))
    o, _ = problem.run()
    problem.segments = mx.array([[7] * 9, [1] * 9])
    o_same, _ = problem.call(*problem.arrays.values())
    assert_close("o", o_same, o, 2 * problem.bound())
