"""The choice between the Metal kernels and the MLX ops, on the stand-in for Metal."""

import mlx.core as mx
import pytest
from conftest import assert_close
from mlx.utils import tree_flatten
from standin import metal

import mlx_hla

OPERATORS = {
    "linear_attention": (mlx_hla.linear_attention, mlx_hla.linear_attention_step),
    "hla2": (mlx_hla.hla2, mlx_hla.hla2_step),
    "ahla": (mlx_hla.ahla, mlx_hla.ahla_step),
    "hla3": (mlx_hla.hla3, mlx_hla.hla3_step),
}

needs_standin = pytest.mark.skipif(metal.why_not() is not None, reason=str(metal.why_not()))


def inputs(dtype=mx.float32):
    B, T, Hq, Hkv, D, V = 2, 35, 4, 2, 16, 8
    mx.random.seed(0)
    # Not negative, so that the denominators of normalised operators stay away from 0.
    q = mx.random.uniform(0, 1, (B, T, Hq, D)).astype(dtype)
    k = mx.random.uniform(0, 1, (B, T, Hkv, D)).astype(dtype)
    v = mx.random.normal((B, T, Hkv, V)).astype(dtype)
    decay = mx.random.uniform(0.8, 1, (B, T, Hkv))
    decay[:, 20] = 0
    return q, k, v, decay


def arrays(tree) -> list[mx.array]:
    return [x for _, x in tree_flatten(tree) if x is not None]


@needs_standin
@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalize"])
@pytest.mark.parametrize("name", OPERATORS)
def test_both_backends_agree(monkeypatch, name, normalize):
    """Values, states, gradients and the step; mask and segments; a carried state."""
    metal.install(monkeypatch)
    sequence, step = OPERATORS[name]
    q, k, v, decay = inputs()
    mask = mx.arange(35)[None] < mx.array([[35], [21]])
    segments = mx.broadcast_to(mx.arange(35)[None] // 15, (2, 35))

    def run(backend):
        options = {"scale": 0.25, "normalize": normalize, "backend": backend}
        o, state = sequence(q, k, v, decay=decay, mask=mask, segment_ids=segments, **options)
        carried = sequence(q, k, v, decay=decay, initial_state=state, **options)
        token = step(q[:, 0], k[:, 0], v[:, 0], carried[1], decay=decay[:, 0], **options)

        def loss(q, k, v, decay):
            return mx.sin(sequence(q, k, v, decay=decay, **options)[0]).sum()

        return [(o, state), carried, token, mx.grad(loss, argnums=(0, 1, 2, 3))(q, k, v, decay)]

    got, want = run("metal"), run("mlx")
    for part, a, b in zip(("masked", "carried", "step", "gradient"), got, want, strict=True):
        for i, (x, y) in enumerate(zip(arrays(a), arrays(b), strict=True)):
            assert x.dtype == y.dtype
            assert_close(f"{part}[{i}]", x, y, 1e-4)
    assert type(got[0][1]) is type(want[0][1])


@needs_standin
def test_none_takes_the_kernels_where_they_run(monkeypatch):
    metal.install(monkeypatch)
    q, k, v, _ = inputs()
    with metal.counters() as counters:
        mx.eval(mlx_hla.hla2(q, k, v)[0])
    assert counters.launches > 0
    with metal.counters() as counters:
        mx.eval(mlx_hla.hla2(q, k, v, masked=False)[0])
        mx.eval(mlx_hla.hla2(q, k, v, backend="mlx")[0])
        monkeypatch.setenv("MLX_HLA_BACKEND", "mlx")
        mx.eval(mlx_hla.hla2(q, k, v)[0])
    assert counters.launches == 0


@needs_standin
def test_float16_sums_do_not_overflow_before_the_division(monkeypatch):
    metal.install(monkeypatch)
    q, k, v, _ = inputs(mx.float16)
    o, _ = mlx_hla.hla2(100 * q, 100 * k, v, normalize=True, backend="metal")
    want, _ = mlx_hla.hla2(100 * q, 100 * k, v, normalize=True, backend="mlx")
    assert o.dtype == mx.float16
    assert_close("o", o, want, 2e-3)


def test_refusals():
    q, k, v, _ = inputs()
    with pytest.raises(ValueError, match=r"\[hla2\] backend must be None, 'mlx' or 'metal', got 'cuda'"):
        mlx_hla.hla2(q, k, v, backend="cuda")
    if not mlx_hla.kernels.metal_available():
        with pytest.raises(ValueError, match=r"\[ahla\] backend 'metal' cannot .*not an Apple GPU"):
            mlx_hla.ahla(q, k, v, backend="metal")


@needs_standin
def test_a_variant_without_a_kernel_is_named(monkeypatch):
    metal.install(monkeypatch)
    q, k, v, _ = inputs()
    for call in (
        lambda: mlx_hla.hla2(q, k, v, masked=False, backend="metal"),
        lambda: mlx_hla.hla3(q, k, v, convention="paper", backend="metal"),
        lambda: mlx_hla.hla(q, k, v, order=4, backend="metal"),
    ):
        with pytest.raises(ValueError, match="this variant of the operator has no kernel"):
            call()
    with pytest.raises(ValueError, match=r"\[hla2\].*multiples of 8"):
        mlx_hla.hla2(q[..., :10], k[..., :10], v, backend="metal")
