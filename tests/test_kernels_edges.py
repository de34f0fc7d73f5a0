"""The kernels at the edges: layouts, resets, poisoned outputs, equal bits, the watchdog, general operands."""

from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from conftest import assert_close, normal, to_numpy
from kernel_problems import (
    PLAIN,
    THREADS,
    Case,
    KernelProblem,
    needs_standin,
    same_bits,
    through_steps,
    use_schedule,
)
from ops_reference import function, leaves
from standin import metal

from mlx_hla import kernels
from mlx_hla import reference as R
from mlx_hla.kernels import plan
from mlx_hla.kernels.plan import LAUNCH_WORK, min_block, segments

pytestmark = needs_standin
each_family = pytest.mark.parametrize("op", PLAIN)
both_schedules = pytest.mark.parametrize("schedule", ["walk", "blocks"])
CASE = Case(T=70, B=2, Hq=4, Hkv=2, D=16, V=16, decay="gates", carried=True)


def everything(problem, arrays=None, given=None):
    """o, the state's leaves, and the gradients."""
    arrays = list((arrays or problem.arrays).values())
    given = given or [mx.ones_like(x) for x in problem.flat()(*arrays)]
    outputs, grads = mx.vjp(problem.flat(), arrays, given)
    mx.eval(outputs, grads)
    return [*outputs, *grads]


def views(x, kind):
    """x's numbers (for "broadcast" those of its first batch and head) in another layout of memory."""
    if kind == "transposed":
        order = [*range(x.ndim)][::-1]  # its own inverse
        return mx.contiguous(x.transpose(*order)).transpose(*order)
    if kind == "sliced":
        wide = mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(1, 2)], constant_values=float("nan"))
        return mx.repeat(wide, 2, axis=1)[:, ::2, ..., 1:-2]
    if kind == "reversed":
        return mx.contiguous(x[:, ::-1])[:, ::-1]
    return mx.broadcast_to(x[:1, :, :1] if x.ndim == 4 else x[:1], x.shape)


def by_rows(x):
    """x's numbers row by row. Without the order, NumPy and MLX would keep a transposed array's strides."""
    return mx.array(np.array(x, order="C"))


@pytest.mark.parametrize("kind", ["transposed", "sliced", "reversed", "broadcast"])
@both_schedules
@each_family
def test_layouts(monkeypatch, op, schedule, kind):
    """Any strides of inputs, decay, state and incoming gradients: the same bits, and no input is copied."""
    metal.install(monkeypatch)
    use_schedule(monkeypatch, schedule)
    problem = KernelProblem(op, CASE)
    arrays = {name: views(x, kind) for name, x in problem.arrays.items()}
    given = [views(x, kind) for x in problem.given()]
    with metal.counters() as c:
        got = everything(problem, arrays, given)
    assert c.copies == 0
    rows = {name: by_rows(x) for name, x in arrays.items()}
    assert same_bits(got, everything(problem, rows, [by_rows(x) for x in given]))


@both_schedules
@each_family
def test_two_runs_agree_to_the_bit(monkeypatch, op, schedule):
    metal.install(monkeypatch)
    use_schedule(monkeypatch, schedule)
    problem = KernelProblem(op, Case(**(vars(CASE) | {"dtype": "bf16"})))
    given = problem.given()
    first = everything(problem, given=given)
    for how in ({}, *THREADS, {"schedule": "random", "seed": 99}, {"checked": False}):
        with metal.options(**how):
            assert same_bits(first, everything(problem, given=given)), how


@both_schedules
@each_family
def test_outputs_are_written_over(monkeypatch, op, schedule):
    """Whatever an output's memory held: every float starts as NaN, and none is left or read."""
    metal.install(monkeypatch)
    use_schedule(monkeypatch, schedule)
    problem = KernelProblem(op, Case(**(vars(CASE) | {"T": 41, "D": 24, "V": 8})))
    want = everything(problem)

    def poisoned(**definition):
        kernel = metal.metal_kernel(**definition)
        return lambda **call: kernel(**call, init_value=float("nan"))

    monkeypatch.setattr(mx.fast, "metal_kernel", poisoned)
    with metal.options(checked=False):
        got = everything(problem)
    assert same_bits(got, want)


@pytest.mark.parametrize("keep", [1, 4])
@both_schedules
@each_family
def test_tiny_decays_one_by_one(monkeypatch, op, schedule, keep):
    """A norm over all tokens would hide the gradients of the few that matter."""
    metal.install(monkeypatch)
    monkeypatch.setitem(plan.KEEP, 4, keep)
    use_schedule(monkeypatch, schedule)
    problem = KernelProblem(op, Case(**(vars(CASE) | {"T": 101, "decay": "extreme"})))
    given = problem.given()
    got = to_numpy(problem.all_gradients(given)["decay"])
    want = problem.in_float64(given)["decay"]
    tiny = problem.numbers["decay"] < 1e-6
    assert tiny.sum() >= 12
    for index in np.argwhere(tiny):
        i = tuple(index)
        size = max(abs(want[i]), abs(want).mean())
        assert abs(got[i] - want[i]) <= problem.tolerance(True) * size, (i, got[i], want[i])


@pytest.mark.parametrize("cut", [1, 19, 32, 64])
@both_schedules
@each_family
def test_a_zero_decay_forgets_exactly(monkeypatch, op, schedule, cut):
    """After a reset, o and state are those of a run alone, and no gradient comes through it."""
    metal.install(monkeypatch)
    use_schedule(monkeypatch, schedule)
    problem = KernelProblem(op, CASE)
    arrays = dict(problem.arrays)
    time = mx.arange(70)
    arrays["decay"] = mx.where((time == cut)[None, :, None], 0.0, arrays["decay"])
    arrays["v"] = arrays["v"] * mx.where((time < cut)[None, :, None, None], 1e4, 1.0)
    o, state = problem.call(*arrays.values())
    alone = {name: x[:, cut:] for name, x in arrays.items() if not name.startswith("state.")}
    start = {name: mx.zeros_like(x) for name, x in arrays.items() if name.startswith("state.")}
    want, last = problem.call(*alone.values(), *start.values())
    assert_close("o", o[:, cut:], want, 1e-6)
    for name, x in leaves(last).items():
        assert_close(f"state.{name}", leaves(state)[name], x, 1e-6)

    def after(*args):
        o, state = problem.call(*args)
        return [o[:, cut:], *leaves(state).values()]

    ones = [mx.ones_like(x) for x in (want, *leaves(last).values())]
    _, grads = mx.vjp(after, list(arrays.values()), ones)
    for name, d in zip(arrays, grads, strict=True):
        before = d if name.startswith("state.") else d[:, :cut]
        assert np.abs(to_numpy(before)).max() <= 1e-20 * max(1.0, np.abs(to_numpy(d)).max()), name


@both_schedules
@each_family
def test_a_zero_decay_lets_nothing_enormous_through(monkeypatch, op, schedule):
    """A zero is a zero: taken for 1e-30, it would leave 2^100 times a value as large as one."""
    metal.install(monkeypatch)
    use_schedule(monkeypatch, schedule)
    problem = KernelProblem(op, CASE)
    cut, time = 19, mx.arange(70)
    arrays = dict(problem.arrays)
    arrays["decay"] = mx.where((time == cut)[None, :, None], 0.0, arrays["decay"])
    factor = mx.where((time < cut)[None, :, None, None], 2.0**100, 1.0)

    def outcome(v):
        def after(*args):
            return [problem.call(*args)[0][:, cut:]]

        primals = list((arrays | {"v": v}).values())
        o, grads = mx.vjp(after, primals, [mx.ones((2, 70 - cut, 4, 16))])
        return o[0], dict(zip(arrays, grads, strict=True))

    (want_o, want), (o, got) = outcome(arrays["v"]), outcome(arrays["v"] * factor)
    assert_close("o", o, want_o, 1e-6)
    for name in "qkv":
        assert not to_numpy(got[name][:, :cut]).any(), name
        assert_close(f"d{name}", got[name], want[name], 1e-6)


def check_nan_decay(problem, at):
    """A NaN in one decay, of the first sequence and the last key-value head: it goes where exact arithmetic
    takes it, and nowhere else."""
    given = problem.given()
    before = everything(problem, given=given)
    T, heads = problem.case.T, slice(problem.case.Hq // 2, None)
    time, head = mx.arange(T)[None, :, None], mx.arange(2)
    hit = (time == at) & (head == 1) & (mx.arange(2)[:, None, None] == 0)
    problem.arrays["decay"] = mx.where(hit, float("nan"), problem.arrays["decay"])
    problem.numbers["decay"] = to_numpy(problem.arrays["decay"])
    after = everything(problem, given=given)
    o = to_numpy(after[0])
    assert np.isnan(o[0, at:, heads]).all()
    assert np.isfinite(o[0, : at // 32 * 32, heads]).all()  # a chunk's products take it to tokens before

    results = len(given)
    names = ["o", *leaves(problem.shape), *(f"d{name}" for name in problem.arrays)]
    wanted = problem.in_float64(given)
    for i, (name, x, y) in enumerate(zip(names, before, after, strict=True)):
        got, old = to_numpy(y), to_numpy(x)
        if i >= results:  # in float64 too, NaN where the decay is one's factor or one's partner
            want = np.isnan(wanted[name.removeprefix("d")])
            assert want.any() or at == 0, name
            assert np.isnan(got[want]).all(), f"{name}: {(want & ~np.isnan(got)).sum()} are finite"
        axis = 2 if i == 0 or name in ("dq", "dk", "dv", "ddecay") else 1
        mine = np.arange(got.shape[axis]) >= got.shape[axis] // 2
        mine = mine.reshape([-1 if a == axis else 1 for a in range(got.ndim)])
        mine = np.broadcast_to(mine & (np.arange(2) == 0).reshape(-1, *[1] * (got.ndim - 1)), got.shape)
        assert np.array_equal(got[~mine], old[~mine]), f"{name} of another head has changed"
        if 0 < i < results:
            assert np.isnan(got[mine]).all(), f"the state {name} is finite"


@pytest.mark.parametrize("at", [0, 19, 32, 69])
@both_schedules
@each_family
def test_a_nan_decay_is_not_taken_for_zero(monkeypatch, op, schedule, at):
    metal.install(monkeypatch)
    use_schedule(monkeypatch, schedule)
    check_nan_decay(KernelProblem(op, CASE), at)


@pytest.mark.parametrize(
    ("op", "packed"),
    [("first", False), ("hla2", False), ("hla2", True), ("ahla", False), ("hla3", False), ("hla3", True)],
)
def test_a_nan_decay_in_steps(monkeypatch, op, packed):
    metal.install(monkeypatch)
    case = Case(**(vars(CASE) | {"T": 4, "carried": not packed}))
    check_nan_decay(KernelProblem(op, case, make=lambda op: through_steps(op, packed)), 1)


@each_family
def test_a_nan_decay_in_a_normalised_step(monkeypatch, op):
    metal.install(monkeypatch)
    q, k, v = (mx.array(abs(normal(i, 2, h, 16)), mx.float32) for i, h in ((0, 4), (1, 2), (2, 2)))
    step = function(op, step=True)
    _, state = step(q, k, v, None, normalize=True, backend="metal")
    decay = mx.array([[1.0, float("nan")], [1.0, 1.0]])
    o, state = step(q, k, v, state, decay=decay, normalize=True, backend="metal")
    for name, x in {"o": o, **leaves(state)}.items():
        heads = np.isnan(to_numpy(x)).reshape(4, -1)  # of two sequences, before and after the half
        assert heads[1].all(), name
        assert not heads[[0, 2, 3]].any(), name


@each_family
def test_everything_masked(monkeypatch, op):
    metal.install(monkeypatch)
    use_schedule(monkeypatch, "blocks")
    problem = KernelProblem(op, Case(**(vars(CASE) | {"normalize": True, "eps": 0.0})), poison=False)
    problem.mask = np.zeros((2, 70), bool)
    o, state = problem.run()
    assert not to_numpy(o).any()
    start = [x for name, x in problem.arrays.items() if name.startswith("state.")]
    for x, y in zip(leaves(state).values(), start, strict=True):
        assert_close("state", x, y, 1e-6)
    given = [mx.ones_like(o), *(mx.zeros_like(x) for x in leaves(state).values())]
    assert not any(to_numpy(x).any() for x in problem.all_gradients(given).values())


@each_family
def test_gradients_through_one_result(monkeypatch, op):
    """Through o or one field of the state, the others not in the graph: as with zeros in their place."""
    metal.install(monkeypatch)
    use_schedule(monkeypatch, "blocks")
    problem = KernelProblem(op, Case(**(vars(CASE) | {"T": 40})))
    arrays = list(problem.arrays.values())
    given = problem.given()
    for i, d in enumerate(given):
        _, got = mx.vjp(lambda *a, i=i: [problem.flat()(*a)[i]], arrays, [d])
        zeros = [d if j == i else mx.zeros_like(x) for j, x in enumerate(given)]
        want = problem.in_float64(zeros)
        for name, x in zip(problem.arrays, got, strict=True):
            assert_close(f"d{name} through result {i}", x, want[name], problem.tolerance(True, x))


@each_family
def test_no_decay_costs_no_gradient_of_it(monkeypatch, op):
    """g is None: a decay of 1, and nothing is written that only a decay's gradient needs."""
    metal.install(monkeypatch)
    plain = KernelProblem(op, Case(T=40, D=16, V=16))
    decayed = KernelProblem(op, Case(T=40, D=16, V=16, decay="gates"))
    decayed.arrays["decay"] = mx.ones_like(decayed.arrays["decay"])
    counted, results = [], []
    for problem in (plain, decayed):
        with metal.counters() as c:
            out = everything(problem)
        counted.append(sum(c.written[name] for name in ("a", "kept", "r")) / 4)
        results.append(out[:-1] if problem is decayed else out)
    assert counted[0] <= 3 * 3 < counted[1]  # one element each in each of up to three passes
    assert same_bits(*results)


# ---- the watchdog


@each_family
def test_long_calls_are_cut(monkeypatch, op):
    """No launch over the bound; what the pieces give is what one launch would."""
    metal.install(monkeypatch)
    problem = KernelProblem(op, CASE)
    given = problem.given()
    whole = everything(problem, given=given)
    monkeypatch.setattr("mlx_hla.kernels.plan.min_block", lambda: 32)
    monkeypatch.setattr("mlx_hla.kernels.plan.LAUNCH_WORK", 1)
    with metal.counters() as once:
        mx.eval(problem.run())
    assert once.launches >= 3
    cut = everything(problem, given=given)
    for a, b in zip(cut, whole, strict=True):
        assert_close("cut", a, b, 1e-5)
    want_o, _ = problem.expected()
    assert_close("o", cut[0], want_o, problem.tolerance())


@pytest.mark.parametrize(("heads", "D", "DV"), [(1, 64, 64), (512, 64, 64), (64, 128, 128), (4096, 128, 16)])
def test_launches_are_bounded(heads, D, DV):
    for T in (1, 1000, 65536, 3 * 2**20 + 1):
        cuts = segments(heads, T, D, DV)
        tokens = [cut.indices(T)[:2] for cut in cuts]
        assert tokens[0][0] == 0
        assert tokens[-1][1] == T
        assert all(a[1] == b[0] for a, b in pairwise(tokens))
        longest = max(stop - start for start, stop in tokens)
        assert longest * heads * D * max(D, DV) <= LAUNCH_WORK or longest <= min_block()


# ---- the primitive on operands that no public operator has


OPERANDS = {
    # heads and dtypes of x, y, z; power
    "groups-keys": ((4, 4, 2), ("f32", "f32", "f32"), 2),
    "groups-values": ((4, 2, 4), ("bf16", "bf16", "f32"), 1),
    "few-queries": ((2, 4, 4), ("f32", "f32", "f16"), 3),
    "one-value-head": ((6, 3, 1), ("f16", "f32", "f16"), 1),
    "mixed": ((2, 2, 2), ("f32", "bf16", "f16"), 4),
}


@both_schedules
@pytest.mark.parametrize("kind", OPERANDS)
def test_general_operands(monkeypatch, kind, schedule):
    """x, y and z of their own dtypes and head counts, any power of the decay, o in a dtype of its own."""
    metal.install(monkeypatch)
    use_schedule(monkeypatch, schedule)
    types = {"f32": mx.float32, "f16": mx.float16, "bf16": mx.bfloat16}
    heads, dtypes, power = OPERANDS[kind]
    B, T, DY, DZ, most, S = 2, 45, 16, 24, max(heads), max(heads[1:])
    widths = (DY, DY, DZ)
    xyz = [mx.array(normal(i, B, T, heads[i], widths[i]), types[dtypes[i]]) / 4 for i in range(3)]
    g = mx.array(np.random.default_rng(3).uniform(0.7, 1, (B, T, S)), mx.float32)
    first = mx.array(normal(4, B, S, DY, DZ), mx.float32)

    def run(*args):
        o, P = kernels.linear(*args, scale=0.6, power=power, dtype=mx.float32)
        return [o, P]

    do, dP = mx.array(normal(5, B, T, most, DZ), mx.float32), mx.array(normal(6, B, S, DY, DZ), mx.float32)
    (o, P), grads = mx.vjp(run, [*xyz, g, first], [do, dP])
    x, y, z, g, first = (to_numpy(a) for a in (*xyz, g, first))
    full = [np.repeat(a, most // a.shape[2], 2) for a in (0.6 * x, y, z, g)]
    S0 = np.repeat(first, most // S, 1)
    want_o, want_P = R.la_forward(*full[:3], full[3] ** power, S0)
    assert_close("o", o, want_o, 1e-5)
    assert_close("P", P, want_P[:, :: most // S], 1e-5)
    dP = np.repeat(to_numpy(dP), most // S, 1) / (most // S)
    wants = list(R.la_vjp(*full[:3], full[3] ** power, S0, to_numpy(do), dP))
    wants[0] *= 0.6
    wants[3] *= power * full[3] ** (power - 1)
    for name, got, want, axis in zip("xyzgS", grads, wants, (2, 2, 2, 2, 1), strict=True):
        shape = (*want.shape[:axis], got.shape[axis], -1, *want.shape[axis + 1 :])
        tol = {mx.float32: 1e-5, mx.float16: 1e-3, mx.bfloat16: 8e-3}[got.dtype]
        assert_close(f"d{name}", got, want.reshape(shape).sum(axis + 1), tol)
