"""Configs and model folders: what is written comes back, and what is wrong is refused in one line."""

import errno
import json
import os
import shutil
import struct

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_hla.errors import InputError
from mlx_hla.models import LanguageModel, ModelConfig, load, save
from mlx_hla.models.io import load_tensors, read_header
from mlx_hla.tokenizer import train_tokenizer

TINY = {"vocab_size": 380, "dims": 16, "num_layers": 1, "num_heads": 2, "hidden_dims": 24, "context": 32}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    tokenizer = train_tokenizer(["def f(x):\n    return x\nimport os, sys\n" * 30], 380)
    folder = tmp_path_factory.mktemp("model")
    save(folder, LanguageModel(ModelConfig(operator="softmax", **TINY), seed=1), tokenizer)
    return folder


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good, tmp_path / "m")


def refuse(folder, match):
    with pytest.raises(InputError, match=match) as e:
        load(folder)
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 600


def test_round_trip(good):
    assert sorted(f.name for f in good.iterdir()) == ["config.json", "model.safetensors", "tokenizer.model"]
    model, tokenizer = load(good)
    fresh = LanguageModel(ModelConfig(operator="softmax", **TINY), seed=1)
    want = dict(tree_flatten(fresh.parameters()))
    for name, got in tree_flatten(model.parameters()):
        assert mx.array_equal(got, want[name].astype(mx.bfloat16).astype(mx.float32)), name
    assert tokenizer.vocab_size == 380


def test_dtypes(good):
    for dtype in (mx.float32, mx.bfloat16, mx.float16):
        model, _ = load(good, dtype)
        assert model.embedding.weight.dtype == dtype
        assert model(mx.array([[1, 2, 3]])).dtype == dtype
    assert {d for d, _ in read_header(good / "model.safetensors").values()} == {"BF16"}


def test_config_round_trip_and_hash():
    for fields in ({"operator": 4, "rope_theta": 500.0}, {"layers": ("window", "ahla", "ahla"), "window": 9}):
        config = ModelConfig(num_kv_heads=2, **fields)
        assert ModelConfig.from_dict(json.loads(config.to_json())) == config
        assert hash(config) == hash(ModelConfig(num_kv_heads=2, **fields))


def test_layers_are_cycled_over_depth():
    config = ModelConfig(num_layers=5, layers=("window", "ahla", "readout"))
    assert config.mixers == ("window", "ahla", "readout", "window", "ahla")
    assert config.mixer_name == "window+ahla+readout"
    assert config.constant_state
    assert ModelConfig(num_layers=2, operator=3).mixers == (3, 3)
    assert not ModelConfig(layers=("ahla", "softmax")).constant_state
    kinds = [type(layer.mixer).__name__ for layer in LanguageModel(config).layers]
    assert kinds == ["WindowAttention", "HLAttention", "HLAttention", "WindowAttention", "HLAttention"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"n_layers": 3}, "unknown keys 'n_layers'"),
        ({"dims": 10**9}, "dims must be from 1"),
        ({"vocab_size": 1 << 20, "dims": 1 << 15}, "parameters, more than"),
        ({"num_layers": 512, "hidden_dims": 1 << 18, "dims": 1 << 14}, "parameters, more than"),
        ({"num_layers": 0}, "num_layers must be from 1"),
        ({"num_layers": -1}, "num_layers must be from 1"),
        ({"num_layers": 2.5}, "num_layers must be int"),
        ({"num_layers": True}, "num_layers must be int"),
        ({"num_layers": None}, "num_layers must be int"),
        ({"num_heads": 3}, "no multiple of num_heads"),
        ({"num_heads": 4, "num_kv_heads": 3}, "does not divide"),
        ({"head_dim": 7, "rope_theta": 100.0}, "even head_dim"),
        ({"operator": "hla9"}, "operator must be"),
        ({"layers": "window"}, "layers must be tuple"),
        ({"layers": []}, "layers must name 1 to num_layers=1 mixers, got 0"),
        ({"layers": ["ahla"] * 3}, "layers must name 1 to num_layers=1 mixers, got 3"),
        ({"num_layers": 2, "layers": ["ahla", "hla9"]}, "layers must be of softmax, window, first"),
        ({"layers": ["ahla", 2]}, "layers must be tuple"),
        ({"window": 0}, "window must be from 1"),
        ({"layers": ["window"], "qk_norm": "l2"}, "softmax and window take qk_norm"),
        ({"operator": 1000}, "order must be"),
        ({"operator": ["hla2"]}, "operator must be str"),
        ({"decay": "none"}, "decay must be"),
        ({"qk_norm": "l3"}, "qk_norm must be"),
        ({"operator": "softmax", "qk_norm": "l2"}, "softmax and window take qk_norm"),
        ({"conv_size": 1}, "conv_size must be 0"),
        ({"norm_eps": 0}, "norm_eps"),
        ({"norm_eps": float("inf")}, "finite"),
        ({"rope_theta": -1.0}, "rope_theta"),
    ],
    ids=lambda c: json.dumps(c)[:40] if isinstance(c, dict) else "",
)
def test_absurd_configs_are_refused_before_allocation(change, match):
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    with pytest.raises(InputError, match=match):
        ModelConfig.from_dict({**TINY, **change})
    assert mx.get_peak_memory() <= before + 1024


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "not valid JSON"),
        ("[1, 2]", "must be a JSON object"),
        ('{"dims": NaN}', "not valid JSON"),
        ('{"dims": 16, "dims": 32}', "repeated"),
        ("[" * 100000, "not valid JSON"),
        ('{"dims": 1' + "0" * 5000 + "}", "not valid JSON|dims must be"),
        ('{"dims": 16' + " " * (1 << 20) + "}", "larger than"),
        ("\udcff", "not valid JSON"),
    ],
    ids=range(8),
)
def test_broken_config_files(folder, text, match):
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refuse(folder, match)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.model"])
def test_missing_files(folder, name):
    (folder / name).unlink()
    refuse(folder, f"{name}: cannot read")
    (folder / name).mkdir()
    refuse(folder, name)


def test_missing_and_wrong_paths(folder):
    refuse(folder / "none", "no such model folder")
    refuse(folder / "config.json", "is a file")


@pytest.mark.parametrize("keep", [0, 4, 8, 9, 200, -1, -1000])
def test_truncated_weights(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refuse(folder, "cut short")


def write(path, header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def entry(shape, first, last, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


@pytest.mark.parametrize(
    ("header", "data", "length", "match"),
    [
        ({}, b"", 2**63, "cut short"),
        ({}, b"", 2**24, "cut short"),
        (b"{{{{", b"", None, "not valid JSON"),
        (b"[]", b"", None, "no JSON object"),
        ({"a": 3}, b"", None, "not a tensor"),
        ({"a": entry([2], 0, 8)}, b"\0" * 4, None, "cut short"),
        ({"a": entry([2], 0, 8)}, b"\0" * 80, None, "header says 8"),
        ({"a": entry([3], 0, 8)}, b"\0" * 8, None, "contradicts"),
        ({"a": entry([-2], 0, 8)}, b"\0" * 8, None, "not a tensor"),
        ({"a": entry([2**40, 2**40], 0, 8)}, b"\0" * 8, None, "contradicts"),
        ({"a": entry([2], 8, 0)}, b"\0" * 8, None, "contradicts"),
        ({"a": entry([2], 0, 8, "I8")}, b"\0" * 8, None, "not a tensor"),
        ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"\0" * 12, None, "overlap"),
        ({"a": entry([2], 8, 16)}, b"\0" * 16, None, "gaps"),
        ({"a": entry([1] * 9, 0, 4)}, b"\0" * 4, None, "not a tensor"),
        ({"a": entry([2], 0, 8, ["F32"])}, b"\0" * 8, None, "not a tensor"),
        ({"a": entry([2], 0, 8, {})}, b"\0" * 8, None, "not a tensor"),
    ],
    ids=range(17),
)
def test_hostile_headers(tmp_path, header, data, length, match):
    path = tmp_path / "x.safetensors"
    write(path, header, data, length)
    with pytest.raises(InputError, match=match):
        load_tensors(path, {"a": mx.zeros((2,))})


def test_weights_of_another_model(folder):
    path = folder / "model.safetensors"
    weights = mx.load(str(path))
    mx.eval(weights)

    def replaced(**changes):
        mx.save_safetensors(str(path), {k: v for k, v in {**weights, **changes}.items() if v is not None})

    replaced(**{"norm.weight": None})
    refuse(folder, "1 tensors are missing, among them norm.weight")
    replaced(extra=mx.zeros((2,)))
    refuse(folder, "1 tensors are unknown, among them extra")
    replaced(**{"norm.weight": mx.zeros((17,))})
    refuse(folder, r"norm.weight has the shape \(17,\), expected \(16,\)")
    replaced(**{"norm.weight": mx.zeros((16,), mx.uint64)})
    refuse(folder, "norm.weight has the dtype U64")
    replaced(**{"norm.weight": mx.full((16,), float("nan"))})
    refuse(folder, "NaN")


def test_tokenizer_of_another_model(folder):
    train_tokenizer(["import os\nx = 1\nprint(x, os)\n" * 30], 372).save(folder / "tokenizer.model")
    refuse(folder, "has 372 tokens, the config says 380")


def test_a_failed_save_leaves_the_old_model(folder, monkeypatch):
    before = (folder / "model.safetensors").read_bytes()
    model, tokenizer = load(folder)

    def fail(file, *_):
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(mx, "save_safetensors", fail)
    with pytest.raises(InputError, match=r"model\.safetensors: cannot write it \(No space left on device\)"):
        save(folder, model, tokenizer)
    assert (folder / "model.safetensors").read_bytes() == before
    assert len(list(folder.iterdir())) == 3
