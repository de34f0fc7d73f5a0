"""The kernels over a sequence: values and all gradients against float64 and the ops path, on the stand-in.

Every case runs under three thread schedules, which must agree to the bit.
"""

import pytest
from kernel_problems import (
    PLAIN,
    Case,
    KernelProblem,
    each_composed,
    each_family,
    needs_standin,
    through_steps,
    use_schedule,
)
from ops_reference import each_case
from standin import metal

from mlx_hla.kernels import plan

pytestmark = needs_standin
plain_families = pytest.mark.parametrize("op", PLAIN)
both_schedules = pytest.mark.parametrize("schedule", ["walk", "blocks"])

# One chunk is 32 tokens: lengths of one token, less than a chunk, around its multiples.
SHORT = [
    Case(T=1, Hq=2, Hkv=1, D=8, V=8, decay="gates", carried=True),
    Case(T=7, B=1, Hq=2, Hkv=2, D=24, V=40, decay="heads", carried=True),
    Case(T=32, B=1, Hq=1, Hkv=1, D=16, V=16),
]
LONG = [
    Case(T=101, B=1, Hq=3, Hkv=1, D=8, V=8, decay="extreme", carried=True, scale=0.4),
    Case(T=63, D=16, V=16),
    Case(T=64, B=1, D=8, V=24, Hq=6, Hkv=2, decay="gates", carried=True),
    Case(T=70, D=16, V=8, decay="extreme", carried=True),
]
WIDE = [
    Case(T=40, B=1, Hq=2, Hkv=1, D=64, V=64, decay="gates", carried=True),
    Case(T=35, B=1, Hq=1, Hkv=1, D=96, V=40, decay="gates", carried=True),
    Case(T=34, B=1, Hq=1, Hkv=1, D=40, V=96, decay="gates", carried=True),
    Case(T=33, B=1, Hq=2, Hkv=1, D=128, V=128, decay="gates", carried=True),
    Case(T=33, B=1, Hq=1, Hkv=1, D=24, V=128, carried=True),
]
# Masks and segments as `ops.checks.canonical` folds them in; a normaliser is one more column of v.
OPTIONS = [
    Case(T=70, D=16, V=16, normalize=True, decay="gates", carried=True, scale=0.7),
    Case(T=70, D=16, V=16, mask="left", decay="gates", carried=True),
    Case(T=70, D=16, V=16, mask="right", normalize=True, eps=0.0),
    Case(T=70, D=16, V=16, mask="holes", segments=True, decay="heads", carried=True, Hq=4, Hkv=1),
    Case(T=70, D=16, V=16, segments=True),
    Case(T=40, B=1, Hq=1, Hkv=1, D=64, V=64, normalize=True, carried=True),
    Case(T=33, B=1, Hq=1, Hkv=1, D=128, V=128, normalize=True),
]
AHEAD = [
    Case(T=101, B=1, Hq=2, Hkv=1, D=16, V=24, dtype="bf16", decay="extreme", carried=True),
    Case(T=70, B=1, Hq=1, Hkv=1, D=24, V=16, decay="gates", carried=True),
]
HALF = [
    Case(T=70, D=16, V=16, decay="extreme", carried=True),
    Case(T=45, D=40, V=24, B=1, Hq=2, Hkv=1, decay="gates", carried=True, scale=0.5),
    Case(T=70, D=16, V=16, normalize=True, mask="holes", segments=True, decay="half", Hq=4, Hkv=4),
    Case(T=35, D=128, V=96, B=1, Hq=1, Hkv=1, decay="heads"),
]
HALF = [Case(**(vars(c) | {"dtype": dtype})) for dtype in ("f16", "bf16") for c in HALF]


@both_schedules
@each_case(*LONG, *WIDE)
@plain_families
def test_shapes(monkeypatch, op, case, schedule):
    metal.install(monkeypatch)
    use_schedule(monkeypatch, schedule)
    KernelProblem(op, case).check()


@each_case(*SHORT)
@each_family
def test_short(monkeypatch, op, case):
    metal.install(monkeypatch)
    KernelProblem(op, case).check()


@both_schedules
@each_case(*OPTIONS)
@each_family
def test_options(monkeypatch, op, case, schedule):
    metal.install(monkeypatch)
    use_schedule(monkeypatch, schedule)
    KernelProblem(op, case).check()


@both_schedules
@each_case(*HALF)
@each_family
def test_half_precision(monkeypatch, op, case, schedule):
    metal.install(monkeypatch)
    use_schedule(monkeypatch, schedule)
    KernelProblem(op, case).check()


# What operators without a kernel of their own ask of the passes: no more than their composition is new.
COMPOSED_CASES = [
    Case(T=1, Hq=2, Hkv=1, D=8, V=8, decay="gates", carried=True),
    Case(T=45, B=1, D=16, V=8, Hq=4, Hkv=2, decay="extreme", carried=True, scale=0.4),
    Case(T=70, D=8, V=16, mask="holes", segments=True, normalize=True, decay="gates", Hq=4, Hkv=2),
    Case(T=40, B=1, D=16, V=16, dtype="bf16", decay="gates", carried=True, Hq=2, Hkv=1),
    Case(T=40, B=1, D=16, V=16, dtype="f16", normalize=True, mask="left", Hq=2, Hkv=1),
]


@each_case(*COMPOSED_CASES)
@each_composed
def test_passes_of_other_operators(monkeypatch, op, case):
    metal.install(monkeypatch)
    use_schedule(monkeypatch, "blocks")
    KernelProblem(op, case).check()


@each_composed
def test_steps_of_other_operators(monkeypatch, op):
    metal.install(monkeypatch)
    case = Case(T=3, B=1, D=16, V=8, Hq=4, Hkv=2, decay="gates", carried=True)
    KernelProblem(op, case, make=through_steps).check()


@each_family
def test_blocks_as_they_are(monkeypatch, op):
    """257 tokens: one block of 256 and one of a single token, by the plan's own constants."""
    metal.install(monkeypatch)
    KernelProblem(op, Case(T=257, B=1, Hq=2, Hkv=1, D=8, V=16, decay="gates", carried=True)).check()


@plain_families
def test_blocks_of_several_chunks(monkeypatch, op):
    """Blocks of two chunks, and decays slow enough that the first token reaches the last block."""
    metal.install(monkeypatch)
    monkeypatch.setattr("mlx_hla.kernels.plan.min_block", lambda: 64)
    case = Case(T=150, B=1, Hq=2, Hkv=2, D=16, V=8, decay="heads", carried=True)
    with metal.counters() as c:
        KernelProblem(op, case).check()
    assert "hla_linear_scan" in c.kernels


# Blocks of three chunks, and of four and a half; a sequence in one block; decays so small that the states are
# followed, alone and side by side; nothing forgotten or all of it; two threadgroups a head.
SELDOM_KEPT = [
    (Case(T=257, B=1, Hq=2, Hkv=1, D=8, V=16, decay="gates", carried=True), 96),
    (Case(T=310, B=1, Hq=2, Hkv=2, D=16, V=8, decay="extreme", carried=True), 144),
    (Case(T=150, B=2, Hq=2, Hkv=2, D=8, V=8, decay="extreme", carried=True), 256),
    (Case(T=150, B=1, Hq=2, Hkv=1, D=8, V=8, decay="resets", carried=True), 96),
    (Case(T=61, B=1, Hq=2, Hkv=1, D=128, V=24, decay="extreme", carried=True), 256),
]


@pytest.mark.parametrize("keep", [2, 8])
@pytest.mark.parametrize(("case", "block"), SELDOM_KEPT, ids=str)
@pytest.mark.parametrize("op", ["first", "hla2"])
def test_states_kept_every_few_chunks(monkeypatch, op, case, block, keep):
    """In float32 too, which shows what half types would hide."""
    metal.install(monkeypatch)
    monkeypatch.setattr("mlx_hla.kernels.plan.min_block", lambda: block)
    monkeypatch.setitem(plan.KEEP, 4, keep)
    KernelProblem(op, case).check()


@both_schedules
@each_case(*AHEAD)
@each_family
def test_staging_ahead(monkeypatch, op, case, schedule):
    """What kernels do where there is room for two chunks, as on CUDA, watched as here."""
    metal.install(monkeypatch)
    use_schedule(monkeypatch, schedule)

    def maker(**definition):
        header = definition["header"].replace("int AHEAD_BYTES = 0;", "int AHEAD_BYTES = 10240;")
        assert header != definition["header"]
        return metal.metal_kernel(**definition | {"header": header})

    monkeypatch.setattr("mlx.core.fast.metal_kernel", maker)
    KernelProblem(op, case).check()
