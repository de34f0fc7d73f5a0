"""The layer as a module: shapes, types, start values, errors, saving, compiling, quantising, swapping in."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from nn_reference import assert_close

from mlx_hla.nn import HLACache, HLAttention, SelfAttentionAdapter, ShortConv, spread_memories

DTYPES = {"fp16": mx.float16, "bf16": mx.bfloat16, "fp32": mx.float32}


def parameters(module):
    return dict(tree_flatten(module.parameters()))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("T", [1, 2, 65])
def test_shapes_and_dtypes(T, dtype):
    attention = HLAttention(24, 4, num_kv_heads=2, head_dim=10, value_dim=7, rope=True, output_gate=True)
    attention.set_dtype(dtype)
    cache = attention.make_cache()
    for _ in range(2):
        y = attention(mx.random.normal((3, T, 24)).astype(dtype), cache=cache)
        assert y.shape == (3, T, 24)
        assert y.dtype == dtype
        assert mx.isfinite(y).all()
    S, F, eta = cache.memory
    assert S.shape == (3, 2, 10, 10)
    assert F.shape == (3, 4, 10, 7)
    assert eta is None
    assert S.dtype == F.dtype == mx.float32
    assert cache.conv.shape == (3, 3, 4 * 10 + 2 * 10 + 2 * 7)
    assert cache.offset.tolist() == [2 * T] * 3


def test_mixed_dtypes():
    """Norm gains left in float32 beside bfloat16 projections, as a careful cast of a model leaves them."""
    attention = HLAttention(16, 2, rope=True)
    attention.apply_to_modules(lambda _, m: None if isinstance(m, nn.RMSNorm) else m.set_dtype(mx.bfloat16))
    attention.q_norm.set_dtype(mx.float32)
    assert attention(mx.random.normal((1, 9, 16)).astype(mx.bfloat16)).dtype == mx.bfloat16


def test_start_values():
    mx.random.seed(0)
    attention = HLAttention(256, 4, output_gate=True, bias=True)
    for name in ("qkv_proj", "out_proj", "gate_proj"):
        std = attention[name].weight.std().item()
        assert abs(std - 256**-0.5) < 0.02 * 256**-0.5
        assert not attention[name].bias.any()
    assert attention.conv.weight.abs().max().item() <= 0.5
    for name in ("q_norm", "k_norm", "out_norm"):
        assert (attention[name].weight == 1).all()
    assert not attention.decay_gate.weight.any()
    memory = 1 / np.logaddexp(0, np.asarray(attention.decay_gate.bias, np.float64))
    assert_close("memory", memory, spread_memories(4), 1e-5)


def test_parameter_names():
    """What a checkpoint holds; a rename breaks every saved model."""
    full = HLAttention(8, 2, output_gate=True)
    assert {k: v.shape for k, v in parameters(full).items()} == {
        "qkv_proj.weight": (24, 8),
        "conv.weight": (24, 4),
        "q_norm.weight": (4,),
        "k_norm.weight": (4,),
        "decay_gate.weight": (2, 8),
        "decay_gate.bias": (2,),
        "out_norm.weight": (4,),
        "gate_proj.weight": (8, 8),
        "out_proj.weight": (8, 8),
    }
    bare = HLAttention(8, 2, decay="fixed", qk_norm="l2", conv_size=0, output_norm=False)
    assert set(parameters(bare)) == {"qkv_proj.weight", "out_proj.weight"}


def test_orders_are_names():
    for order, name in ((1, "first"), (2, "hla2"), (3, "hla3")):
        assert HLAttention(8, 2, operator=order).operator == name
    assert HLAttention(8, 2, operator=4).operator == 4
    assert "operator='hla2'" in repr(HLAttention(8, 2))


def test_save_and_load(tmp_path):
    mx.random.seed(1)
    one, two = (HLAttention(16, 2, output_gate=True, rope=True) for _ in range(2))
    x = mx.random.normal((1, 20, 16))
    one.save_weights(str(tmp_path / "layer.safetensors"))
    two.load_weights(str(tmp_path / "layer.safetensors"), strict=True)
    assert mx.array_equal(one(x), two(x))


def test_compiled_decode():
    mx.random.seed(2)
    attention = HLAttention(16, 2, rope=True)
    x = mx.random.normal((2, 12, 16))

    @mx.compile
    def decode(x, state):
        cache = HLACache.from_state(state)
        return attention(x, cache=cache), cache.state

    cache, other = attention.make_cache(), attention.make_cache()
    attention(x[:, :9], cache=cache)
    attention(x[:, :9], cache=other)
    state = cache.state
    for t in range(9, 12):
        y, state = decode(x[:, t : t + 1], state)
        assert_close("token", y, attention(x[:, t : t + 1], cache=other), 1e-5)


def test_compiled_forward():
    mx.random.seed(3)
    attention = HLAttention(16, 2, conv_size=0, decay=None)  # each fused kernel is a run of the C++ compiler
    x = mx.random.normal((2, 40, 16))
    assert_close("y", mx.compile(lambda x: attention(x))(x), attention(x), 1e-5)


def test_checkpoint():
    """Gradients recomputed by nn.utils.checkpoint are the gradients."""
    mx.random.seed(3)
    attention = HLAttention(16, 2)
    x, target = mx.random.normal((2, 40, 16)), mx.random.normal((2, 40, 16))

    def plain(x):
        return ((attention(x) - target) ** 2).mean()

    def checkpointed(x):
        return ((nn.utils.checkpoint(attention)(x) - target) ** 2).mean()

    (loss, want), (again, got) = (nn.value_and_grad(attention, f)(x) for f in (plain, checkpointed))
    assert_close("loss", again, loss, 1e-6)
    got = dict(tree_flatten(got))
    for name, grad in tree_flatten(want):
        assert_close(name, got[name], grad, 1e-5)


def test_freeze():
    attention = HLAttention(16, 2, decay="fixed")
    attention.freeze()
    assert not tree_flatten(attention.trainable_parameters())
    attention.unfreeze(keys=["weight"])
    assert set(dict(tree_flatten(attention.trainable_parameters()))) == set(parameters(attention))


def test_quantize():
    """Projections are quantised, the gate is not, and the outputs stay near."""
    mx.random.seed(4)
    attention = HLAttention(64, 2, output_gate=True)
    x = mx.random.normal((1, 50, 64))
    want = attention(x)
    nn.quantize(attention, group_size=64, bits=8)
    for name in ("qkv_proj", "out_proj", "gate_proj"):
        assert isinstance(attention[name], nn.QuantizedLinear)
    assert attention.decay_gate.weight.dtype == mx.float32
    error = mx.linalg.norm(attention(x) - want) / mx.linalg.norm(want)
    assert error.item() < 0.03, f"relative error {error.item():.3g}"


BAD_OPTIONS = [
    ({"dims": 10, "num_heads": 4}, "dims must be a multiple of num_heads=4"),
    ({"num_heads": 0}, "num_heads must be a positive integer, got 0"),
    ({"dims": 8.0}, "dims must be a positive integer, got 8.0"),
    ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads=4, got 3"),
    ({"head_dim": True}, "head_dim must be a positive integer, got True"),
    ({"value_dim": -1}, "value_dim must be a positive integer, got -1"),
    ({"operator": "hla4"}, "operator must be one of first, "),
    ({"operator": 0}, "operator must be one of"),
    ({"operator": True}, "operator must be one of"),
    ({"operator": None}, "operator must be one of"),
    ({"decay": 0.9}, "decay must be one of 'gate', 'fixed', None, got 0.9"),
    ({"qk_norm": "layer"}, "qk_norm must be one of 'rms', 'l2', None, got 'layer'"),
    ({"conv_size": 1}, "conv_size must be None, 0 or an integer of at least 2, got 1"),
    ({"conv_size": 2.5}, "conv_size must be"),
    ({"rope": -1.0}, "rope must be None, True or a positive base, got -1.0"),
    ({"rope": "yes"}, "rope must be"),
    ({"rope": float("inf")}, "rope must be None, True or a positive base, got inf"),
    ({"rope": 10**400}, "rope must be None, True or a positive base, got 1000"),
    ({"conv_size": {}}, "conv_size must be None, 0 or an integer of at least 2, got {}"),
    ({"normalize": "false"}, "normalize must be one of False, True, got 'false'"),
    ({"output_norm": None}, "output_norm must be one of False, True, got None"),
    ({"bias": 1}, "bias must be one of False, True, got 1"),
    ({"rope": True, "head_dim": 3}, "rope needs an even head_dim, got 3"),
    ({"output_gate": "relu"}, "output_gate must be one of False, True, 'silu', 'sigmoid', got 'relu'"),
    ({"backend": "rocm"}, "backend must be one of None, 'mlx', 'metal', 'cuda', got 'rocm'"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=[str(o) for o, _ in BAD_OPTIONS])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=r"\[HLAttention\] ") as error:
        HLAttention(**{"dims": 16, "num_heads": 4, **options})
    assert message in str(error.value)


BAD_INPUTS = [
    ({"x": mx.zeros((5, 8))}, "x must be [B, T, 8] with B, T >= 1, got (5, 8)"),
    ({"x": mx.zeros((1, 5, 9))}, "x must be [B, T, 8]"),
    ({"x": mx.zeros((1, 0, 8))}, "got (1, 0, 8)"),
    ({"x": mx.zeros((1, 5, 8), mx.int32)}, "x must be floating point, got mlx.core.int32"),
    ({"x": np.zeros((1, 5, 8))}, "x must be an mlx array, got ndarray"),
    ({"mask": mx.ones((2, 6), mx.bool_)}, "mask must be bool (2, 5), got mlx.core.bool (2, 6)"),
    ({"mask": mx.ones((2, 5))}, "mask must be bool (2, 5), got mlx.core.float32 (2, 5)"),
    ({"mask": "causal"}, "mask must be bool (2, 5), got 'causal'"),
    ({"segment_ids": mx.ones((2, 5))}, "segment_ids must be integers (2, 5)"),
    ({"segment_ids": mx.ones((5,), mx.int32)}, "segment_ids must be integers (2, 5)"),
    ({"mask": np.ones((2, 5), bool)}, "mask must be bool (2, 5), got array([[ True, True"),
    ({"cache": []}, "cache must be an HLACache, got list"),
]


@pytest.mark.parametrize(("inputs", "message"), BAD_INPUTS, ids=[m for _, m in BAD_INPUTS])
def test_bad_inputs(inputs, message):
    with pytest.raises(ValueError, match=r"\[HLAttention\] ") as error:
        HLAttention(8, 2)(**{"x": mx.zeros((2, 5, 8)), **inputs})
    assert message in str(error.value)


def test_bad_conv():
    with pytest.raises(ValueError, match="width must be an integer of at least 2, got 1"):
        ShortConv(4, 1)
    with pytest.raises(ValueError, match=r"state must be \(1, 3, 4\), got \(2, 3, 4\)"):
        ShortConv(4)(mx.zeros((1, 5, 4)), mx.zeros((2, 3, 4)))
    with pytest.raises(ValueError, match=r"state must be .* got str"):
        ShortConv(4)(mx.zeros((1, 5, 4)), "state")
    with pytest.raises(ValueError, match="lengths must be integers"):
        ShortConv(4)(mx.zeros((1, 5, 4)), lengths=mx.ones((1,)))
    with pytest.raises(ValueError, match="need 0 < shortest <= longest"):
        spread_memories(4, 9, 8)
    with pytest.raises(ValueError, match="heads must be at least 1, got 0"):
        spread_memories(0)


def test_a_cache_of_another_layer_is_refused():
    x = mx.zeros((1, 2, 16))
    for other in (
        {"operator": "ahla"},
        {"operator": "readout"},
        {"head_dim": 4},
        {"conv_size": 3},
        {"conv_size": 0},
    ):
        left = HLACache()
        HLAttention(16, 2, **other)(x, cache=left)
        with pytest.raises(ValueError, match=r"state|must be"):
            HLAttention(16, 2)(x, cache=left)
    for state in (3, "x", (1, 2), None):
        with pytest.raises(ValueError, match=r"\[HLACache\] state must be \(memory, conv, offset\), got"):
            HLACache.from_state(state)


@pytest.mark.parametrize("backend", ["metal", "cuda"])
def test_an_unavailable_backend_is_an_error(backend):
    if getattr(mx, backend).is_available():
        pytest.skip(f"{backend} is available here")
    attention = HLAttention(8, 2, backend=backend)
    cache = attention.make_cache()
    with pytest.raises(ValueError, match=backend):
        attention(mx.zeros((1, 4, 8)), cache=cache)
    assert cache.empty()
    assert cache.conv is None


@pytest.mark.parametrize("checkpoint", [False, True])
def test_adapter_in_a_transformer(checkpoint):
    mx.random.seed(5)
    model = nn.TransformerEncoder(2, 16, 2, checkpoint=checkpoint)
    for block in model.layers:
        block.attention = SelfAttentionAdapter(HLAttention(16, 2))
    x = mx.random.normal((2, 12, 16))
    y = model(x, "causal")
    changed = mx.concatenate([x[:, :7], -x[:, 7:]], axis=1)
    assert_close("past", model(changed, "causal")[:, :7], y[:, :7], 1e-5)
    assert mx.abs(model(changed, "causal") - y)[:, 7:].max() > 1e-2
    loss, grads = nn.value_and_grad(model, lambda x: model(x, "causal").square().mean())(x)
    assert mx.isfinite(loss)
    assert all(mx.isfinite(g).all() for _, g in tree_flatten(grads))


def test_adapter_masks():
    attention = SelfAttentionAdapter(HLAttention(8, 2))
    x = mx.random.normal((1, 6, 8))
    want = attention.attention(x)
    additive = nn.MultiHeadAttention.create_additive_causal_mask(6)
    visible = mx.tril(mx.ones((6, 6), mx.bool_))
    half = nn.MultiHeadAttention.create_additive_causal_mask(6, mx.float16)
    brain = mx.where(visible, 0.0, -1e4).astype(mx.bfloat16)  # which holds -9984
    whole = mx.where(visible, 0, -10000)
    for mask in ("causal", additive, visible, half, brain, whole, additive[None, None]):
        assert_close("y", attention(x, x, x, mask), want, 0)
    assert_close("y", attention(x, x, x, mx.where(visible, 0.0, -mx.inf)), want, 0)
    other = mx.array(x)
    for inputs in ((x, other, x), (x, x, other), (x, other, other)):
        with pytest.raises(ValueError, match="no cross-attention"):
            attention(*inputs, "causal")
    with pytest.raises(ValueError, match="both directions"):
        attention(x, x, x)
    biased = mx.where(visible, 0.0, -100.0)  # a bias that softmax can outweigh hides nothing
    for mask in (mx.zeros((6, 6)), biased, mx.where(visible, -0.1, -1e9), mx.where(visible, 0.0, mx.nan)):
        with pytest.raises(ValueError, match="mask is not causal"):
            attention(x, x, x, mask)
    with pytest.raises(ValueError, match="mask is not causal"):
        attention(x, x, x, mx.triu(mx.ones((6, 6), mx.bool_)))
    for mask in (mx.zeros((1, 1, 1, 6)), mx.zeros((5, 5)), "full", mx.zeros((2, 1, 6, 6))):
        with pytest.raises(ValueError, match=r'mask must be "causal" or a \[6, 6\] causal mask'):
            attention(x, x, x, mask)
    with pytest.raises(ValueError, match='pass mask="causal"'):
        mx.compile(lambda x, mask: attention(x, x, x, mask))(x, additive)
    with pytest.raises(ValueError, match="attention must be an HLAttention"):
        SelfAttentionAdapter(nn.MultiHeadAttention(8, 2))
