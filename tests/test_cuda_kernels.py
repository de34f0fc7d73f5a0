"""The kernels in CUDA: the tests of values and gradients in Metal, on a stand-in for a CUDA GPU."""

import re

import mlx.core as mx
import pytest
from kernel_problems import (
    PACKED,
    PLAIN,
    Case,
    KernelProblem,
    each_family,
    needs_standin,
    through_steps,
    use_schedule,
)
from ops_reference import each_case
from standin import cuda

import mlx_hla
from mlx_hla import kernels
from mlx_hla.kernels import gpu, plan, source

pytestmark = needs_standin
ORDERS = ({"order": "forward"}, {"order": "reverse"}, {"order": "random", "seed": 7})
both_schedules = pytest.mark.parametrize("schedule", ["walk", "blocks"])

# A rest of a chunk; widths whose fragments do not pair; what fills the registers; a head in two halves.
ODD = [
    Case(T=70, D=24, V=40, Hq=4, Hkv=2, decay="extreme", carried=True, scale=0.7),
    Case(T=70, D=24, V=40, dtype="bf16", decay="gates", carried=True),
]
OPTIONS = [
    Case(T=45, D=16, V=16, mask="holes", segments=True, decay="heads", normalize=True, Hq=4, Hkv=1),
    Case(T=1, Hq=2, Hkv=1, D=8, V=8, dtype="f16", decay="gates", carried=True),
]
WIDE = [
    Case(T=40, B=1, Hq=1, Hkv=1, D=64, V=64, dtype="bf16", decay="gates", carried=True),
    Case(T=35, B=1, Hq=1, Hkv=1, D=96, V=72, decay="gates", carried=True),
    Case(T=33, B=1, Hq=1, Hkv=1, D=128, V=128, dtype="f16", decay="gates", carried=True),
]


def check(problem, gradients=True):
    problem.check(gradients, threads=ORDERS, options=cuda.options)


@both_schedules
@each_case(*ODD)
@each_family
def test_odd_shapes(monkeypatch, op, case, schedule):
    cuda.install(monkeypatch)
    use_schedule(monkeypatch, schedule)
    check(KernelProblem(op, case))


@each_case(*OPTIONS)
@each_family
def test_options(monkeypatch, op, case):
    cuda.install(monkeypatch)
    check(KernelProblem(op, case))


@each_case(*WIDE)
@pytest.mark.parametrize("op", ["first", "hla2"])
def test_wide_heads(monkeypatch, op, case):
    cuda.install(monkeypatch)
    use_schedule(monkeypatch, "blocks")
    check(KernelProblem(op, case))


STEPS = [
    Case(T=3, D=24, V=40, Hq=4, Hkv=2, decay="gates", carried=True),
    Case(T=2, B=1, D=40, V=24, Hq=3, Hkv=1, dtype="bf16", decay="gates", carried=True, normalize=True),
]


@each_case(*STEPS)
@each_family
def test_steps(monkeypatch, op, case):
    cuda.install(monkeypatch)
    check(KernelProblem(op, case, make=through_steps), gradients=case.dtype == "f32")


@pytest.mark.parametrize("op", PACKED)
def test_packed_steps(monkeypatch, op):
    cuda.install(monkeypatch)
    case = Case(T=3, B=1, D=24, V=8, Hq=2, Hkv=1, decay="gates")  # an S that grows from zero is symmetric
    check(KernelProblem(op, case, make=lambda op: through_steps(op, packed=True)), gradients=False)


def test_the_choice(monkeypatch):
    """`backend=None` takes them if asked or for long calls; another operator's passes run on them."""
    cuda.install(monkeypatch)
    q = mx.random.normal((1, 20, 2, 8))
    cuda.launched.clear()
    for wish, taken in ((None, []), ("metal", []), ("mlx", []), ("cuda", ["hla_hla2_walk"])):
        monkeypatch.delenv("MLX_HLA_BACKEND", raising=False)
        if wish:
            monkeypatch.setenv("MLX_HLA_BACKEND", wish)
        mx.eval(mlx_hla.hla2(q, q, q))
        assert cuda.launched == taken, wish
    cuda.launched.clear()
    monkeypatch.delenv("MLX_HLA_BACKEND")
    long = mx.zeros((1, gpu.CUDA.unasked_from, 1, 8), mx.bfloat16)
    for x, taken in ((long[:, 1:], False), (long, True)):
        mx.eval(mlx_hla.linear_attention(x, x, x))
        assert bool(cuda.launched) is taken, x.shape
    cuda.launched.clear()
    mx.eval(mlx_hla.hla2(q.astype(mx.bfloat16), *[q.astype(mx.bfloat16)] * 2, masked=False, backend="cuda"))
    assert set(cuda.launched) == {"hla_linear_out_rounded"}
    with pytest.raises(ValueError, match=r"\[hla2\] backend 'metal' cannot serve .*is not an Apple GPU"):
        mlx_hla.hla2(q, q, q, backend="metal")


def test_values_that_are_not_finite_stay_where_they_are(monkeypatch):
    """A NaN in a chunk reaches no earlier chunk, no other head and no other sequence."""
    cuda.install(monkeypatch)
    q, k, v = (mx.random.normal((2, 70, 2, 16)) for _ in range(3))
    want, _ = mlx_hla.hla2(q, k, v, backend="cuda")
    v[1, 40, 1, 3] = mx.nan
    got, _ = mlx_hla.hla2(q, k, v, backend="cuda")
    clean = mx.isnan(got) == 0
    assert mx.array_equal(got[0], want[0])
    assert mx.array_equal(got[1, :, 0], want[1, :, 0])
    assert clean[1, :32].all()
    assert not clean[1, 40:, 1, 3].any()


def test_many_heads(monkeypatch):
    """More heads than a grid's y and z have room for go along x."""
    grids = []

    def maker(**definition):
        def kernel(*, output_shapes, output_dtypes, grid, threadgroup, **_):
            grids.append((grid, threadgroup))
            return [mx.zeros(s, d) for s, d in zip(output_shapes, output_dtypes, strict=True)]

        return kernel

    cuda.install(monkeypatch, maker)
    q = mx.zeros((70_000, 1, 1, 8))
    mlx_hla.linear_attention(q, q, q, backend="cuda")
    mlx_hla.linear_attention_step(q[:, 0], q[:, 0], q[:, 0], None, backend="cuda")
    for grid, threadgroup in grids:
        assert grid[0] == 70_000 * threadgroup[0]
        assert max(grid[1:]) <= 65_535


@pytest.mark.parametrize("op", PLAIN[:1])
def test_a_schedule_of_its_own(monkeypatch, op):
    """Two threadgroups walk back over a head of 96 columns, where Metal has one; more blocks fill the GPU."""
    staged = [(96, mx.float32)] * 4
    assert plan.back_shape(*staged).halves == 1
    before = plan.blocks(65536, 16)
    cuda.install(monkeypatch)
    assert plan.back_shape(*staged).halves == 2
    assert plan.blocks(65536, 16).count > before.count
    check(KernelProblem(op, Case(T=20, B=1, Hq=1, Hkv=1, D=96, V=88, decay="gates")))


# ---- one text for both


def test_the_bodies_are_one_text():
    for path in sorted(source.folder().glob("*.metal")):
        if path.stem == source.HELPERS:
            continue
        metal, own = source.sources(path.stem), source.sources(path.stem, gpu.CUDA)
        assert metal.keys() == own.keys()
        starts = [source._parts(source.HELPERS, device)[1] for device in (gpu.METAL, gpu.CUDA)]
        for name in metal:
            assert metal[name].body.removeprefix(starts[0]) == own[name].body.removeprefix(starts[1])
            assert own[name].body.startswith(starts[1])


def test_the_sections_of_cuda():
    """Each takes the place of one of *.metal, and defines what that defines for others."""
    own = {
        name: its
        for path in source.folder().glob("*.cuh")
        for name, its in source.sections(path.read_text(encoding="ascii")).items()
    }
    named = {
        "What a GPU has of its own",
        "Tiles",
        "Products",
        "The decay of rows",
        "Scores",
        "Symmetric states",
    }
    named |= {"Dot products", "Products of scores", "Rows to threadgroup memory"}
    assert own.keys() == {"", *named}
    files = [path.stem for path in source.folder().glob("*.metal")]
    headings = [name for file in files for name in source.sections(source.text_of(file)) if name]
    assert {headings.count(name) for name in own if name} == {1}
    text = "".join(source.text_of(file, gpu.CUDA) for file in files)
    assert {text.count(its) for name, its in own.items() if name} == {1}
    found = re.findall(r"\b(?:simd|simdgroup|threadgroup|metal)_\w+|\[\[|using namespace|METAL_\w+", text)
    assert not found
    assert kernels.gpu.METAL.suffix == ".metal"
