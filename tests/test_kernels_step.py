"""The step kernels: one launch a token, from any state, against float64 recurrences and their gradients."""

import mlx.core as mx
import pytest
from conftest import assert_close, normal
from kernel_problems import (
    PACKED,
    PLAIN,
    Case,
    KernelProblem,
    each_family,
    needs_standin,
    step,
    through_steps,
)
from ops_reference import each_case
from standin import metal

from mlx_hla.kernels import plan

pytestmark = needs_standin

SHAPES = [
    Case(T=1, B=1, Hq=1, Hkv=1, D=8, V=8),
    Case(T=4, D=16, V=8, decay="extreme", carried=True, Hq=6, Hkv=2, scale=0.7),
    Case(T=2, B=1, Hq=2, Hkv=1, D=24, V=40, decay="heads", carried=True),
    Case(T=2, B=1, Hq=2, Hkv=1, D=8, V=104, decay="gates", carried=True),  # more columns than threads
    Case(T=2, B=1, Hq=2, Hkv=2, D=40, V=24, decay="float", carried=True),
    Case(T=2, B=1, Hq=2, Hkv=1, D=128, V=96, decay="gates", carried=True),
    Case(T=2, B=1, Hq=16, Hkv=1, D=8, V=16, decay="gates", carried=True),
    Case(T=2, B=1, Hq=16, Hkv=1, D=64, V=64, decay="gates", carried=True),
    Case(T=3, D=16, V=16, normalize=True, decay="gates", carried=True),
    Case(T=2, D=16, V=32, dtype="f16", decay="gates", carried=True),
    Case(T=2, D=16, V=32, dtype="bf16", decay="half", normalize=True),
]


@each_case(*SHAPES)
@each_family
def test_steps(monkeypatch, op, case):
    metal.install(monkeypatch)
    KernelProblem(op, case, make=through_steps).check()


@each_case(SHAPES[0], SHAPES[7], *(Case(T=3, B=1, Hq=4, D=d, V=24, decay="gates") for d in (8, 40, 96)))
@pytest.mark.parametrize("op", PACKED)
def test_packed_steps(monkeypatch, op, case):
    """From zeros: a packed state is a symmetric one."""
    metal.install(monkeypatch)
    case = Case(**(vars(case) | {"carried": False}))
    KernelProblem(op, case, make=lambda op: through_steps(op, packed=True)).check()


@each_family
def test_a_step_is_one_launch_without_copies(monkeypatch, op):
    """Also of a q, k, v cut out of one projection, and of a state that lies transposed."""
    metal.install(monkeypatch)
    problem = KernelProblem(op, Case(T=1, D=16, V=16, decay="gates", carried=True), make=through_steps)
    o, state = problem.run()
    arrays = dict(problem.arrays)
    joined = mx.concatenate([arrays[n] for n in "qkv"], axis=2)
    arrays |= dict(zip("qkv", mx.split(joined, [4, 6], axis=2), strict=True))
    for name in arrays:
        if name.startswith("state."):
            arrays[name] = mx.contiguous(arrays[name].swapaxes(2, 3)).swapaxes(2, 3)
    with metal.counters() as c:
        other = problem.call(*arrays.values())
        mx.eval(other)
    assert c.launches == 1
    assert c.copies == 0
    assert mx.array_equal(o, other[0])
    assert all(mx.array_equal(a, b) for a, b in zip(state, other[1], strict=True) if a is not None)


@pytest.mark.parametrize("D", [16, 40, 72, 128])
@pytest.mark.parametrize("layout", ["shifted", "spread", "longer", "turned"])
@each_family
def test_a_state_in_any_layout(monkeypatch, op, layout, D):
    """The same bits from rows that do not lie together, or not where a load of 2 or 4 elements is aligned."""
    metal.install(monkeypatch)

    def placed(x):
        if layout == "turned":
            return mx.contiguous(x.swapaxes(2, 3)).swapaxes(2, 3)
        if layout == "spread":
            return mx.repeat(x, 2, axis=3)[..., ::2]
        start, spare = {"shifted": (1, 4), "longer": (0, 1)}[layout]
        return mx.pad(x, [(0, 0)] * 3 + [(start, spare)], constant_values=float("nan"))[
            ..., start : start + D
        ]

    problem = KernelProblem(op, Case(T=1, D=D, V=D, decay="gates", carried=True), make=through_steps)
    o, state = problem.run()
    arrays = {
        n: placed(x) if n.startswith("state.") and x.ndim == 4 else x for n, x in problem.arrays.items()
    }
    with metal.counters() as c:
        other = problem.call(*arrays.values())
        mx.eval(other)
    assert c.copies == 0
    assert mx.array_equal(o, other[0])
    assert all(mx.array_equal(a, b) for a, b in zip(state, other[1], strict=True) if a is not None)


@pytest.mark.parametrize("D", [32, 64, 96, 128])
def test_a_state_is_loaded_and_stored_in_runs(monkeypatch, D):
    metal.install(monkeypatch)
    q, k, v = (mx.array(normal(i, 1, 1, D), mx.float32) for i in range(3))
    state = mx.array(normal(3, 1, 1, D, D), mx.float32)
    with metal.counters() as c:
        mx.eval(step("first", q, k, v, None, [state]))
    runs = D * D / {32: 1, 64: 2, 96: 4, 128: 4}[D]
    assert c.device_stores == runs + D
    assert c.device_loads < runs + 3 * D + 24 * 32 * 16  # shapes, strides and numbers


@pytest.mark.parametrize("family", PLAIN)
def test_a_zero_decay_forgets(monkeypatch, family):
    metal.install(monkeypatch)
    q, k, v = (mx.array(normal(i, 2, h, 16), mx.float32) for i, h in ((0, 4), (1, 2), (2, 2)))
    _, state = step(family, q, k, v, None, None)
    state = tuple(1e30 * x for x in state)
    got = step(family, q, k, v, mx.zeros((2, 2)), state)
    want = step(family, q, k, v, mx.ones((2, 2)), None)
    assert mx.array_equal(got[0], want[0])
    assert all(mx.array_equal(a, b) for a, b in zip(got[1], want[1], strict=True))


def test_a_zero_state_is_the_default(monkeypatch):
    metal.install(monkeypatch)
    q, k, v = (mx.array(normal(i, 1, h, 8), mx.float32) for i, h in ((0, 2), (1, 1), (2, 1)))
    for family, heads in (("first", [1]), ("hla2", [1, 2]), ("ahla", [1, 2]), ("hla3", [1, 1, 2])):
        got = step(family, q, k, v)
        want = step(family, q, k, v, None, tuple(mx.zeros((1, h, 8, 8)) for h in heads))
        assert_close(family, got[0], want[0], 0)
        assert [x.shape[1] for x in got[1]] == heads


def test_threadgroup_bytes_fit():
    for D in range(8, plan.MAX_DIM + 1, 8):
        for DV in range(8, plan.MAX_DIM + 1, 8):
            for groups in range(1, plan.MAX_GROUP + 1):
                n = plan.step_simdgroups(D, DV, groups)
                assert 1 <= n <= 32
                assert plan.step_bytes(D, DV, groups, n) <= plan.THREADGROUP_BYTES - plan.SPARE, (
                    D,
                    DV,
                    groups,
                )
