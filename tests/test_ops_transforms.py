"""MLX's function transformations on the operators, what they compile, and how much memory they take."""

import gc
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from conftest import assert_close, to_numpy
from ops_reference import Case, Problem, each_operator, function, leaves, tiny_chunks

from mlx_hla.ops import primitive
from mlx_hla.ops.operator import choices

GATED = Case(T=20, decay="gates", carried=True)
COMPILED = Case(T=70, B=1, Hq=2, Hkv=1, decay="heads")


def outputs(problem):
    """The problem as f(*arrays) -> [o, *leaves of the state]."""

    def f(*arrays):
        o, state = problem.call(*arrays)
        return [o, *leaves(state).values()]

    return f


def loss(problem):
    return lambda *arrays: sum((x.astype(mx.float32) ** 2).sum() for x in outputs(problem)(*arrays))


def gradient(f, arrays):
    return mx.grad(f, argnums=tuple(range(len(arrays))))(*arrays)


def assert_same(name, got, want, tol=2e-5):
    for i, (x, y) in enumerate(zip(got, want, strict=True)):
        assert_close(f"{name} {i}", x, y, tol)


def test_compile():
    """Values and gradients of a compiled function at two lengths; first order, to spare C++ compilations."""
    f = mx.compile(mx.value_and_grad(loss(Problem("first", COMPILED)), argnums=(0, 1, 2, 3)))
    for T in (70, 90):
        problem = Problem("first", Case(**{**vars(COMPILED), "T": T}))
        arrays = list(problem.arrays.values())
        value, grads = f(*arrays)
        want, want_grads = mx.value_and_grad(loss(problem), argnums=(0, 1, 2, 3))(*arrays)
        assert_same("first", [value, *grads], [want, *want_grads])


@each_operator
def test_checkpoint(op, monkeypatch):
    tiny_chunks(monkeypatch)
    problem = Problem(op, GATED)
    f, arrays = outputs(problem), list(problem.arrays.values())
    given = [mx.ones_like(x) for x in f(*arrays)]
    out, got = mx.vjp(mx.checkpoint(f), arrays, given)
    same, want = mx.vjp(f, arrays, given)
    assert_same(op, [*out, *got], [*same, *want], 1e-6)


def stacked(problems):
    return [mx.stack(x) for x in zip(*(p.arrays.values() for p in problems), strict=True)]


@each_operator
def test_vmap(op, monkeypatch):
    """Over a new batch axis: values, the gradient of the mapped function, the mapped gradient."""
    tiny_chunks(monkeypatch)
    problems = [Problem(op, GATED, seed) for seed in range(3)]
    f, g, arrays = outputs(problems[0]), loss(problems[0]), stacked(problems)
    each = [list(p.arrays.values()) for p in problems]
    want = [mx.stack(x) for x in zip(*(f(*a) for a in each), strict=True)]
    assert_same(op, mx.vmap(f)(*arrays), want, 1e-6)
    want = [mx.stack(x) for x in zip(*(gradient(g, a) for a in each), strict=True)]
    assert_same(f"{op} grad of vmap", gradient(lambda *a: mx.vmap(g)(*a).sum(), arrays), want, 1e-5)
    assert_same(f"{op} vmap of grad", mx.vmap(lambda *a: gradient(g, a))(*arrays), want, 1e-5)


@each_operator
def test_vmap_over_some_arguments(op, monkeypatch):
    """q mapped along its last axis but one, v along its first; k and the decay are shared."""
    tiny_chunks(monkeypatch)
    problems = [Problem(op, Case(T=20, decay="gates"), seed) for seed in range(3)]
    (q, _, v, *_), (_, k, _, *rest) = stacked(problems), problems[0].arrays.values()
    f = outputs(problems[0])
    got = mx.vmap(f, in_axes=(3, None, 0, *[None] * len(rest)))(mx.moveaxis(q, 0, 3), k, v, *rest)
    want = [mx.stack(x) for x in zip(*(f(a, k, b, *rest) for a, b in zip(q, v, strict=True)), strict=True)]
    assert_same(op, got, want, 1e-6)


@pytest.mark.parametrize("op", ["first", "hla2", "hla3-paper"])
def test_vmap_with_masks_and_segments(op, monkeypatch):
    tiny_chunks(monkeypatch)
    case = Case(T=20, B=1, mask="holes", segments=True, normalize=True)
    problems = [Problem(op, case, seed) for seed in range(3)]
    for p in problems:
        p.eps = problems[0].eps
    mask, ids = (mx.array(np.stack([getattr(p, n) for p in problems])) for n in ("mask", "segments"))

    def f(q, k, v, mask, ids):
        options = {"normalize": True, "eps": problems[0].eps}
        return function(op)(q, k, v, mask=mask, segment_ids=ids, **options)[0]

    got = mx.vmap(f)(*stacked(problems), mask, ids)
    assert_same(op, got, [p.run()[0] for p in problems], 1e-6)


@each_operator
def test_vmap_of_a_step(op):
    problems = [Problem(op, Case(T=1, carried=True), seed) for seed in range(3)]

    def f(*arrays):
        named = dict(zip(problems[0].arrays, arrays, strict=True))
        token, own = problems[0].at(0, named)
        o, state = function(op, step=True)(*token, problems[0].start(named), **own)
        return [o, *leaves(state).values()]

    want = [mx.stack(x) for x in zip(*(f(*p.arrays.values()) for p in problems), strict=True)]
    assert_same(op, mx.vmap(f)(*stacked(problems)), want, 1e-6)


@each_operator
def test_forward_mode(op, monkeypatch):
    """The forward mode is the reverse mode's adjoint: ⟨y, J x⟩ = ⟨Jᵀ y, x⟩ (at decays other than 0)."""
    tiny_chunks(monkeypatch)
    problem = Problem(op, GATED)
    f, arrays = outputs(problem), list(problem.arrays.values())
    along = [mx.random.normal(x.shape, key=mx.random.key(i)) for i, x in enumerate(arrays)]
    out, moved = mx.jvp(f, arrays, along)
    given = [mx.random.normal(x.shape, key=mx.random.key(90 + i)) for i, x in enumerate(out)]
    _, grads = mx.vjp(f, arrays, given)

    def product(xs, ys):
        return [to_numpy(x) * to_numpy(y) for x, y in zip(xs, ys, strict=True)]

    left, right = (sum(x.sum() for x in product(*pair)) for pair in ((given, moved), (grads, along)))
    size = np.sqrt(sum((x**2).sum() for x in product(given, moved)))
    assert abs(left - right) <= 2 * problem.bound(gradient=True) * size


@pytest.mark.parametrize("length", [5, 20])
@pytest.mark.parametrize("case", [Case(), GATED], ids=str)
@each_operator
def test_a_second_reverse_derivative_is_refused(op, case, length, monkeypatch):
    """Also where one chunk holds the whole sequence, so that nothing depends on the length."""
    tiny_chunks(monkeypatch)
    problem = Problem(op, Case(**{**vars(case), "T": length}))
    arrays = list(problem.arrays.values())
    for i in range(len(arrays)):
        with pytest.raises(NotImplementedError, match="cannot be differentiated in reverse again"):
            gradient(lambda *a, i=i: (gradient(loss(problem), a)[i] ** 2).sum(), arrays)


@each_operator
def test_gradients_are_deterministic(op):
    problem = Problem(op, Case(T=130, decay="gates"))
    arrays = list(problem.arrays.values())
    for x, y in zip(gradient(loss(problem), arrays), gradient(loss(problem), arrays), strict=True):
        assert mx.array_equal(x, y)


COUNT_TRACES = """
import mlx.core as mx
compiled, traces = mx.compile, []
def counting(f, **options):
    def traced(*args):
        traces.append(f.__qualname__)
        return f(*args)
    return compiled(traced, **options)
mx.compile = counting
import mlx_hla
from mlx_hla import devices
from mlx_hla.ops.operator import choices, find
from mlx_hla.ops import places, primitive, scan
for module in (devices, places, primitive, scan):
    module.on_gpu = lambda: True
def trace(T):  # builds the graph, computes nothing
    q, k, v, g = (mx.zeros(s, t) for s, t in [((1, T, 2, 8), mx.bfloat16)] * 3 + [((1, T, 2), mx.float32)])
    for f in (getattr(mlx_hla, find(name).name) for name in choices()):
        f(q, k, v, decay=g, backend="mlx")
        f(q, k, v, backend="mlx")
for k in range(7, 18):  # every power of two of chunks in a group, and more than one group
    trace(3 * 2**k // 2)
first = len(traces)
for T in (200, 777, 1001, 3333, 4096, 10000, 33000, 70000, 150000):
    trace(T)
print(first, len(traces) - first)
"""


def test_new_lengths_compile_nothing():
    """What is fused on a GPU is traced once for each kind of argument, however the length changes.

    Without mx.compile around it, MLX traces nothing in a gradient: fused functions run as their parts.
    """
    run = subprocess.run([sys.executable, "-c", COUNT_TRACES], capture_output=True, text=True, check=True)
    first, more = map(int, run.stdout.split())
    assert more == 0, f"{more} traces at new lengths, after {first}"
    assert 0 < first < 100


def test_new_lengths_make_no_new_functions():
    problem = Problem("hla3", Case(T=100, B=1, decay="gates"))
    arrays = list(problem.arrays.values())
    problem.call(*arrays)
    before = primitive._pass.cache_info().currsize
    for T in (99, 70, 65, 64, 63, 2, 1):
        problem.call(*(x[:, :T] for x in arrays))
    assert primitive._pass.cache_info().currsize == before


def peak(op, T, D, decayed):
    """Bytes that forward and backward take at most beyond their inputs, in tensors of the size of q."""
    q, k, v = (mx.random.normal((1, T, 1, D), key=mx.random.key(i)) for i in range(3))
    arrays = [q, k, v, *([mx.full((1, T, 1), 0.97)] if decayed else [])]
    mx.eval(arrays)
    f = gradient
    gc.collect()  # else what earlier tests left in cycles may be freed while this one is measured
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(f(lambda q, k, v, g=None: function(op)(q, k, v, decay=g)[0].sum(), arrays))
    return (mx.get_peak_memory() - before) / q.nbytes


@pytest.mark.parametrize("decayed", [False, True], ids=["plain", "decay"])
@pytest.mark.parametrize("op", choices())
def test_memory_grows_with_the_length(op, decayed):
    """Linear in T, and no T×D×D tensor anywhere: one would be D = 128 times q."""
    sizes = [peak(op, T, 128, decayed) for T in (1024, 2048, 4096)]
    assert sizes[2] <= 1.15 * sizes[0], f"grows faster than T: {sizes} times q"
    assert max(sizes) < 128 / 2, f"{sizes} times q"


def test_a_shorter_loss_takes_less_memory():
    """A forward pass that nobody differentiates keeps no states of its chunks."""
    q = mx.random.normal((1, 2048, 1, 64), key=mx.random.key(0))
    mx.eval(q)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(function("hla2")(q, q, q)[0])
    forward = (mx.get_peak_memory() - before) / q.nbytes
    assert forward < peak("hla2", 2048, 64, False)
