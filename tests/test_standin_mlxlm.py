"""The stand-in runs kernels that nobody here wrote: mlx-lm's, against mlx-lm's own ops."""

import importlib.util
import sys

import mlx.core as mx
import numpy as np
import pytest
from standin import metal

pytestmark = pytest.mark.skipif(metal.why_not() is not None, reason=str(metal.why_not()))
pytest.importorskip("mlx_lm")

TOLERANCE = {mx.float32: 3e-6, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["f32", "f16", "bf16"])


@pytest.fixture
def load(monkeypatch):
    """Load a fresh copy of an mlx-lm module, whose kernels are then the stand-in's."""
    metal.install(monkeypatch)
    mx.random.seed(7)

    def load(name):
        parent, _, leaf = name.rpartition(".")
        spec = importlib.util.find_spec(name)
        spec = importlib.util.spec_from_file_location(f"{parent}.standin_{leaf}", spec.origin)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load


def assert_close(name, got, want, tolerance):
    got, want = (np.array(a.astype(mx.float32)) for a in (got, want))
    error = np.abs(got - want).max() / np.abs(want).max()
    assert error <= tolerance, f"{name}: {error:.2e} of the largest value, allowed {tolerance:.0e}"


def f32(*arrays):
    return [a.astype(mx.float32) for a in arrays]


@DTYPES
@pytest.mark.parametrize("masked", [False, True], ids=["", "mask"])
@pytest.mark.parametrize("vector", [False, True], ids=["scalar", "vector"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 32, 4), (1, 5, 2, 4, 64, 8), (2, 3, 1, 2, 128, 16)])
def test_gated_delta(load, shape, vector, masked, dtype):
    module = load("mlx_lm.models.gated_delta")
    B, T, Hk, Hv, Dk, Dv = shape
    q, k = ((0.2 * mx.random.normal((B, T, Hk, Dk))).astype(dtype) for _ in range(2))
    v = mx.random.normal((B, T, Hv, Dv)).astype(dtype)
    g = mx.random.uniform(0.5, 1, (B, T, Hv, Dk) if vector else (B, T, Hv))
    beta = mx.random.uniform(0, 1, (B, T, Hv)).astype(dtype)
    state = mx.random.normal((B, Hv, Dv, Dk))
    mask = mx.random.uniform(0, 1, (B, T)) > 0.4 if masked else None
    y, end = module.gated_delta_kernel(q, k, v, g, beta, state, mask)
    want, want_end = module.gated_delta_ops(*f32(q, k, v), g, *f32(beta), state, mask)
    if masked:  # the kernel writes zeros where the ops leave what they computed
        want = mx.where(mask[..., None, None], want, 0)
    assert y.dtype == dtype
    if mx.abs(want).max().item() > 0:
        assert_close("y", y, want, TOLERANCE[dtype])
    assert_close("state", end, want_end, 5e-6)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 2, 8, 1, 32), (2, 4, 16, 2, 64), (1, 8, 64, 1, 128)])
def test_ssm(load, shape, dtype):
    module = load("mlx_lm.models.ssm")
    n, h, d, groups, ds = shape
    x = mx.random.normal((n, 1, h, d)).astype(dtype)
    A, D = mx.random.uniform(0, 1, (h,)), mx.random.normal((h,)).astype(dtype)
    B, C = (mx.random.normal((n, 1, groups, ds)).astype(dtype) for _ in range(2))
    dt, bias = mx.random.normal((n, 1, h)).astype(dtype), mx.random.normal((h,))
    state, limit = mx.random.normal((n, h, d, ds)), (0.001, 100.0)
    y, end = module.ssm_update_kernel(x, A, B, C, D, dt, bias, state, limit)
    want, want_end = module.ssm_attn(*f32(x, A, B, C, D, dt), bias, state, limit)
    assert_close("y", y, want, TOLERANCE[dtype])
    assert_close("state", end, want_end, 5e-6)


@pytest.mark.parametrize("schedule", ["forward", "reverse", "interleave", "random"])
def test_gated_delta_does_not_depend_on_the_schedule(load, schedule):
    module = load("mlx_lm.models.gated_delta")
    q, k = (0.2 * mx.random.normal((1, 6, 1, 128)) for _ in range(2))
    v, beta = mx.random.normal((1, 6, 2, 16)), mx.random.uniform(0, 1, (1, 6, 2))
    g, state = mx.random.uniform(0.5, 1, (1, 6, 2)), mx.random.normal((1, 2, 16, 128))
    want, want_end = module.gated_delta_ops(q, k, v, g, beta, state)
    with metal.options(schedule=schedule, seed=5), metal.counters() as c:
        y, end = module.gated_delta_kernel(q, k, v, g, beta, state)
    assert c.launches == 1
    assert_close("y", y, want, 3e-6)
    assert_close("state", end, want_end, 3e-6)
    # mlx-lm promises that its packed kernel and the plain one that it replaces agree to the bit.
    other, other_end = module.gated_delta_kernel_xtree(q, k, v, g, beta, state)
    assert mx.array_equal(y, other)
    assert mx.array_equal(end, other_end)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["f32", "bf16"])
def test_rwkv7(load, dtype):
    module = load("mlx_lm.models.rwkv7")
    B, T, H, D = 2, 4, 2, 64
    inputs = [(0.3 * mx.random.normal((B, T, H, D))).astype(dtype) for _ in range(6)]
    inputs[1] = mx.sigmoid(inputs[1])
    state = mx.random.normal((B, H, D, D)).astype(dtype)
    y, end = module.wkv7_kernel(*inputs, state)
    want_end, ys = state.astype(mx.float32), []
    for t in range(T):
        o, want_end = module._wkv7_step_ops(*(a[:, t] for a in f32(*inputs)), want_end)
        ys.append(o.squeeze(-1))
    assert_close("y", y, mx.stack(ys, 1), TOLERANCE[dtype])
    assert_close("state", end, want_end, TOLERANCE[dtype])


@DTYPES
def test_qk_norm(load, dtype):
    module = load("mlx_lm.kernels.qk_norm")
    hq, hk, d = 4, 2, 48
    qkvg = mx.random.normal((3, 5, 2 * (hq + hk) * d)).astype(dtype)
    q, k = module.qk_norm(qkvg, n_heads=hq, n_kv_heads=hk, head_dim=d, eps=1e-6, query_scale=0.25)
    x = qkvg[..., : (hq + hk) * d].astype(mx.float32).reshape(3, 5, hq + hk, d)
    want = x * mx.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)
    assert_close("q", q, 0.25 * want[..., :hq, :], TOLERANCE[dtype])
    assert_close("k", k, want[..., hq:, :], TOLERANCE[dtype])
