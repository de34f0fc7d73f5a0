"""The fused backward: what it costs, the shapes it runs in, and how MLX's transformations meet it."""

from dataclasses import replace

import mlx.core as mx
import pytest
from conftest import assert_close
from kernel_problems import Case, KernelProblem, each_family, needs_standin, sequence, use_schedule
from ops_reference import OPERATORS
from standin import metal

import mlx_hla
from mlx_hla import kernels
from mlx_hla.kernels import between, plan
from mlx_hla.ops import backend, on_kernels
from mlx_hla.ops.checks import canonical, canonical_step

pytestmark = needs_standin


def moved(counters):
    """Bytes of tensors and states, without shapes, strides and scalar arguments."""
    tables = (counters.read, counters.written)
    aside = ("_shape", "_strides", "ints", "floats")
    return sum(n for table in tables for name, n in table.items() if not name.endswith(aside))


# Forward and backward may move so many times the bytes of q, k, v, do and three gradients, in so many
# launches: without and with a decay, whose gradient takes S every eighth chunk, half a tensor's worth.
COSTS = {"first": ((3.1, 7), (3.5, 7)), "hla2": ((5.6, 13), (6.2, 13))}


@pytest.mark.parametrize("decay", [False, True], ids=["none", "gates"])
@pytest.mark.parametrize("op", COSTS)
def test_traffic_and_launches(monkeypatch, op, decay):
    metal.install(monkeypatch)
    monkeypatch.setattr(plan, "fill", lambda: 2)  # two blocks of 512 tokens
    q, k, v, do = (mx.random.normal((1, 1024, 1, 64)).astype(mx.bfloat16) for _ in range(4))
    arrays = [q, k, v] + [mx.random.uniform(0.9, 1, (1, 1024, 1))] * decay

    def run(*arrays):
        return [sequence(op, *arrays, scale=0.1)[0]]

    with metal.counters() as c:
        mx.eval(mx.vjp(run, arrays, [do]))
    traffic, launches = COSTS[op][decay]
    assert c.launches <= launches
    assert moved(c) <= traffic * 7 * q.nbytes
    assert c.threadgroup_bytes <= plan.THREADGROUP_BYTES


@each_family
def test_a_constant_decay_costs_no_gradient(monkeypatch, op):
    metal.install(monkeypatch)
    use_schedule(monkeypatch, "blocks")
    case = Case(T=70, D=16, V=16, decay="gates", carried=True)
    problem = KernelProblem(op, case)
    q, k, v, g = (problem.arrays[name] for name in ("q", "k", "v", "decay"))
    written, grads = [], []
    for wanted in (True, False):

        def loss(q, k, v, g, wanted=wanted):
            return sequence(op, q, k, v, g, scale=0.3, decay_gradient=wanted)[0].square().sum()

        with metal.counters() as c:
            grads.append(mx.grad(loss, (0, 1, 2, 3))(q, k, v, g))
            mx.eval(grads[-1])
        written.append(c.written["kept"] + c.written["r"] + c.written["a"])
    assert written[1] <= 3 * 3 * 4 < written[0]  # a placeholder each in each of up to three passes
    for name, got, want in zip("qkv", grads[1], grads[0], strict=False):
        assert mx.array_equal(got, want), name
    assert not grads[1][3].any()


def test_segments_and_a_number_are_constant_decays(monkeypatch):
    """Only an array for the decay has a gradient; cutting documents apart makes none."""
    metal.install(monkeypatch)
    monkeypatch.setattr(kernels.gpu, "here", lambda: kernels.gpu.METAL)
    q = mx.random.normal((1, 70, 1, 16))
    ids = mx.arange(70)[None] // 30

    def written(**options):
        def loss(q):
            return mlx_hla.hla2(q, q, q, backend="metal", **options)[0].sum()

        with metal.counters() as c:
            mx.eval(mx.grad(loss)(q))
        return c.written["kept"]

    assert written(segment_ids=ids) == written(decay=0.9, segment_ids=ids) == written() == 2 * 4
    assert written(decay=mx.array([0.9])) > 1000


def traced(monkeypatch):
    """The stand-in, and where MLX traces, which the stand-in cannot, zeros of the same shapes."""
    metal.install(monkeypatch)

    def make(**definition):
        run = metal.metal_kernel(**definition)

        def call(**arguments):
            try:
                return run(**arguments)
            except metal.MetalError as e:
                if "trace" not in str(e):
                    raise
                outputs = zip(arguments["output_shapes"], arguments["output_dtypes"], strict=True)
                return [mx.zeros(shape, dtype) for shape, dtype in outputs]

        return call

    monkeypatch.setattr(mx.fast, "metal_kernel", make)


@each_family
def test_vmap_joins_the_batch(monkeypatch, op):
    """vmap, the gradient of it and it of the gradient are the calls one by one."""
    traced(monkeypatch)
    mx.random.seed(0)
    q, k, v = (mx.random.normal((3, 2, 9, H, 16)) for H in (4, 2, 2))
    arrays = (q, k, v, mx.random.uniform(0.5, 1, (3, 2, 9, 2)))

    def loss(*arrays):
        return sequence(op, *arrays, scale=0.3)[0].square().sum()

    every = (0, 1, 2, 3)
    alone = [[x[i] for x in arrays] for i in range(3)]
    values = mx.stack([loss(*a) for a in alone])
    grads = [mx.stack(x) for x in zip(*(mx.grad(loss, every)(*a) for a in alone), strict=True)]
    assert_close("values", mx.vmap(loss)(*arrays), values, 1e-6)
    for got in (
        mx.grad(lambda *a: mx.vmap(loss)(*a).sum(), every)(*arrays),
        mx.vmap(mx.grad(loss, every))(*arrays),
    ):
        for name, x, want in zip("qkvg", got, grads, strict=True):
            assert_close(name, x, want, 1e-6)
    shared_q = mx.vmap(loss, in_axes=(None, 0, 0, 0))(arrays[0][0], *arrays[1:])
    assert_close("shared q", shared_q, mx.stack([loss(q[0], *a[1:]) for a in alone]), 1e-6)


@each_family
def test_a_second_reverse_is_refused(monkeypatch, op):
    metal.install(monkeypatch)
    q = mx.ones((1, 3, 1, 8))

    def loss(q):
        return sequence(op, q, q, q)[0].square().sum()

    with pytest.raises(NotImplementedError, match="cannot be differentiated in reverse again"):
        mx.grad(lambda q: mx.grad(loss)(q).sum())(q)


def every_pass(D, DV, dtype):
    """Operands (x, y, do, z unless it is y) of every pass that a family runs at these widths."""
    middle = between(dtype)
    x, v, k, r = (D, dtype), (DV, dtype), (D, middle), (DV, middle)
    return (x, x, v, v), (x, k, v, v), (x, x, k), (x, x, r, v), (x, x, v, r), (x, k, v, r)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=["f16", "bf16", "f32"])
def test_every_shape_fits(dtype):
    """Registers, threads and threadgroup bytes of every sequence kernel, normalised values included."""
    for D in range(8, plan.MAX_DIM + 1, 8):
        for DV in (8, 9, 16, 64, 65, 96, 97, 104, 128, 129):
            for x, y, d, *z in every_pass(D, DV, dtype):
                (z,) = z or [y]
                width = plan.staged_width([x, y])
                held = [plan.tile_registers(y[0], plan.STRIPE, 1, width, 2)]
                threads = [32 * plan.ceil_div(z[0], 8 * plan.STRIPE)]
                back = plan.back_shape(x, y, d, *([z] if z is not y else []))
                widest = max(D, d[0])
                held += [
                    plan.tile_registers(d[0], plan.STRIPE, 1, back.width, 2 + (z is y)),
                    plan.tile_registers(widest, back.stripe, 1, back.width, 2),
                ]
                threads += [
                    32 * plan.ceil_div(y[0], 8 * plan.STRIPE),
                    64 * plan.ceil_div(plan.ceil_div(widest, 8), back.stripe * back.halves),
                ]
                assert max(held) <= plan.REGISTERS, (D, DV, back)
                assert max(threads) <= plan.MAX_THREADS, (D, DV, back)
            for family in plan.FUSED:
                if stripe := plan.fused(family, max(D, DV)):
                    width = 32 if family == "ahla" else plan.wide_chunk(D, dtype)
                    states = 3 if family == "hla3" else 2
                    assert plan.tile_registers(D, stripe, states, width, 2) <= plan.REGISTERS
                    assert 32 * plan.ceil_div(max(D, DV), 8 * stripe) <= plan.MAX_THREADS


def test_what_a_decay_keeps_is_bounded():
    for heads, D, DV in ((1, 64, 64), (16, 128, 128), (4096, 16, 64)):
        for width in (8, 16, 32):
            for cut in plan.segments(heads, 2**20, D, DV, kept_every=width):
                start, stop, _ = cut.indices(2**20)
                kept = 4 * heads * D * DV * (stop - start) / width
                assert kept <= plan.KEPT_BYTES or stop - start <= plan.min_block()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("op", ["first", "hla2", "hla3"])
def test_a_normalised_half_call_is_planned_as_it_runs(monkeypatch, op, dtype):
    """It runs in float32: above 104 columns its chunks have 8 tokens, and so are its states counted."""
    q = mx.zeros((1, 600, 16, 112), dtype)
    assert kernels.why_not(q, q, q) is None
    metal.install(monkeypatch, checked=False)
    operator = OPERATORS[op].operator
    call = canonical("op", q, q, q, operator.options, decay=mx.ones((16,)), normalize=True)
    assert not backend._preferred(operator, call)
    assert backend._preferred(operator, replace(call, normalize=False))
    widths = []
    monkeypatch.setattr(plan, "KEPT_BYTES", 2**20)
    real = plan.segments

    def seen(*args):
        widths.append(args[-1])
        return real(*args)

    for module in ("one_pass", "second_order", "routed"):
        monkeypatch.setattr(f"mlx_hla.kernels.{module}.segments", seen)
    small = (q[:, :5, :1],) * 3
    small = canonical("op", *small, operator.options, decay=mx.ones((1,)), normalize=True)
    on_kernels.KernelSequence(operator, small, None).run()
    assert 8 in widths


def test_the_rule_for_no_backend():
    """A sequence with chunks of at least 16 tokens, and every step."""
    for D, dtype, taken in ((64, mx.float32, True), (128, mx.bfloat16, True), (128, mx.float32, False)):
        q = mx.zeros((1, 4, 2, D), dtype)
        assert kernels.why_not(q, q, q) is None
        for op, tested in OPERATORS.items():
            call, step = canonical(op, q, q, q), canonical_step(op, *(q[:, 0] for _ in "qkv"))
            assert backend._preferred(tested.operator, call) is (D == 64 if tested.operator.wide else taken)
            assert backend._preferred(tested.operator, step) is (tested.operator.family is not None)
