"""Quantised models are saved packed, as they are, and come back the same."""

import json

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_hla import cli
from mlx_hla.errors import InputError
from mlx_hla.generate import generate_step
from mlx_hla.models import PRETRAINED, LanguageModel, ModelConfig, load, save
from mlx_hla.models.io import read_header
from mlx_hla.models.quantization import entry_of
from mlx_hla.sampling import Sampling
from mlx_hla.tokenizer import train_tokenizer
from mlx_hla.train import PRESETS
from mlx_hla.trees import flat

CONFIG = {"vocab_size": 380, "dims": 128, "num_layers": 2, "num_heads": 2, "hidden_dims": 192, "context": 32}
TOKENS = mx.array([[1, 5, 9, 3, 200]])
MODES = {
    "affine-64-4": {"group_size": 64, "bits": 4, "mode": "affine"},
    "affine-32-3": {"group_size": 32, "bits": 3, "mode": "affine"},
    "affine-64-8": {"group_size": 64, "bits": 8, "mode": "affine"},
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["def f(x):\n    return x\nimport os, sys\n" * 30], 380)


def build(operator="hla2", dtype=mx.float32):
    model = LanguageModel(ModelConfig(**CONFIG, operator=operator), seed=1)
    model.set_dtype(dtype)
    return model


@pytest.mark.parametrize("operator", ["hla2", "softmax"])
@pytest.mark.parametrize("mode", MODES)
def test_round_trip(tmp_path, tokenizer, operator, mode):
    model = build(operator)
    full = model.num_parameters
    nn.quantize(model, **MODES[mode])
    assert model.num_parameters == full
    want = model(TOKENS)
    save(tmp_path, model, tokenizer, mx.float32)
    assert json.loads((tmp_path / "config.json").read_text())["quantization"] == MODES[mode]
    again, _ = load(tmp_path, mx.float32)
    before, after = flat(model.parameters()), flat(again.parameters())
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[n], after[n]) and before[n].dtype == after[n].dtype for n in before)
    assert mx.array_equal(again(TOKENS), want)
    steps = generate_step(again, [1, 5], sampling=Sampling(temperature=0), max_tokens=4)
    assert len([t for t, _ in steps]) == 4
    save(tmp_path / "twice", again, tokenizer, mx.float32)
    weights = "model.safetensors"
    assert (tmp_path / "twice" / weights).read_bytes() == (tmp_path / weights).read_bytes()


def test_packed_weights_are_saved_as_they_are_and_the_rest_in_the_dtype(tmp_path, tokenizer):
    model = build()
    nn.quantize(model, 64, 4)
    save(tmp_path, model, tokenizer)
    header = read_header(tmp_path / "model.safetensors")
    assert header["layers.0.mlp.up_proj.weight"] == ("U32", (192, 16))
    assert header["layers.0.mlp.up_proj.scales"] == ("F32", (192, 2))
    assert header["layers.0.mixer.decay_gate.weight"][0] == "BF16"
    assert (tmp_path / "model.safetensors").stat().st_size < build().num_parameters
    half, _ = load(tmp_path, mx.bfloat16)
    assert half(TOKENS).dtype == mx.bfloat16
    assert half.embedding.weight.dtype == mx.uint32


def test_some_modules_quantised_and_some_otherwise(tmp_path, tokenizer):
    model = build()

    def choose(path, module):
        if not hasattr(module, "to_quantized") or path.endswith("out_proj"):
            return False
        return {"group_size": 32, "bits": 8} if path.endswith("down_proj") else True

    nn.quantize(model, 64, 4, class_predicate=choose)
    save(tmp_path, model, tokenizer, mx.float32)
    entry = json.loads((tmp_path / "config.json").read_text())["quantization"]
    assert entry == {
        **MODES["affine-64-4"],
        **{f"layers.{i}.mlp.down_proj": {"group_size": 32, "bits": 8, "mode": "affine"} for i in range(2)},
    }
    again, _ = load(tmp_path, mx.float32)
    assert mx.array_equal(again(TOKENS), model(TOKENS))
    assert entry_of(again) == entry


BAD = [
    (None, "tensors are unknown"),
    (3, "must be an object"),
    ([], "must be an object"),
    ({}, "needs group_size and bits"),
    ({"group_size": 64}, "needs group_size and bits"),
    ({"group_size": "64", "bits": 4}, "group_size must be a number"),
    ({"group_size": 64, "bits": True}, "bits must be a number"),
    ({"group_size": 64, "bits": 4, "mode": "int4"}, "mode must be"),
    ({"group_size": 64, "bits": 4, "mode": []}, "mode must be"),
    ({"group_size": 100, "bits": 4}, "quantization cannot be"),
    ({"group_size": 64, "bits": 7}, "quantization cannot be"),
    ({"group_size": 32, "bits": 4}, "has the shape"),
    ({"group_size": 64, "bits": 8}, "has the shape"),
    ({"group_size": 32, "bits": 4, "mode": "mxfp4"}, "tensors are unknown"),
    ({"group_size": 64, "bits": 4, "layers.9.mlp.up_proj": {"group_size": 64, "bits": 4}}, "has not"),
    ({"group_size": 64, "bits": 4, "embedding": {"bits": 4}}, "needs group_size and bits"),
    ({"group_size": 64, "bits": 4, "embedding": 3}, "needs group_size and bits"),
    ({"group_size": 64, "bits": 4, "embedding": False}, "tensors are unknown"),
]


@pytest.mark.parametrize(("entry", "match"), BAD, ids=range(len(BAD)))
def test_entries_that_do_not_fit_are_refused(tmp_path, tokenizer, entry, match):
    model = build()
    nn.quantize(model, 64, 4)
    save(tmp_path, model, tokenizer)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization"] = entry
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=match) as e:
        load(tmp_path)
    assert "\n" not in str(e.value)


def test_packed_weights_of_another_dtype_are_refused(tmp_path, tokenizer):
    model = build()
    nn.quantize(model, 64, 4)
    save(tmp_path, model, tokenizer)
    path = str(tmp_path / "model.safetensors")
    weights = mx.load(path)
    mx.eval(weights)
    name = "embedding.weight"
    mx.save_safetensors(path, {**weights, name: weights[name].astype(mx.float32)})
    with pytest.raises(InputError, match=r"embedding.weight has the dtype F32, expected one of U32"):
        load(tmp_path)


def test_info_tells_what_is_quantised(tmp_path, tokenizer, capsys):
    model = build()
    full = model.num_parameters
    nn.quantize(model, 64, 4)
    save(tmp_path, model, tokenizer)
    assert cli.main(["info", "--model", str(tmp_path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["quantization"] == MODES["affine-64-4"]
    assert result["parameters"] == full == sum(result["parameters_by_part"].values())
    assert cli.main(["info", "--model", str(tmp_path)]) == 0
    assert "quantization" in capsys.readouterr().out


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_quantised(name):
    config = PRESETS[name].model
    assert config.dims % 64 == config.hidden_dims % 64 == 0
    model = LanguageModel(config)
    nn.quantize(model, 64, 4)
    assert len(entry_of(model)) == 3


def test_the_model_that_ships_has_the_sizes_of_the_preset():
    assert load(PRETRAINED)[0].config == PRESETS["small"].model
