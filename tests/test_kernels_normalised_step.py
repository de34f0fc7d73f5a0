"""The step kernels that normalise: one launch that does what a column of ones and a division do."""

import mlx.core as mx
import pytest
from conftest import assert_close, normal
from kernel_problems import PACKED, step
from kernel_problems import PLAIN as FAMILIES
from ops_reference import OPERATORS
from standin import metal

from mlx_hla import kernels, reference
from mlx_hla.ops.checks import Dims

pytestmark = pytest.mark.skipif(metal.why_not() is not None, reason=str(metal.why_not()))

SHAPES = {
    "B2-H6x2-D16x24": (2, 6, 2, 16, 24),
    "B1-H2-D40x8": (1, 2, 2, 40, 8),
    "B1-H16x1-D8x16": (1, 16, 1, 8, 16),
    "B1-H16x1-D64": (1, 16, 1, 64, 64),
}


def inputs(family, B, Hq, Hkv, D, DV, dtype=mx.float32):
    """Keys and queries are positive, so that the denominators are far from 0."""
    widths = ((Hq, D), (Hkv, D), (Hkv, DV))
    q, k, v = (
        mx.array(abs(normal(i, B, *w)) if i < 2 else normal(i, B, *w), dtype) for i, w in enumerate(widths)
    )
    g = mx.array(0.9 - 0.1 * abs(normal(3, B, Hkv)), mx.float32)
    operator = OPERATORS[family].operator
    shapes = operator.shapes(Dims(B, Hq, Hkv, D, DV), normalize=True).values()
    shapes = [s for s, _ in shapes] + [s for _, s in shapes if s]
    state = [mx.array(abs(normal(4 + i, *s)), mx.float32) for i, s in enumerate(shapes)]
    if operator.slots[0].symmetric:
        state[0] = state[0] + state[0].swapaxes(2, 3)
    return (q, k, v, g), tuple(state)


def through_a_column(family, q, k, v, g, *state, eps, **options):
    """The same by hand: the normalisers as last columns of what holds values, joined and parted here."""
    valued = [slot.normaliser is not None for slot in OPERATORS[family].operator.slots]
    vectors = iter(state[len(valued) :])
    joined = [
        mx.concatenate([x, next(vectors)[..., None]], axis=-1) if has else x
        for x, has in zip(state, valued, strict=False)
    ]
    v = mx.concatenate([v, mx.ones((*v.shape[:2], 1), v.dtype)], axis=-1)
    o, state = step(family, q, k, v, g, joined, **options)
    matrices = [x[..., :-1] if has else x for x, has in zip(state, valued, strict=True)]
    vectors = [x[..., -1] for x, has in zip(state, valued, strict=True) if has]
    return o[..., :-1] / (o[..., -1:] + eps), *matrices, *vectors


@pytest.mark.parametrize("schedule", ["forward", "reverse", "random"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_values(monkeypatch, family, shape, schedule):
    metal.install(monkeypatch, schedule=schedule, strict_writes=True)
    arrays, state = inputs(family, *SHAPES[shape])
    options = {"scale": 0.3} | ({"ridge": 0.2} if family == "hla2" else {})
    with metal.counters() as c:
        got = step(family, *arrays, state, eps=0.01, **options)
        mx.eval(got)
    assert c.launches == 1
    assert c.copies == 0
    want = through_a_column(family, *arrays, *state, eps=0.01, **options)
    operator = OPERATORS[family].operator
    serial, kind = (getattr(reference, n) for n in (f"serial_{operator.name}", operator.state.__name__))
    q, k, v, g = (x[:, None] for x in arrays)
    exact, last = serial(q, k, v, decay=g, normalize=True, eps=0.01, initial_state=kind(*state), **options)
    assert_close("o", got[0], exact[:, 0], 1e-6)
    assert_close("o, column", got[0], want[0], 1e-6)
    for i, (x, y, z) in enumerate(zip(got[1], want[1:], last, strict=True)):
        assert_close(f"state {i}", x, z, 1e-6)
        assert_close(f"state {i}, column", x, y, 1e-6)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision(monkeypatch, family, dtype):
    """float16 keeps the quotient of sums that it could not hold."""
    metal.install(monkeypatch)
    arrays, state = inputs(family, 1, 2, 1, 16, 16, dtype)
    state = tuple(1e6 * x for x in state)
    o, _ = step(family, *arrays, state, eps=1e-6)
    wide = [x.astype(mx.float32) for x in arrays]
    assert o.dtype == dtype
    assert_close("o", o, step(family, *wide, state, eps=1e-6)[0], 5e-3)


@pytest.mark.parametrize("family", [op for op in PACKED if op in FAMILIES])
def test_packed(monkeypatch, family):
    metal.install(monkeypatch)
    arrays, state = inputs(family, 2, 4, 2, 24, 16)
    o, want = step(family, *arrays, state, eps=1e-6)
    packed = (kernels.pack(state[0]), *state[1:])
    got, new = step(family, *arrays, packed, eps=1e-6, packed=True)
    assert_close("o", got, o, 1e-6)
    for i, (x, y) in enumerate(zip((kernels.unpack(new[0]), *new[1:]), want, strict=True)):
        assert_close(f"state {i}", x, y, 1e-6)


def test_from_nothing(monkeypatch):
    metal.install(monkeypatch)
    arrays, state = inputs("ahla", 1, 2, 1, 16, 16)
    o, new = step("ahla", *arrays, eps=1e-6)
    zeros = tuple(mx.zeros_like(x) for x in state)
    want, _ = step("ahla", *arrays, zeros, eps=1e-6)
    assert mx.array_equal(o, want)
    assert [x.shape for x in new] == [x.shape for x in state]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients(monkeypatch, family):
    metal.install(monkeypatch, checked=False)
    arrays, state = inputs(family, 1, 4, 2, 16, 8)
    given = [
        mx.array(normal(20 + i, *s), mx.float32) for i, s in enumerate([(1, 4, 8), *(x.shape for x in state)])
    ]

    def fused(q, k, v, g, *state):
        o, state = step(family, q, k, v, g, state, eps=0.01, scale=0.5)
        return [o, *state]

    def column(*arrays):
        return list(through_a_column(family, *arrays, eps=0.01, scale=0.5))

    got, want = (mx.vjp(f, [*arrays, *state], given)[1] for f in (fused, column))
    for i, (x, y) in enumerate(zip(got, want, strict=True)):
        assert_close(f"gradient {i}", x, y, 1e-5)
