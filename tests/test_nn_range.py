"""No overflow over 131,072 tokens in half precision: the worst inputs that the layer's bounds are about."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from nn_reference import assert_close

from mlx_hla.nn import HLAttention

T, D = 131_072, 8
DTYPES = {"fp16": mx.float16, "bf16": mx.bfloat16}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def build(operator="hla2", q_along_k=False, no_decay=False, **options):
    mx.random.seed(0)
    attention = HLAttention(D, 1, operator=operator, **options)
    if q_along_k:
        for module in (attention.qkv_proj, attention.conv):
            q, _, v = mx.split(module.weight, 3)
            module.weight = mx.concatenate([q, q, v])
    if no_decay:
        attention.decay_gate.bias = mx.array([-100.0])  # g = 1 to the last bit
    return attention


def gradients(attention, x):
    direction = mx.sin(mx.arange(D))

    def loss(x):
        y = attention(x).astype(mx.float32)
        return (y * direction).mean() + y.square().mean()

    value, grads = nn.value_and_grad(attention, loss)(x)
    return value, dict(tree_flatten(grads))


@dtypes
@pytest.mark.parametrize("kind", ["random", "large"])
def test_defaults(kind, dtype):
    attention = build()
    attention.set_dtype(dtype)
    x = (mx.random.normal((1, T, D)) * (1000 if kind == "large" else 1)).astype(dtype)
    loss, grads = gradients(attention, x)
    assert mx.isfinite(loss)
    for name, grad in grads.items():
        assert mx.isfinite(grad).all(), name


@pytest.mark.parametrize(
    ("operator", "dtype"),
    [
        ("first", "bf16"),
        ("hla2", "bf16"),
        ("hla2", "fp16"),
        ("ahla", "bf16"),
        ("hla3", "bf16"),
        ("hla3", "fp16"),
    ],
)
def test_equal_tokens_without_decay(operator, dtype):
    """T equal tokens, q along k, g = 1: |o| grows to D T²/2 |v| for HLA2, and all it says is v.

    So the output is the same whatever T, once the first tokens, which the filter sees otherwise, no longer
    count; and nothing depends on the length of q and k.
    """
    dtype = DTYPES[dtype]
    attention = build(operator, q_along_k=True, no_decay=True)
    attention.set_dtype(dtype)
    x = mx.ones((1, T, D), dtype)
    y = attention(x)
    tol = 2e-3 if dtype == mx.float16 else 2e-2
    assert_close("last", y[:, -1].astype(mx.float32), y[:, T // 4].astype(mx.float32), tol)
    loss, grads = gradients(attention, x)
    assert mx.isfinite(loss)
    for name, grad in grads.items():
        assert mx.isfinite(grad).all(), name
    # Exactly zero by scale invariance; a norm that lost rms(o)^-3 shows here as 1.
    for name in ("q_norm.weight", "k_norm.weight"):
        assert mx.abs(grads[name]).max() < 1e-3, name


@dtypes
def test_decode_after_a_long_prompt(dtype):
    attention = build(q_along_k=True, no_decay=True)
    attention.set_dtype(dtype)
    x = mx.ones((1, T, D), dtype)
    cache = attention.make_cache()
    y = attention(x, cache=cache)
    assert all(mx.isfinite(a).all() for a in cache.memory[:2])
    tol = 2e-3 if dtype == mx.float16 else 2e-2
    for _ in range(3):
        z = attention(x[:, :1], cache=cache)
        assert_close("token", z.astype(mx.float32), y[:, -1:].astype(mx.float32), tol)


def test_scale_does_not_show():
    """The shrunk scale and the norm's shrunk epsilon are one function with the plain ones."""
    mx.random.seed(1)
    x = mx.random.normal((1, 50, D))
    for operator in ("first", "hla2", "ahla", "hla3", 4, 7):
        attention = build(operator)
        want = attention(x)
        shrink = attention.scale / D**-0.5
        attention.scale /= shrink
        attention.out_norm.eps = 1e-5
        assert shrink < 1
        assert_close("y", attention(x), want, 1e-5)
