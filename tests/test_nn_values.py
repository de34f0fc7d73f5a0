"""The layer's values and gradients against the float64 recurrences."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map_with_path
from nn_reference import SOFTMAX, assert_close, layer, make, parameters

from mlx_hla.nn import DecayGate, ShortConv, fixed_decay, spread_memories
from mlx_hla.ops.operator import choices

OPERATORS = [*choices(), 4, *SOFTMAX]
OPTIONS = {
    "default": {},
    "gqa-rope-gated": {
        "num_kv_heads": 2,
        "value_dim": 6,
        "rope": 500.0,
        "output_gate": True,
        "bias": True,
    },
    "mqa-l2-fixed": {"num_kv_heads": 1, "qk_norm": "l2", "decay": "fixed", "output_gate": "sigmoid"},
    "plain": {"qk_norm": None, "decay": None, "conv_size": 0, "output_norm": False},
    "fixed-conv2-head12": {"decay": "fixed", "conv_size": 2, "head_dim": 12, "rope": True},
}


def build(operator, options, dims=16, heads=4, seed=3):
    """A layer whose parameters have all left their starting values."""
    mx.random.seed(seed)
    attention = make(operator, options, dims, heads)

    def stir(path, p):
        return p + 0.3 * mx.random.normal(p.shape) if "weight" not in path or "norm" in path else p

    attention.update(tree_map_with_path(stir, attention.parameters()))
    for gate in ("decay_gate", "step_gate"):
        if gate in attention:
            attention[gate].weight = 0.3 * mx.random.normal(attention[gate].weight.shape)
    return attention


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_values(operator, options):
    attention = build(operator, options)
    x = np.random.default_rng(0).normal(size=(2, 70, 16)).astype(np.float32)
    want = np.stack([layer(attention, row) for row in x])
    assert_close("y", attention(mx.array(x)), want, 5e-5)


LEARNED = {
    "readout": {"num_kv_heads": 2, "output_gate": True},
    "mixed": {"num_kv_heads": 2, "value_dim": 6, "output_norm": False},
    "readout-l2": {"qk_norm": "l2", "rope": True, "decay": None},
    "mixed-fixed": {"decay": "fixed", "output_norm": False},
}


@pytest.mark.parametrize("name", LEARNED)
def test_learned_coefficients(name):
    attention = build(name.split("-")[0], {"coefficients": "learned", **LEARNED[name]})
    x = np.random.default_rng(5).normal(size=(2, 70, 16)).astype(np.float32)
    want = np.stack([layer(attention, row) for row in x])
    # q − β S q / n can nearly vanish before the norm of the output.
    error = np.abs(np.asarray(attention(mx.array(x))) - want) / (1 + np.abs(want))
    assert np.quantile(error, 0.98) < 5e-5, error.max()
    cache = attention.make_cache()
    pieces = [attention(mx.array(x[:, a:b]), cache=cache) for a, b in ((0, 60), (60, 68), (68, 69), (69, 70))]
    assert_close("decoded", mx.concatenate(pieces, axis=1), attention(mx.array(x)), 1e-3)


def test_learned_coefficients_start_at_the_operators_own():
    x = mx.random.normal((1, 30, 16), key=mx.random.key(0))
    outputs = []
    for coefficients in (None, "learned"):
        mx.random.seed(0)
        outputs.append(make("readout", {"coefficients": coefficients}, 16, 4)(x))
    assert_close("y", *outputs, 1e-5)


@pytest.mark.parametrize("operator", ["first", "hla2", "ahla"], ids=str)
def test_values_normalized(operator):
    attention = build(operator, {"normalize": True, "num_kv_heads": 2, "output_norm": False})
    x = np.random.default_rng(1).normal(size=(1, 40, 16)).astype(np.float32)
    # A signed denominator may come near zero, where nothing is exact: where it does not, both agree.
    got, want = np.asarray(attention(mx.array(x)))[0], layer(attention, x[0])
    error = np.abs(got - want) / (1 + np.abs(want))
    assert np.quantile(error, 0.9) < 1e-4, f"90% of the errors should be below 1e-4, got {error}"


@pytest.mark.parametrize("operator", ["hla2", *SOFTMAX])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["fp16", "bf16"])
def test_values_half(dtype, operator):
    attention = build(operator, {"rope": True, "num_kv_heads": 2, "output_gate": True})
    attention.set_dtype(dtype)
    x = mx.array(np.random.default_rng(2).normal(size=(1, 70, 16)).astype(np.float32)).astype(dtype)
    y = attention(x)
    assert y.dtype == dtype
    want = layer(attention, np.asarray(x.astype(mx.float32))[0])
    assert_close("y", y.astype(mx.float32)[0], want, 1e-2 if dtype == mx.float16 else 6e-2)


@pytest.mark.parametrize("operator", ["first", "hla2", "ahla", "hla3", "readout", "mixed", *SOFTMAX])
def test_gradients(operator):
    """Every parameter and the input, along random directions, against float64 differences."""
    options = {"num_kv_heads": 1, "rope": True, "output_gate": True, "conv_size": 3, "bias": True}
    if operator in ("readout", "mixed"):
        options["coefficients"] = "learned"
    attention = build(operator, {"head_dim": 4, **options}, dims=6, heads=2)
    rng = np.random.default_rng(4)
    x = rng.normal(size=(9, 6)).astype(np.float32)
    target = rng.normal(size=(9, 6))

    def loss(p, x):
        attention.update(p)
        return (attention(x[None])[0] * mx.array(target.astype(np.float32))).sum()

    weights = parameters(attention)
    grads, grad_x = mx.grad(loss, argnums=(0, 1))(attention.trainable_parameters(), mx.array(x))
    grads = dict(tree_flatten(grads))
    assert set(grads) == set(weights)

    def reference(name, change):
        if name == "x":
            return (layer(attention, x + change, weights) * target).sum()
        return (layer(attention, x, {**weights, name: weights[name] + change}) * target).sum()

    for name, grad in {"x": grad_x, **grads}.items():
        direction = rng.choice([-1e-6, 1e-6], size=grad.shape)
        want = (reference(name, direction) - reference(name, -direction)) / 2e-6
        got = (np.asarray(grad, np.float64) * direction).sum() / 1e-6
        assert_close(f"d{name}", got, want, 1e-4)


def test_short_conv_matches_the_sum():
    mx.random.seed(0)
    conv = ShortConv(5, 3, activation=False)
    x = mx.random.normal((2, 7, 5))
    y, state = conv(x)
    a, w = np.asarray(x), np.asarray(conv.weight)
    for t in range(7):
        want = sum(a[:, t - 2 + i] * w[:, i] for i in range(3) if t - 2 + i >= 0)
        assert_close(f"y[{t}]", y[:, t], want, 1e-6)
    assert_close("state", state, a[:, -2:], 0)
    split, state = conv(x[:, :1])
    rest, state = conv(x[:, 1:], state)
    assert_close("continued", mx.concatenate([split, rest], 1), y, 1e-6)
    assert_close("silu", ShortConv.__call__(_with_silu(conv), x)[0], nn.silu(y), 1e-6)


def _with_silu(conv):
    twin = ShortConv(conv.channels, conv.width)
    twin.weight = conv.weight
    return twin


def test_memories_start_between_8_and_512_tokens():
    assert_close("memories", spread_memories(4), [8, 32, 128, 512], 1e-9)
    assert spread_memories(1) == [64.0]
    gate = DecayGate(10, 4)
    g = gate(mx.random.normal((2, 3, 10)) * 100)
    assert g.dtype == mx.float32
    assert_close(
        "gate", -1 / np.log(np.asarray(g, np.float64)), np.broadcast_to([8, 32, 128, 512], (2, 3, 4)), 1e-3
    )
    assert_close("fixed", -1 / np.log(np.asarray(fixed_decay(4), np.float64)), [8, 32, 128, 512], 1e-3)


def test_gate_stays_finite_when_saturated():
    gate = DecayGate(1, 1)
    gate.weight = mx.ones((1, 1))
    x = mx.array([[[1e4], [1e30], [-1e4], [-1e30], [0.0]]])
    g, grad = mx.value_and_grad(lambda x: gate(x).sum())(x)
    assert_close("g", gate(x)[0, :4, 0], [0, 0, 1, 1], 0)
    assert mx.isfinite(g)
    assert mx.isfinite(grad).all()
