"""The carried state: any way to cut a sequence gives the same numbers, down to one token at a time."""

import mlx.core as mx
import pytest
from conftest import assert_close, to_numpy
from ops_reference import (
    OPERATORS,
    Case,
    Problem,
    check_state,
    each_operator,
    function,
    leaves,
    mlx_state,
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
    state, out, t = problem.start(), [], 0
    for size in sizes:
        qkv, options = problem.at(slice(t, t + size))
        o, state = call(*qkv, state, **options)
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

    def call(q, k, v, state, **options):
        options = {n: x[:, 0] if x.ndim == 3 else x for n, x in options.items()}
        token = (x[:, 0] for x in (q, k, v))
        o, state = function(op, step=True)(*token, state, **settings(problem), **options)
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
    token, own = problem.at(0)
    o, after = function(op, step=True)(*token, problem.start(), decay=decay, **own)
    qkv, own = problem.at(slice(None))
    same, other = function(op)(*qkv, initial_state=problem.start(), decay=decay, **own)
    assert o.dtype == qkv[0].dtype
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
        named = dict(zip(names, arrays, strict=True))
        token, options = problem.at(0, named)
        o, after = function(op, step=True)(*token, problem.start(named), scale=0.7, **options)
        return [o[:, None], *leaves(after).values()]

    out = f(*problem.arrays.values())
    do, *dstate = [mx.random.normal(x.shape, key=mx.random.key(i)) for i, x in enumerate(out)]
    _, got = mx.vjp(f, list(problem.arrays.values()), [do, *dstate])
    want = problem.wanted(to_numpy(do), mlx_state(problem.shape, [to_numpy(x) for x in dstate]))
    for name, x in zip(names, got, strict=True):
        assert_close(f"d{name}", x, want[name], problem.bound(gradient=True))


def unseen(operator):
    """Inputs of which no state holds anything: those of an operator that has no state for query heads."""
    queries = any(slot.heads == "q" for slot in operator.slots)
    return () if queries else ("q", *(o.name for o in operator.options))


@each_operator
def test_gradients_cross_the_pieces(op, monkeypatch):
    """A loss on the second half reaches the first half's inputs through the state between them."""
    tiny_chunks(monkeypatch)
    problem = Problem(op, Case(T=30, decay="gates"))
    arrays = list(problem.arrays.values())

    def split(*arrays):
        named = dict(zip(problem.arrays, arrays, strict=True))
        (first, its), (rest, others) = (problem.at(s, named) for s in (slice(13), slice(13, None)))
        _, state = function(op)(*first, **its)
        return function(op)(*rest, **others, initial_state=state)[0]

    do = mx.random.normal(split(*arrays).shape, key=mx.random.key(1))
    _, got = mx.vjp(split, arrays, [do])
    _, want = mx.vjp(lambda *a: problem.call(*a)[0][:, 13:], arrays, [do])
    for name, x, y in zip(problem.arrays, got, want, strict=True):
        if x.ndim >= 3 and name not in unseen(OPERATORS[op].operator):
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
