"""What the kernels cost, by the stand-in's counters: traffic, arithmetic, threadgroup memory, launches."""

import mlx.core as mx
import pytest
from conftest import normal
from kernel_problems import PLAIN, needs_standin, sequence, step, use_schedule
from standin import metal

from mlx_hla import kernels
from mlx_hla.kernels import plan
from mlx_hla.kernels.plan import THREADGROUP_BYTES

pytestmark = needs_standin


def inputs(T, H, D=64, dtype=mx.bfloat16):
    q, k, v = (mx.array(normal(i, 1, T, H, D), dtype) for i in range(3))
    return q, k, v, mx.full((1, T, H), 0.9)


def moved(c):
    """Device bytes, each once per threadgroup, without the tables of shapes and strides beside an array."""
    tables = ("_shape", "_strides", "_ndim")
    return sum(
        n
        for table in (c.unique_read, c.unique_written)
        for name, n in table.items()
        if not name.endswith(tables)
    )


def run(family, *arrays):
    with metal.counters() as c:
        mx.eval(sequence(family, *arrays))
    return c


# 512 tokens, so the states in, between and out weigh more than in a long sequence.
@pytest.mark.parametrize(("schedule", "launches", "traffic"), [("walk", 1, 1.3), ("blocks", 5, 3.1)])
def test_second_order(monkeypatch, schedule, launches, traffic):
    metal.install(monkeypatch)
    T, H, D, W = 512, 2, 64, 32
    use_schedule(monkeypatch, schedule)
    if schedule == "blocks":
        monkeypatch.setattr("mlx_hla.kernels.plan.min_block", lambda: 256)
    c = run("hla2", *inputs(T, H))
    assert c.launches == launches
    assert c.threadgroup_bytes <= THREADGROUP_BYTES
    assert c.copies == 0
    compulsory = 4 * T * H * D * 2
    # Two products with a state, two updates of one, and the lower triangle of four products inside a chunk.
    least = T * H * (4 * D * D + 4 * D * (W + 1) / 2)
    assert moved(c) <= traffic * compulsory
    assert c.matrix_macs <= (1.1 if schedule == "walk" else 1.3) * least


def placed(x, start, spare):
    """x's numbers in rows that are `spare` longer, from `start` on."""
    wide = mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(start, spare - start)])
    mx.eval(wide)
    return wide[..., start : start + x.shape[-1]]


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=["f16", "bf16", "f32"])
def test_rows_that_lie_together_are_loaded_in_runs(monkeypatch, dtype):
    """16 bytes a load to threadgroup memory, 4 elements to a tile: wherever these addresses are aligned."""
    metal.install(monkeypatch)
    use_schedule(monkeypatch, "walk")
    T, H, D = 64, 2, 32
    *qkv, g = inputs(T, H, D, dtype)

    def outcome(start, spare):
        arrays = [placed(x, start, spare) for x in qkv] if spare else qkv
        with metal.counters() as c:
            o, _ = sequence("first", *arrays, g)
            mx.eval(o)
        assert c.copies == 0
        return o, c.device_loads, c.device_stores

    o, loads, stores = outcome(0, 0)
    staged, stripes = 2 * T * H * D * dtype.size / 16, T * H * D / 4
    states = H * D * D / 4
    assert stores == stripes + states
    rest = loads - staged - stripes - states  # the decay, shapes, strides and numbers
    assert 0 < rest < 64 * H * 64
    for start, spare, whole in ((0, 8, True), (8, 16, True), (1, 8, False), (2, 8, False), (0, 1, False)):
        again, more, same = outcome(start, spare)
        assert mx.array_equal(again, o)
        assert same == stores
        if whole:
            assert more == loads
        else:  # element by element: some rows, or all
            assert more - loads > 0.5 * (2 * T * H * D - staged)


# Blocks: 512 tokens, two blocks.
@pytest.mark.parametrize(
    ("family", "schedule", "launches", "traffic"),
    [
        ("first", "walk", 1, 1.3),
        ("ahla", "walk", 1, 1.3),
        ("hla3", "walk", 1, 1.4),
        ("ahla", "blocks", 5, 3.3),
        ("hla3", "blocks", 6, 4.1),
    ],
)
def test_in_one_walk_or_blocks(monkeypatch, family, schedule, launches, traffic):
    """q, k and v are read once and o is written once, or, in blocks, what comes between the passes twice."""
    metal.install(monkeypatch)
    use_schedule(monkeypatch, schedule)
    monkeypatch.setattr("mlx_hla.kernels.plan.min_block", lambda: 256)
    T, H, D = 512, 2, 64
    c = run(family, *inputs(T, H))
    assert c.launches == launches
    assert moved(c) <= traffic * 4 * T * H * D * 2
    assert c.threadgroup_bytes <= THREADGROUP_BYTES


@pytest.mark.parametrize("family", ["ahla", "hla2", "hla3"])
def test_a_wide_head_runs_pass_by_pass(monkeypatch, family):
    metal.install(monkeypatch)
    use_schedule(monkeypatch, "walk")
    passes = {"ahla": 2, "hla2": 2, "hla3": 3}[family]
    assert run(family, *inputs(40, 1, D=128)).launches == passes


@pytest.mark.parametrize("family", PLAIN)
def test_steps(monkeypatch, family):
    """One launch; every byte of the state is read once and written once."""
    metal.install(monkeypatch)
    H, D = 2, 64
    q, k, v, g = (x[:, 0] for x in inputs(1, H))
    _, state = step(family, q, k, v, g)
    with metal.counters() as c:
        mx.eval(step(family, q, k, v, g, state))
    states = 2 * sum(x.nbytes for x in state)
    assert c.launches == 1
    assert moved(c) <= 1.05 * (states + 4 * H * D * 2)


@pytest.mark.parametrize("family", PLAIN)
def test_a_backward_is_bounded(monkeypatch, family):
    """Launches and traffic of forward and backward, so that a change that doubles them is seen."""
    metal.install(monkeypatch)
    use_schedule(monkeypatch, "walk")
    T, H, D = 256, 1, 64
    arrays = inputs(T, H)

    def loss(*arrays):
        return sequence(family, *arrays)[0].astype(mx.float32).sum()

    with metal.counters() as c:
        mx.eval(mx.grad(loss, argnums=(0, 1, 2, 3))(*arrays))
    launches, traffic = {"first": (3, 6.3), "hla2": (6, 13), "ahla": (6, 13), "hla3": (9, 19)}[family]
    assert c.launches <= launches
    assert moved(c) <= traffic * 4 * T * H * D * 2


@pytest.mark.parametrize(
    ("small", "power", "followed"),
    [(1, 1, True), (1, 2, True), (10, 1, True), (10, 2, False), (32, 1, False), (0, 1, False)],
)
def test_when_a_state_is_followed(monkeypatch, small, power, followed):
    """In chunks with small decays, unless what is left is below rounding: keys are read again.

    A small decay is one token's: 0.9 in all 32 of a chunk leaves less than 1/4 too, and is not followed.
    """
    metal.install(monkeypatch)
    monkeypatch.setattr(plan, "fill", lambda: 1)
    q, k, v = (mx.random.normal((1, 512, 1, 16)).astype(mx.bfloat16) for _ in range(3))
    place = mx.arange(512)[None, :, None] % 32

    def read(g):
        def run(g):
            return [kernels.linear(q, k, v, g, scale=0.2, power=power)[0]]

        with metal.counters() as c:
            mx.eval(mx.vjp(run, [g], [v])[1])
        return c.read["y"]

    slow, fast = mx.full((1, 512, 1), 0.9), mx.where(place < small, 0.2, 0.9)
    assert (read(fast) > read(slow)) is followed
