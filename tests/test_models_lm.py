"""The language model: cached and whole passes agree, states keep their size, weights start by the table."""

import itertools

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_hla.losses import token_losses
from mlx_hla.models import LanguageModel, ModelConfig
from mlx_hla.models.lm import INIT_TABLE
from mlx_hla.nn.cache import KVCache, arrays, cache_bytes, fill
from mlx_hla.ops import backend
from mlx_hla.train import preset

SMALL = {"vocab_size": 50, "dims": 32, "num_layers": 2, "num_heads": 4, "hidden_dims": 40, "context": 32}


def build(**changes):
    return LanguageModel(ModelConfig(**{**SMALL, **changes}), seed=1)


def some_tokens(B, T, seed=0):
    return mx.random.randint(0, SMALL["vocab_size"], (B, T), key=mx.random.key(seed))


VARIANTS = {
    "first": {"operator": "first"},
    "hla2": {"operator": "hla2"},
    "ahla": {"operator": "ahla"},
    "hla3": {"operator": "hla3"},
    "order4": {"operator": 4},
    "softmax": {"operator": "softmax"},
    "hla2-gqa-rope-gate": {"num_kv_heads": 2, "rope_theta": 100.0, "output_gate": True},
    "hla2-fixed-noconv-l2": {"decay": "fixed", "conv_size": 0, "qk_norm": "l2"},
    "hybrid": {"layers": ("window", "readout"), "window": 16, "output_gate": True},
    "hybrid-full": {"layers": ("softmax", "ahla", "window"), "num_layers": 4, "num_kv_heads": 2},
    "softmax-gqa-plain": {"operator": "softmax", "num_kv_heads": 1, "conv_size": 0, "qk_norm": None},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_prefill_and_decode_match_the_whole_pass(name):
    model = build(**VARIANTS[name])
    tokens = some_tokens(2, 300)
    whole = model(tokens)
    cache = model.make_cache()
    cuts = [0, 1, 3, 130, 290, *range(291, 301)]
    parts = [model(tokens[:, a:b], cache) for a, b in itertools.pairwise(cuts)]
    difference = mx.abs(mx.concatenate(parts, axis=1) - whole).max().item()
    assert difference < 1e-4, difference
    assert whole.shape == (2, 300, 50)


def test_state_is_the_two_matrices_and_three_inputs_and_stays_so():
    model = build()
    H, D, conv = 4, 8, 3 * 3 * 32
    sizes = []
    for T in (1, 2, 300):
        cache = model.make_cache()
        model(some_tokens(1, T), cache)
        shapes = sorted(a.shape for a in arrays(cache[0].state))
        assert shapes == [(1, 3, 96), (1, H, D, D), (1, H, D, D)]
        sizes.append(cache_bytes(cache))
    assert sizes == [2 * 4 * (2 * H * D * D + conv)] * 3


def test_key_value_cache_grows():
    model = build(operator="softmax")
    cache = model.make_cache()
    for T in (1, 300, 1):
        model(some_tokens(1, T), cache)
    assert cache[0].length == 302
    assert cache[0].state[0].shape == (1, 4, 302, 8)
    again = KVCache()
    again.state = cache[0].state
    assert (again.length, again.nbytes) == (302, cache[0].nbytes)
    assert not again.empty()


def test_one_token_runs_the_step_function(monkeypatch):
    model = build()
    cache = model.make_cache()
    model(some_tokens(1, 5), cache)

    def refuse(*args, **kwargs):
        raise AssertionError("the chunked operator ran for one token")

    monkeypatch.setattr(backend, "sequence", refuse)
    model(some_tokens(1, 1), cache)


@pytest.mark.parametrize("operator", ["hla2", "softmax", "window"])
def test_packed_documents_do_not_see_each_other(operator):
    model = build(operator=operator)
    a, b = some_tokens(1, 20, 1), some_tokens(1, 13, 2)
    ids = mx.array([[0] * 20 + [1] * 13])
    packed = model(mx.concatenate([a, b], axis=1), segment_ids=ids)
    assert mx.abs(packed[:, :20] - model(a)).max().item() < 1e-4
    assert mx.abs(packed[:, 20:] - model(b)).max().item() < 1e-4


@pytest.mark.parametrize("operator", ["hla2", "softmax", "window"])
def test_padding_changes_nothing(operator):
    model = build(operator=operator)
    tokens = some_tokens(2, 20)
    mask = mx.array([[True] * 20, [True] * 12 + [False] * 8])
    padded = model(tokens, mask=mask)
    assert mx.abs(padded[1:, :12] - model(tokens[1:, :12])).max().item() < 1e-4


@pytest.mark.parametrize("shape", [(3,), (1, 0), (0, 3), (1, 2, 3)])
def test_wrong_tokens_are_refused(shape):
    with pytest.raises(ValueError, match=r"\[LanguageModel\] tokens must be"):
        build()(mx.zeros(shape, mx.int32))


@pytest.mark.parametrize("operator", ["hla2", "softmax"])
@pytest.mark.parametrize(
    "bad",
    [
        mx.array([[1, 50]]),
        mx.array([[-1, 3]]),
        mx.array([[2**31 - 1]]),
        mx.array([[2**40]], mx.int64),
        mx.full((1, 1), 2**32 + 3, mx.uint64),
        mx.array([[1.0]]),
        mx.array([[True]]),
        [[1, 2]],
    ],
    ids=range(8),
)
def test_ids_without_a_row_are_refused(operator, bad):
    model = build(operator=operator)
    said = r"\[LanguageModel\] tokens must be (from 0 to 49|an array of integers)"
    with pytest.raises(ValueError, match=said):
        model(bad)
    with pytest.raises(ValueError, match=said):
        model(bad, model.make_cache())
    assert model(mx.array([[0, 49]], mx.uint8)).shape == (1, 2, 50)


def test_a_compiled_model_still_runs():
    model = build()
    tokens = some_tokens(1, 5)
    assert mx.allclose(mx.compile(model)(tokens), model(tokens), atol=1e-5)


def test_weights_follow_from_the_seed():
    def flat(seed):
        return dict(tree_flatten(LanguageModel(ModelConfig(**SMALL), seed).parameters()))

    one, two, other = flat(1), flat(1), flat(2)
    assert all(mx.array_equal(one[n], two[n]) for n in one)
    assert not mx.array_equal(one["embedding.weight"], other["embedding.weight"])
    assert not mx.array_equal(one["layers.0.mixer.qkv_proj.weight"], one["layers.1.mixer.qkv_proj.weight"])


def test_every_row_of_the_table_does_what_it_says():
    model = LanguageModel(ModelConfig(dims=128, num_layers=2, num_heads=4, hidden_dims=256, vocab_size=400))
    weights = dict(tree_flatten(model.parameters()))
    deviation = {n: np.array(w).std() for n, w in weights.items()}
    assert deviation["embedding.weight"] == pytest.approx(0.02, rel=0.05)
    assert deviation["layers.0.mixer.qkv_proj.weight"] == pytest.approx(128**-0.5, rel=0.05)
    assert deviation["layers.0.mixer.out_proj.weight"] == pytest.approx((128 * 4) ** -0.5, rel=0.05)
    assert deviation["layers.1.mlp.down_proj.weight"] == pytest.approx((256 * 4) ** -0.5, rel=0.05)
    assert mx.abs(weights["layers.0.mixer.conv.weight"]).max().item() <= 0.5
    assert mx.array_equal(weights["norm.weight"], mx.ones((128,)))
    assert mx.array_equal(weights["layers.0.mixer.decay_gate.weight"], mx.zeros((4, 128)))
    assert len(INIT_TABLE) == 6


def test_a_parameter_without_a_row_is_an_error():
    model = build()
    model.surprise = mx.zeros((3,))
    from mlx_hla.models.lm import init_weights

    with pytest.raises(ValueError, match="no row of INIT_TABLE names surprise"):
        init_weights(model, 0)


@pytest.mark.parametrize("operator", [None, "softmax"])
def test_shipped_preset_fits_in_12_megabytes(operator):
    model = LanguageModel(preset("small", {"operator": operator} if operator else {})[0])
    assert 5.5e6 < model.num_parameters < 5.9e6
    assert model.num_parameters * 2 + 100_000 < 12e6
    assert model.config.matrix_parameters == pytest.approx(model.num_parameters, rel=0.02)


@pytest.mark.parametrize("operator", ["hla2", "softmax"])
def test_checkpointing_and_dropout_give_the_same_gradients(operator):
    model = build(operator=operator)
    params = model.parameters()
    tokens, key = some_tokens(2, 17), mx.random.key(5)

    def run(checkpoint, key, dropout=0.3):
        def loss(params):
            options = {"dropout": dropout, "key": key, "checkpoint": checkpoint}
            return token_losses(model, params, tokens, **options).mean()

        value, grads = mx.value_and_grad(loss)(params)
        return value.item(), dict(tree_flatten(grads))

    value, grads = run(False, key)
    again, regrads = run(True, key)
    assert again == pytest.approx(value, abs=1e-6)
    for name, g in grads.items():
        assert mx.allclose(g, regrads[name], atol=1e-5), name
        assert mx.abs(g).max().item() > 0, name
    assert run(False, mx.random.key(6))[0] != value
    assert run(False, None, 0.0)[0] != value
    with pytest.raises(ValueError, match="dropout needs a key"):
        model(tokens, dropout=0.1)


def test_fill_puts_arrays_back_where_they_were():
    tree = [(mx.zeros((1,)), None, (mx.ones((2,)), [mx.zeros((3,)), 4]))]
    leaves = [a + 1 for a in arrays(tree)]
    assert [a.tolist() for a in arrays(fill(tree, leaves))] == [[1.0], [2.0, 2.0], [1.0] * 3]
    assert fill(tree, leaves)[0][1] is None
    assert fill(tree, leaves)[0][2][1][1] == 4


def test_bfloat16_stays_bfloat16():
    for operator in ("hla2", "softmax"):
        model = build(operator=operator)
        model.set_dtype(mx.bfloat16)
        assert model(some_tokens(1, 9)).dtype == mx.bfloat16
        assert isinstance(model, nn.Module)
