"""Which backend serves a call: seen by what is launched on the stand-in for Metal."""

import mlx.core as mx
import pytest
from conftest import assert_close
from kernel_problems import COMPOSED, FAMILIES, needs_standin
from ops_reference import OPERATORS, Case, Problem, check_state, each_operator, function
from standin import metal

import mlx_hla
from mlx_hla import kernels

pytestmark = needs_standin
SHAPE = {"T": 20, "B": 1, "Hq": 2, "Hkv": 1, "D": 8, "V": 16}


@pytest.fixture(autouse=True)
def an_apple_gpu(monkeypatch):
    monkeypatch.delenv("MLX_HLA_BACKEND", raising=False)
    metal.install(monkeypatch, checked=False)


def launched(call):
    with metal.counters() as c:
        result = call()
        mx.eval(result)
    return result, c.kernels


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "ratio"])
@each_operator
def test_sequences(op, normalize):
    """Without a word about backends the kernels are handed all of a call: state, mask, segments, options."""
    case = Case(
        **SHAPE, decay="gates", mask="holes", segments=True, carried=True, scale=0.7, normalize=normalize
    )
    problem = Problem(op, case)
    (o, state), names = launched(problem.run)
    walks = {"hla2": "hla_hla2_walk", "ahla": "hla_routed_walk", "hla3": "hla_routed_walk"}
    assert set(names) == {walks.get(OPERATORS[op].operator.family, "hla_linear_out")}
    want_o, want = problem.expected()
    assert_close("o", o, want_o, problem.bound())
    check_state(op, state, want, problem.bound())


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "ratio"])
@each_operator
def test_steps(op, normalize):
    """One launch where the operator has a kernel for it; else MLX ops, and passes if one asks for Metal."""
    case = Case(**SHAPE | {"T": 1}, decay="gates", carried=True, normalize=normalize, scale=0.6)
    problem = Problem(op, case)
    token, own = problem.at(0)
    options = {"scale": 0.6, "normalize": normalize, "eps": problem.eps, **own}
    family = OPERATORS[op].operator.family
    want_o, want = problem.expected()
    for backend in (None, "metal"):
        (o, after), names = launched(
            lambda b=backend: function(op, step=True)(*token, problem.start(), backend=b, **options)
        )
        if family:
            assert names == [f"hla_{family}_step" + "_normalised" * normalize]
        else:
            assert bool(names) is (backend == "metal")
        assert_close("o", o, want_o[:, 0], problem.bound())
        check_state(op, after, want, problem.bound())


def test_operators_of_both_kinds():
    assert {"first", "hla2", "ahla", "hla3"} <= set(FAMILIES)
    assert {"mixed", "readout", "hla2-unmasked", "hla3-paper", "hla-order4"} <= set(COMPOSED)


def test_shapes_that_the_kernels_refuse():
    q, k, v = Problem("hla2", Case(D=6, V=5)).arrays.values()
    assert launched(lambda: mlx_hla.hla2(q, k, v))[1] == []
    with pytest.raises(ValueError, match=r"\[hla2\] backend 'metal' cannot serve this call: .* 6 and 5"):
        mlx_hla.hla2(q, k, v, backend="metal")


def test_the_choice(monkeypatch):
    q, k, v = Problem("hla2", Case(**SHAPE)).arrays.values()

    def names(**options):
        return launched(lambda: mlx_hla.hla2(q, k, v, **options))[1]

    assert names(backend="mlx") == []
    assert names() == names(backend="metal") == ["hla_hla2_walk"]
    monkeypatch.setenv("MLX_HLA_BACKEND", "MLX")
    with pytest.raises(ValueError, match="must be one of mlx, metal, cuda or unset, got 'MLX'"):
        mlx_hla.hla2(*(mx.zeros((1, 4, 2, 8)) for _ in "qkv"))
    monkeypatch.setenv("MLX_HLA_BACKEND", "mlx")
    assert names() == []
    assert names(backend="metal") == ["hla_hla2_walk"]  # an argument goes before the environment


def test_an_error_of_a_kernel_is_an_error(monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("the kernel does not compile")

    monkeypatch.setitem(kernels.FUSED, "hla2", broken)
    q, k, v = Problem("hla2", Case(**SHAPE)).arrays.values()
    with pytest.raises(RuntimeError, match="does not compile"):
        mlx_hla.hla2(q, k, v)
