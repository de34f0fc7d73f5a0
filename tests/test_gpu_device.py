"""The kernels on a GPU: `pytest -m metal` on a Mac, `pytest -m cuda` on an NVIDIA GPU. Elsewhere these skip.

On CUDA each kernel takes seconds to compile, in every process: the whole file takes many minutes there.
"""

import mlx.core as mx
import pytest
from conftest import assert_close
from standin import cuda

from mlx_hla import kernels, selftest
from mlx_hla.kernels import plan
from mlx_hla.ops import cases
from mlx_hla.ops.cases import Case, Shape
from mlx_hla.ops.operator import choices

pytestmark = [
    pytest.mark.metal,
    pytest.mark.cuda,
    pytest.mark.skipif(
        kernels.gpu.here() is None,
        reason="needs a GPU: run `pytest -m metal` on a Mac, or `pytest -m cuda` with MLX's CUDA build",
    ),
]
on_cuda = pytest.mark.skipif(kernels.gpu.here() is not kernels.gpu.CUDA, reason="needs an NVIDIA GPU")

CASES = tuple(selftest.all_cases())
KERNELS = list(dict.fromkeys((c.family, c.kind) for c in CASES))
each_family = pytest.mark.parametrize("family", choices())


@pytest.mark.parametrize(("family", "kind"), KERNELS, ids=["-".join(k) for k in KERNELS])
def test_selftest(family, kind):
    results = [selftest.run_case(c, repeats=1) for c in CASES if (c.family, c.kind) == (family, kind)]
    failed = [selftest.row(r) for r in results if not r.passed]
    assert not failed, "\n".join(["", *failed])


def problem(family, shape, kind="forward", dtype="float32"):
    case = Case(family, kind, dtype, shape)
    arrays, given = cases.inputs(case)
    return cases.through(case, "kernels"), arrays, given


def same(a, b):
    return all(mx.array_equal(x, y).item() for x, y in zip(a, b, strict=True))


def close(got, want, tol):
    for i, (x, y) in enumerate(zip(got, want, strict=True)):
        assert_close(f"result {i}", x, y, tol)


@each_family
def test_the_same_bits_every_time(family):
    """No atomics and no races: ten runs of the forward and of the gradients agree to the bit."""
    run, arrays, given = problem(family, Shape(2, 1100, 4, 2, 64, 64), dtype="bfloat16")
    first = [*run(*arrays), *mx.vjp(run, arrays, given)[1]]
    for _ in range(10):
        assert same([*run(*arrays), *mx.vjp(run, arrays, given)[1]], first)


@each_family
def test_compiled(family):
    """`mx.compile` fuses what stands between the launches, so the last bits may differ."""
    run, arrays, given = problem(family, Shape(1, 70, 4, 2, 32, 32))
    close(mx.compile(run)(*arrays), run(*arrays), 1e-6)
    gradients = mx.compile(lambda *a: mx.vjp(run, list(a), given)[1])
    close(gradients(*arrays), mx.vjp(run, arrays, given)[1], 1e-6)


@each_family
def test_strides(family):
    """Heads before tokens in memory, and every other column: the same bits as from contiguous arrays."""
    run, arrays, _ = problem(family, Shape(2, 70, 4, 2, 32, 32))
    turned = [mx.contiguous(x.swapaxes(1, 2)).swapaxes(1, 2) for x in arrays[:3]]
    spread = [mx.contiguous(mx.repeat(x, 2, axis=-1))[..., ::2] for x in arrays[:3]]
    want = run(*arrays)
    assert same(run(*turned, *arrays[3:]), want)
    assert same(run(*spread, *arrays[3:]), want)


def test_long_calls_are_cut(monkeypatch):
    """A call of more work than one launch may hold gives what one launch gives."""
    run, arrays, _ = problem("hla2", Shape(1, 1100, 2, 2, 64, 64))
    want = run(*arrays)
    monkeypatch.setattr(plan, "LAUNCH_WORK", 512 * 2 * 64 * 64)
    close(run(*arrays), want, 1e-5)


@on_cuda
def test_the_text_is_what_mlx_writes(monkeypatch, capfd):
    """The stand-in for CUDA and the compiler's test take `cuda.program` for the text that MLX generates."""
    real, programs = mx.fast.cuda_kernel, []

    def make(**definition):
        built = real(**definition)

        def kernel(*, inputs, template, output_dtypes, **how):
            programs.append(cuda.program(definition, inputs, output_dtypes, template))
            how |= {"template": template, "output_dtypes": output_dtypes}
            return built(inputs=inputs, verbose=True, **how)

        return kernel

    monkeypatch.setattr(mx.fast, "cuda_kernel", make)
    run, arrays, given = problem("hla2", Shape(1, 530, 2, 1, 64, 64), dtype="bfloat16")
    mx.eval(run(*arrays), mx.vjp(run, arrays, given)[1])
    text = capfd.readouterr().out
    assert programs
    for p in programs:
        assert f"\n{p.header}namespace mlx::core::cu {{" in text, p.name
        assert p.function in text, p.name
