"""The step kernels with the upper triangle of S: the same values as with all of S, and fewer bytes."""

import mlx.core as mx
import pytest
from conftest import assert_close, normal
from kernel_problems import step
from standin import metal

from mlx_hla import kernels

pytestmark = pytest.mark.skipif(metal.why_not() is not None, reason=str(metal.why_not()))

SHAPES = {
    "B2-H2x1-D16": (2, 2, 1, 16, 16),
    "B1-H3x3-D40": (1, 3, 3, 40, 24),
    "B1-H4x2-D128": (1, 4, 2, 128, 64),
}


def inputs(family, B, Hq, Hkv, D, DV, dtype=mx.float32):
    q, k, v = (mx.array(normal(i, B, H, n), dtype) for i, (H, n) in enumerate([(Hq, D), (Hkv, D), (Hkv, DV)]))
    g = mx.array(normal(3, B, Hkv), mx.float32).square() % 1
    x = mx.array(normal(4, B, Hkv, D, D), mx.float32)
    S, F = x + x.swapaxes(2, 3), mx.array(normal(5, B, Hq, D, DV), mx.float32)
    P = mx.array(normal(6, B, Hkv, D, DV), mx.float32)
    return (q, k, v, g), {"hla2": (S, F), "hla3": (S, P, F)}[family]


def packed(state):
    return (kernels.pack(state[0]), *state[1:])


def test_pack_and_unpack():
    S = mx.array([[[1.0, 2, 3], [2, 4, 5], [3, 5, 6]]])
    assert kernels.pack(S).tolist() == [[1, 2, 3, 4, 5, 6]]
    assert kernels.unpack(kernels.pack(S)).tolist() == S.tolist()
    for D in range(1, 130):
        row = mx.arange(D * (D + 1) // 2)
        S = kernels.unpack(row)
        assert S.shape == (D, D)
        assert mx.array_equal(S, S.T)
        assert mx.array_equal(kernels.pack(S), row)


@pytest.mark.parametrize("schedule", ["forward", "reverse", "random"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", ["hla2", "hla3"])
def test_values(monkeypatch, family, shape, schedule):
    metal.install(monkeypatch, schedule=schedule)
    arrays, state = inputs(family, *SHAPES[shape])
    for g in (arrays[3], None):
        o, new = step(family, *arrays[:3], g, state, scale=0.3)
        got, got_new = step(family, *arrays[:3], g, packed(state), scale=0.3, packed=True)
        assert_close("o", got, o, 2e-6)
        assert mx.array_equal(got_new[0], kernels.pack(new[0]))  # each element is one and the same product
        for name, a, b in zip(("P or F", "F"), got_new[1:], new[1:], strict=False):
            assert_close(name, a, b, 1e-6)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_ridge_and_strides(monkeypatch, dtype):
    metal.install(monkeypatch)
    arrays, state = inputs("hla2", 2, 4, 2, 24, 32, dtype)
    wide = mx.repeat(packed(state)[0], 2, axis=-1)[..., ::2]  # any strides
    o, _ = step("hla2", *arrays, state, ridge=0.5)
    got, _ = step("hla2", *arrays, (wide, state[1]), ridge=0.5, packed=True)
    assert got.dtype == dtype
    assert_close("o", got, o, 1e-2)


def test_no_state_is_zeros(monkeypatch):
    metal.install(monkeypatch)
    arrays, _ = inputs("hla2", 1, 2, 2, 16, 16)
    o, state = step("hla2", *arrays)
    got, packed_state = step("hla2", *arrays, packed=True)
    assert_close("o", got, o, 2e-6)
    assert_close("S", kernels.unpack(packed_state[0]), state[0], 0)


def test_gradients(monkeypatch):
    metal.install(monkeypatch)
    arrays, state = inputs("hla2", 1, 2, 1, 16, 16)
    weights = [
        mx.array(normal(i, 1, *s), mx.float32) for i, s in enumerate([(2, 16), (1, 16, 16), (2, 16, 16)])
    ]

    def loss(S, *rest, is_packed):
        *args, F = rest
        o, (S, F) = step("hla2", *args, (S, F), scale=0.5, packed=is_packed)
        S = kernels.unpack(S) if is_packed else S
        return sum((a * w).sum() for a, w in zip((o, S, F), weights, strict=True))

    args = (*arrays, state[1])
    # The gradient of a packed element is that of both places that it fills.
    whole = mx.grad(lambda S: loss(kernels.unpack(S), *args, is_packed=False))(kernels.pack(state[0]))
    assert_close("dS", mx.grad(lambda S: loss(S, *args, is_packed=True))(kernels.pack(state[0])), whole, 1e-5)
    every = tuple(range(1, 6))
    got = mx.grad(lambda *a: loss(*a, is_packed=True), argnums=every)(kernels.pack(state[0]), *args)
    want = mx.grad(lambda *a: loss(*a, is_packed=False), argnums=every)(state[0], *args)
    for name, a, b in zip("qkvgF", got, want, strict=True):
        assert_close(name, a, b, 1e-5)


def test_saves_bytes(monkeypatch):
    """Each byte of the smaller state is read once and written once."""
    metal.install(monkeypatch)
    arrays, state = inputs("hla2", 1, 1, 1, 64, 64)
    moved = []
    for is_packed, s in ((False, state), (True, packed(state))):
        with metal.counters() as c:
            mx.eval(step("hla2", *arrays, s, packed=is_packed))
        assert c.launches == 1
        moved.append(sum(c.read[x] + c.written[x + "_new"] for x in "sf"))
    assert moved == [4 * 64 * 64 * 4, 2 * (64 * 65 // 2 + 64 * 64) * 4]
