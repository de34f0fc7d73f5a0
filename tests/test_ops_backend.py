"""Which backend serves a call, and that the kernels are handed all of it: here they only note it."""

import mlx.core as mx
import pytest
from conftest import assert_close
from ops_reference import Case, Problem, check_state, each_case, function, mlx_state

import mlx_hla
from mlx_hla import kernels

FAMILIES = {
    "linear": (mlx_hla.linear_attention, mlx_hla.linear_attention_step, mlx_hla.LinearState),
    "hla2": (mlx_hla.hla2, mlx_hla.hla2_step, mlx_hla.HLA2State),
    "ahla": (mlx_hla.ahla, mlx_hla.ahla_step, mlx_hla.AHLAState),
    "hla3": (mlx_hla.hla3, mlx_hla.hla3_step, mlx_hla.HLA3State),
}
SERVED = {"first": "linear", "hla2": "hla2", "hla2-ridge": "hla2", "ahla": "ahla", "hla3": "hla3"}
UNSERVED = ["hla2-unmasked", "hla3-unmasked", "hla3-paper", "order4", "order5"]
SHAPE = {"T": 20, "D": 8, "V": 16}


@pytest.fixture
def calls(monkeypatch):
    """The kernels' interface on MLX ops, as on a machine with an Apple GPU; the list of what was called."""
    monkeypatch.delenv("MLX_HLA_BACKEND", raising=False)
    monkeypatch.setattr(kernels, "metal_available", lambda: True)
    seen = []

    def stand_in(family, step):
        operator, kind = FAMILIES[family][step], FAMILIES[family][2]

        def run(q, k, v, g=None, state=None, *, scale=1.0, eps=None, decay_gradient=True, **options):
            seen.append(family + ("-step" if step else ""))
            assert q.dtype == k.dtype == v.dtype
            assert g is None or g.dtype == mx.float32
            options |= {"scale": scale, "decay": g, "backend": "mlx"}
            if eps is not None:  # a step normalises by itself
                options |= {"normalize": True, "eps": eps}
            state = None if state is None else kind(*state)
            if step:
                o, state = operator(q, k, v, state, **options)
            else:
                o, state = operator(q, k, v, initial_state=state, **options)
            return o, tuple(x for x in state if x is not None)

        return run

    for family in FAMILIES:
        monkeypatch.setattr(kernels, family, stand_in(family, False))
    steps = {family: stand_in(family, True) for family in FAMILIES}
    monkeypatch.setattr(kernels, "step", lambda family, *args, **options: steps[family](*args, **options))
    return seen


@each_case(
    Case(**SHAPE, decay="gates", carried=True, scale=0.7),
    Case(**SHAPE, decay="heads", carried=True, normalize=True, mask="holes", segments=True),
    Case(**SHAPE, mask="left", normalize=True, eps=0.0),
    Case(**SHAPE, dtype="f16", normalize=True),
    Case(**SHAPE, dtype="bf16", decay="float"),
)
@pytest.mark.parametrize("op", SERVED)
def test_sequences(op, case, calls):
    problem = Problem(op, case)
    problem.check_values()
    problem.check_gradients()
    assert set(calls) == {SERVED[op]}


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "ratio"])
@pytest.mark.parametrize("op", SERVED)
def test_steps(op, normalize, calls):
    problem = Problem(
        op, Case(**SHAPE | {"T": 1}, decay="gates", carried=True, normalize=normalize, scale=0.6)
    )
    q, k, v, g, *start = problem.arrays.values()
    state = mlx_state(problem.shape, start)
    options = {"scale": 0.6, "normalize": normalize, "eps": problem.eps}
    o, after = function(op, step=True)(q[:, 0], k[:, 0], v[:, 0], state, decay=g[:, 0], **options)
    want_o, want = problem.expected()
    assert_close("o", o, want_o[:, 0], problem.bound())
    check_state(op, after, want, problem.bound())
    assert calls == [SERVED[op] + "-step"]


@pytest.mark.parametrize("step", [False, True], ids=["sequence", "step"])
@pytest.mark.parametrize("op", UNSERVED)
def test_variants_without_a_kernel(op, step, calls):
    """The MLX ops serve them; asked for Metal they say that there is no kernel."""
    problem = Problem(op, Case(**SHAPE))
    if not step:
        problem.check_values()
        assert not calls
    arrays = [x[:, 0] if step else x for x in problem.arrays.values()]
    with pytest.raises(ValueError, match=r"cannot serve this call: .*has no kernel"):
        function(op, step)(*arrays, *([None] if step else []), backend="metal")


def test_shapes_that_the_kernels_refuse(calls):
    q, k, v = Problem("hla2", Case(D=6, V=5)).arrays.values()
    mlx_hla.hla2(q, k, v)
    assert not calls
    with pytest.raises(ValueError, match=r"\[hla2\] backend 'metal' cannot serve this call: .* 6 and 5"):
        mlx_hla.hla2(q, k, v, backend="metal")


def test_the_choice(calls, monkeypatch):
    q, k, v = Problem("hla2", Case(**SHAPE)).arrays.values()
    mlx_hla.hla2(q, k, v, backend="mlx")
    assert calls == []
    mlx_hla.hla2(q, k, v)
    mlx_hla.hla2(q, k, v, backend="metal")
    assert calls == ["hla2"] * 2
    monkeypatch.setenv("MLX_HLA_BACKEND", "mlx")
    mlx_hla.hla2(q, k, v)
    assert calls == ["hla2"] * 2
    mlx_hla.hla2(q, k, v, backend="metal")  # an argument goes before the environment
    assert calls == ["hla2"] * 3


def test_an_error_of_a_kernel_is_an_error(calls, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("the kernel does not compile")

    monkeypatch.setattr(kernels, "hla2", broken)
    q, k, v = Problem("hla2", Case(**SHAPE)).arrays.values()
    with pytest.raises(RuntimeError, match="does not compile"):
        mlx_hla.hla2(q, k, v)
