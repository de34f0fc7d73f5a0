"""Our attention in layers of mlx-lm's own models: numbers, caches, batches, training, weights, refusals."""

import copy
import importlib
import inspect

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from conftest import assert_close

from mlx_hla.trees import flat

pytest.importorskip("mlx_lm")
from mlx_lm.generate import batch_generate, generate_step
from mlx_lm.models import llama, ministral3, olmo2, phi3
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    KVCache,
    LRUPromptCache,
    RotatingKVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
)
from mlx_lm.tuner.trainer import TrainingArgs, train
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_hla.decoders import PROJECTIONS
from mlx_hla.mlx_lm import freeze_rest, swap
from mlx_hla.surgery import SwappedAttention

V = 60
COMMON = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": V,
}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 6}
MODELS = {
    "llama": ("llama", {}),
    "llama-bias": ("llama", {"attention_bias": True, "head_dim": 12, "tie_word_embeddings": False}),
    "mistral": ("llama", WINDOWS),
    "mistral3": ("mistral3", {"text_config": {**COMMON, "model_type": "llama", **WINDOWS}}),
    "qwen2": ("qwen2", {}),
    "qwen3": (
        "qwen3",
        {"max_position_embeddings": 64, "head_dim": 8, "tie_word_embeddings": True, "rope_theta": 1e4},
    ),
    "gemma": ("gemma", {"head_dim": 8}),
    "gemma2": ("gemma2", {"head_dim": 8}),
    "gemma3": ("gemma3_text", {"head_dim": 8, "sliding_window": 6, "sliding_window_pattern": 2}),
}
LAYERS = {"odd": "odd", "even": "even", "first": [0], "all": 1}
OPERATORS = ["first", "hla2", "ahla"]


def build(name, seed=0, **changes):
    mx.random.seed(seed)
    file, fields = MODELS[name]
    module = importlib.import_module(f"mlx_lm.models.{file}")
    model = module.Model(module.ModelArgs.from_dict({"model_type": file, **COMMON, **fields, **changes}))
    for path, a in flat(model.parameters()).items():
        if path.endswith(("norm.weight", "bias")):  # or none of them could be lost
            model.load_weights([(path, a + 0.2 * mx.random.normal(a.shape))], strict=False)
    mx.eval(model.parameters())
    return model


def swapped(name="llama", layers="even", operator="hla2", **options):
    model = build(name)
    swap(model, layers, operator, **options)
    return model


def tokens(seed, *shape):
    return mx.random.randint(0, V, shape, key=mx.random.key(seed))


def greedy(model, prompt, count, cache=None, **options):
    steps = generate_step(mx.array(prompt), model, max_tokens=count, prompt_cache=cache, **options)
    return [int(token) for token, _ in steps]


class NoStop:
    """As much of a tokenizer as `batch_generate` needs."""

    eos_token_ids = ()
    decode = staticmethod(str)


# --- numbers


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("name", MODELS)
def test_token_by_token_equals_the_whole(name, layers, operator):
    model = swapped(name, LAYERS[layers], operator)
    x = tokens(1, 2, 14)
    want = model(x)
    assert want.shape == (2, 14, V)
    cache = make_prompt_cache(model)
    parts = [model(x[:, :8], cache=cache), *(model(x[:, t : t + 1], cache=cache) for t in range(8, 14))]
    # Values of the second order and their norm's quotient: 1e-5 for each layer, with room.
    assert_close("logits", mx.concatenate(parts, axis=1), want, 1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_softmax_layers_still_see_no_future(name):
    """With the mask from the wrong cache, they would: the last token must change its own logits alone."""
    x = tokens(2, 1, 12)
    y = mx.concatenate([x[:, :-1], (x[:, -1:] + 1) % V], axis=1)
    for layers in LAYERS.values():
        model = swapped(name, layers)
        for cache in (None, "fresh"):
            a, b = (model(z, cache=cache and make_prompt_cache(model)) for z in (x, y))
            assert mx.array_equal(a[:, :-1], b[:, :-1])
            assert not mx.allclose(a[:, -1], b[:, -1])


@pytest.mark.parametrize(
    "options",
    [
        {"rope": True},
        {"conv_size": 0},
        {"decay": None, "qk_norm": None},
        {"normalize": True, "operator": "first"},
    ],
)
def test_options(options):
    model = swapped("qwen3", "even", **{"operator": "ahla", **options})
    x = tokens(3, 2, 9)
    cache = make_prompt_cache(model)
    parts = [model(piece, cache=cache) for piece in (x[:, :4], x[:, 4:5], x[:, 5:])]
    assert_close("logits", mx.concatenate(parts, axis=1), model(x), 1e-4)


def test_rope_keeps_the_layers_own_positions():
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    model = build("llama", rope_scaling=scaling, max_position_embeddings=128)
    rope = model.layers[1].self_attn.rope
    swap(model, [1], rope=True)
    assert model.layers[1].self_attn.rope is rope
    x, cache = tokens(4, 1, 9), model.make_cache()
    parts = [model(x[:, t : t + 3], cache=cache) for t in (0, 3, 6)]
    assert_close("logits", mx.concatenate(parts, axis=1), model(x), 1e-4)


def test_what_is_fresh_starts_as_it_says():
    model = build("llama")
    attention, norm = model.layers[1].self_attn, model.layers[1].input_layernorm
    swap(model, [1])
    new = model.layers[1].self_attn
    a = mx.random.normal((1, 5, 64))
    assert mx.allclose(new.conv(a)[0], a)
    v = attention.v_proj(norm(mx.random.normal((1, 2000, 32)))).square().mean().sqrt().item()
    assert new.out_norm.weight.shape == (8,)
    assert mx.allclose(new.out_norm.weight, mx.array(v), rtol=0.1)
    assert mx.all(new.decay_gate.weight == 0)


# --- layers and caches


@pytest.mark.parametrize(
    ("layers", "want"),
    [
        ("odd", [1, 3]),
        ("even", [0, 2]),
        ([2, -1, 2], [2, 3]),
        ((0,), [0]),
        (range(1, 3), [1, 2]),
        (1, [0, 1, 2, 3]),
        (2, [1, 3]),
        (3, [2]),
        (slice(None, 2), [0, 1]),
        (slice(-1, None), [3]),
    ],
)
def test_layers(layers, want):
    model = build("llama")
    assert swap(model, layers) == want
    assert [isinstance(b.self_attn, SwappedAttention) for b in model.layers] == [i in want for i in range(4)]
    kinds = [type(c) for c in model.make_cache()]
    assert kinds == [ArraysCache if i in want else KVCache for i in range(4)]


def test_a_model_keeps_its_own_kinds_of_cache():
    kinds = [type(c) for c in make_prompt_cache(swapped("gemma3", [0, 1]))]
    assert kinds == [ArraysCache, ArraysCache, RotatingKVCache, KVCache]


def test_swapping_goes_on_and_leaves_other_models_alone():
    model, other = build("llama"), build("llama")
    swap(model, [0], "first")
    swap(model, [1, 3], "ahla")
    assert [type(c) for c in model.make_cache()] == [ArraysCache, ArraysCache, KVCache, ArraysCache]
    assert [getattr(b.self_attn, "operator", None) for b in model.layers] == ["first", "ahla", None, "ahla"]
    x, cache = tokens(5, 1, 7), model.make_cache()
    parts = [model(x[:, :3], cache=cache), model(x[:, 3:], cache=cache)]
    assert_close("logits", mx.concatenate(parts, axis=1), model(x), 1e-4)
    assert type(other) is llama.Model
    assert isinstance(model, llama.Model)
    assert inspect.signature(model.__call__) == inspect.signature(other.__call__)
    assert mx.array_equal(other(x), build("llama")(x))
    again = copy.deepcopy(model)
    assert mx.array_equal(again(x, cache=again.make_cache()), model(x, cache=model.make_cache()))


def test_a_state_does_not_grow():
    model = swapped("llama", 1)
    cache = model.make_cache()
    model(tokens(6, 1, 3), cache=cache)
    held = sum(c.nbytes for c in cache)
    model(tokens(7, 1, 300), cache=cache)
    assert sum(c.nbytes for c in cache) == held


# --- under mlx-lm's generation


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3"])
@pytest.mark.parametrize("layers", ["even", "all"])
def test_a_batch_of_different_lengths_equals_each_alone(name, layers):
    model = swapped(name, LAYERS[layers], rope=name == "llama")
    prompts = [tokens(n, n).tolist() for n in (1, 30, 7, 18, 30, 2)]
    solo = [greedy(model, prompt, 6) for prompt in prompts]
    for options in ({}, {"prefill_step_size": 8}, {"prefill_batch_size": 2, "completion_batch_size": 3}):
        got = batch_generate(model, NoStop, prompts, max_tokens=6, return_token_ids=True, **options)
        assert got.token_ids == solo
    # And go on from caches, in a batch again.
    caches = [make_prompt_cache(model) for _ in prompts[:3]]
    for prompt, cache in zip(prompts, caches, strict=False):
        model(mx.array([prompt]), cache=cache)
    more = [tokens(50 + n, n).tolist() for n in (3, 1, 9)]
    got = batch_generate(model, NoStop, more, caches, max_tokens=5, return_token_ids=True)
    assert got.token_ids == [greedy(model, a + b, 5) for a, b in zip(prompts, more, strict=False)]


def test_generation_equals_the_whole_and_bears_a_quantised_cache():
    model = swapped("llama", [0, 3])
    prompt = tokens(8, 10).tolist()
    said = greedy(model, prompt, 8)
    assert greedy(model, prompt, 8, prefill_step_size=3) == said
    for i in range(8):
        assert model(mx.array([prompt + said[:i]]))[0, -1].argmax().item() == said[i]
    wide = build("llama", hidden_size=128, head_dim=32)
    swap(wide, [0, 3])
    assert len(greedy(wide, prompt, 8, kv_bits=8, kv_group_size=32)) == 8


def test_a_cache_is_saved_copied_and_found_by_the_server(tmp_path):
    model = swapped("mistral", "even")
    prompt, more = tokens(9, 20).tolist(), tokens(10, 5).tolist()
    want = greedy(model, prompt + more, 8)
    cache = make_prompt_cache(model)
    model(mx.array([prompt]), cache=cache)
    path = str(tmp_path / "cache.safetensors")
    save_prompt_cache(path, cache)
    held = LRUPromptCache()
    held.insert_cache("model", prompt, cache)
    for _ in range(2):  # what the server hands out is a copy: the first use must not change the second
        found, rest = held.fetch_nearest_cache("model", prompt + more)
        assert rest == more
        assert greedy(model, rest, 8, found) == want
    assert greedy(model, more, 8, load_prompt_cache(path)) == want
    assert greedy(model, more, 8, copy.deepcopy(cache)) == want


# --- weights


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_kept(name):
    model = build(name)
    before = flat(model.parameters())
    swap(model, "odd")
    after = flat(model.parameters())
    assert all(mx.array_equal(after[path], a) for path, a in before.items())
    fresh = {path.split("self_attn.")[1] for path in set(after) - set(before)}
    norms = set() if name in ("qwen3", "gemma3") else {"q_norm.weight", "k_norm.weight"}
    assert fresh == {"conv.weight", "out_norm.weight", "decay_gate.weight", "decay_gate.bias", *norms}


def test_weights_are_saved_and_loaded(tmp_path):
    model = swapped("qwen2", "even", "ahla")
    for _, a in zip(range(3), model.layers, strict=False):
        a.self_attn.update({"o_proj": {"weight": a.self_attn.o_proj.weight * 1.5}})
    path = str(tmp_path / "model.safetensors")
    model.save_weights(path)
    again = build("qwen2", seed=1)
    swap(again, "even", "ahla")
    again.load_weights(path)
    assert mx.array_equal(again(tokens(11, 1, 8)), model(tokens(11, 1, 8)))
    with pytest.raises(ValueError, match="decay_gate"):
        build("qwen2").load_weights(path)


def test_quantised_projections_are_kept():
    model = build("llama", hidden_size=64, head_dim=16)
    nn.quantize(model, 32, 4)
    kept = model.layers[0].self_attn.q_proj
    swap(model, "even")
    attention = model.layers[0].self_attn
    assert attention.q_proj is kept
    assert isinstance(kept, nn.QuantizedLinear)
    x, cache = tokens(12, 1, 6), model.make_cache()
    parts = [model(x[:, :3], cache=cache), model(x[:, 3:], cache=cache)]
    assert_close("logits", mx.concatenate(parts, axis=1), model(x), 1e-4)
    freeze_rest(model)
    _, grads = nn.value_and_grad(model, loss_fn)(model, x)
    trained = {path.split(".")[-2] for path in flat(grads)}
    assert trained == {"conv", "q_norm", "k_norm", "out_norm", "decay_gate"}
    # And the other way round: the gate stays as it is.
    late = build("llama", hidden_size=64, head_dim=16)
    swap(late, "even")
    nn.quantize(late, 32, 4)
    assert isinstance(late.layers[0].self_attn.q_proj, nn.QuantizedLinear)
    for old, new in zip(model.layers[::2], late.layers[::2], strict=True):
        new.self_attn.out_norm = old.self_attn.out_norm  # it starts at the size of the values
    assert mx.array_equal(late(x), model(x))
    assert late.cast_predicate("layers.0.self_attn.q_proj.weight")
    assert not late.cast_predicate("layers.0.self_attn.decay_gate.weight")


def test_half_types():
    model = build("llama")
    model.set_dtype(mx.bfloat16)
    swap(model, "even")
    x, cache = tokens(13, 1, 6), model.make_cache()
    assert model(x).dtype == mx.bfloat16
    assert model(x, cache=cache).dtype == mx.bfloat16
    assert model(x[:, :1], cache=cache).dtype == mx.bfloat16


# --- training


def loss_fn(model, x):
    return nn.losses.cross_entropy(model(x[:, :-1]), x[:, 1:]).mean()


@pytest.mark.parametrize("projections", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_gradients_reach_the_new_layers_only(name, projections):
    model = swapped(name, "even")
    freeze_rest(model, projections=projections)
    before = flat(model.parameters())
    x = tokens(14, 2, 12)
    first, grads = nn.value_and_grad(model, loss_fn)(model, x)
    got = flat(grads)
    names = {path for path in before if any(f"layers.{i}.self_attn" in path for i in (0, 2))}
    if not projections:
        names = {path for path in names if path.split(".")[-2] not in PROJECTIONS}
    assert set(got) == names
    assert all(mx.any(a != 0).item() and mx.all(mx.isfinite(a)).item() for a in got.values())
    optimizer = optim.Adam(1e-2)
    for _ in range(5):
        loss, grads = nn.value_and_grad(model, loss_fn)(model, x)
        optimizer.update(model, grads)
    assert loss.item() < first.item()
    after = flat(model.parameters())
    assert {path for path in before if not mx.array_equal(before[path], after[path])} == names


@pytest.mark.parametrize("kind", ["full", "lora", "checkpoint"])
def test_mlx_lms_tuner_trains_it(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(llama.TransformerBlock, "__call__", llama.TransformerBlock.__call__)
    model = swapped("llama", "even")
    if kind == "lora":
        model.freeze()
        linear_to_lora_layers(model, 4, {"rank": 2, "scale": 4.0, "dropout": 0.0})
        assert hasattr(model.layers[0].self_attn.q_proj, "lora_a")
    else:
        freeze_rest(model)
    before = flat(model.trainable_parameters())
    data = [(tokens(i, 20).tolist(), 0) for i in range(8)]
    args = TrainingArgs(
        batch_size=2,
        iters=4,
        steps_per_report=2,
        max_seq_length=24,
        adapter_file=str(tmp_path / "a.safetensors"),
        grad_checkpoint=kind == "checkpoint",
    )
    train(model, optim.Adam(1e-2), data, None, args)
    after = flat(model.trainable_parameters())
    assert set(after) == set(before)
    assert any(not mx.array_equal(before[path], after[path]) for path in before)
    saved = mx.load(str(tmp_path / "a.safetensors"))
    assert set(saved) == set(before)
    assert mx.isfinite(model(tokens(15, 1, 5))).all().item()


def test_an_adapter_from_before_is_kept():
    model = build("llama")
    model.freeze()
    linear_to_lora_layers(model, 4, {"rank": 2, "scale": 4.0, "dropout": 0.0})
    swap(model, [1])
    assert hasattr(model.layers[1].self_attn.q_proj, "lora_a")
    assert model(tokens(16, 1, 5)).shape == (1, 5, V)
    freeze_rest(model, projections=False)
    trained = flat(model.trainable_parameters())
    assert all("layers.1.self_attn" in path for path in trained)
    assert {path.split("self_attn.")[1] for path in trained} >= {"q_proj.lora_a", "o_proj.lora_b"}
    assert not any(path.endswith("linear.weight") for path in trained)


# --- refusals


@pytest.mark.parametrize(
    ("layers", "match"),
    [
        ([4], "layers must be from -4 to 3, got 4"),
        ([-5], "from -4 to 3, got -5"),
        ([], "chooses none of 4 layers"),
        (5, "layers=5 chooses none"),
        (slice(4, None), "chooses none"),
        (slice("a", None), "a slice of integers"),
        ("middle", "layers must be indices, a slice"),
        (0, "at least 1, got 0"),
        (True, "got True"),
        ([1.0], "layers must be indices"),
        ([True], "layers must be indices"),
        (None, "got None"),
    ],
)
def test_wrong_layers(layers, match):
    model = build("llama")
    with pytest.raises(ValueError, match=match) as caught:
        swap(model, layers)
    assert str(caught.value).startswith("[swap] ")
    assert "\n" not in str(caught.value)
    assert type(model) is llama.Model


def refused(model, match, **options):
    kinds = [type(b.self_attn) for b in model.layers if "self_attn" in b]
    with pytest.raises(ValueError, match=match) as caught:
        swap(model, **{"layers": [0, 1], **options})
    assert "\n" not in str(caught.value)
    assert [type(b.self_attn) for b in model.layers if "self_attn" in b] == kinds


def test_what_cannot_be_read_is_said():
    fields = {"model_type": "x", **COMMON, "max_position_embeddings": 64}
    rope = {"rope_theta": 1e4, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 16}
    with_scale = ministral3.Model(ministral3.ModelArgs.from_dict({**fields, "rope_parameters": rope}))
    refused(with_scale, r"layer 0: its attention must be called with \(x, mask, cache\), not \(x, attn_scale")
    fused = phi3.Model(phi3.ModelArgs.from_dict({**fields, "rope_theta": 1e4}))
    refused(fused, r"layer 0: its attention has no q_proj; mlx_lm\.models\.phi3\.Attention is not served")
    wide = olmo2.Model(olmo2.ModelArgs.from_dict(fields))
    refused(wide, r"layer 0: its q_norm must be of one head, 8 wide, got \(32,\)")
    for change, match in (
        (lambda a: a.pop("v_proj"), "layer 1: its attention has no v_proj"),
        (lambda a: a.pop("rope"), "no `rope`"),
        (lambda a: setattr(a, "sinks", mx.zeros((4,))), "has sinks, which would be lost"),
        (lambda a: setattr(a, "k_proj", nn.Linear(32, 12)), r"k_proj must be \(16, 32\) for 4 and 2 heads"),
        (lambda a: setattr(a, "o_proj", nn.Identity()), "its o_proj must be a linear layer.*not a Identity"),
        (lambda a: setattr(a, "n_heads", None), "its number of heads must be one of n_heads"),
    ):
        model = build("llama")
        change(model.layers[1].self_attn)
        refused(model, match, rope=True)


def test_layers_with_more_than_keys_and_values_are_refused(monkeypatch):
    model = build("llama")
    for caches, match in (
        ([CacheList(ArraysCache(2), KVCache()) for _ in range(4)], "layer 0 has a CacheList, more than keys"),
        ([KVCache() for _ in range(8)], "has 8 caches for 4 layers"),
    ):
        monkeypatch.setattr(llama.Model, "make_cache", lambda self, caches=caches: caches)
        refused(model, match)


def test_wrong_words():
    for model, got in ((None, "NoneType"), (nn.Linear(2, 2), "Linear")):
        with pytest.raises(ValueError, match=f"model must be a model of mlx-lm's with `layers`, got {got}"):
            swap(model)
    model = build("llama")
    refused(model, r"\[HLAttention\] operator must be one of", operator="softmax")
    refused(model, r"\[HLAttention\] decay must be", decay="slow")
    refused(model, "rope must be True or False, got 5", rope=5)
    with pytest.raises(ValueError, match="has no swapped layer"):
        freeze_rest(model)
    old = make_prompt_cache(model)
    swap(model, [1])
    with pytest.raises(ValueError, match=r"must be an ArraysCache, .* got KVCache"):
        model(tokens(17, 1, 3), cache=old)
    refused(model, "layer 1 is swapped already")
