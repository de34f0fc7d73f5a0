"""Adapters on disk: read with distrust, by us and by mlx-lm; and fused."""

import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_hla import cli
from mlx_hla.errors import InputError
from mlx_hla.generate import generate
from mlx_hla.models import PRETRAINED, LanguageModel, ModelConfig, load, save
from mlx_hla.models.io import read_header
from mlx_hla.models.quantization import entry_of
from mlx_hla.sampling import Sampling
from mlx_hla.tokenizer import train_tokenizer
from mlx_hla.trees import flat
from mlx_hla.tune import FinetuneConfig, finetune, fuse, load_adapted

pytest.importorskip("mlx_lm")
from mlx_lm import utils

SMALL = {"vocab_size": 380, "dims": 64, "num_layers": 2, "num_heads": 2, "hidden_dims": 128, "context": 32}
TEXT = "def f(x):\n    return x\nimport os, sys\n"
GREEDY = Sampling(temperature=0)
KINDS = {"lora": {}, "dora": {"type": "dora"}, "full": {"type": "full"}, "bits": {"bits": 4}}
ARRAYS, CONFIG = "adapters.safetensors", "adapter_config.json"
STOCK = utils.load_model


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """A command registers, and leaves nothing behind for the next test."""
    import sys

    monkeypatch.setattr(utils, "load_model", STOCK)
    monkeypatch.delitem(sys.modules, "mlx_lm.models.hla", raising=False)


def saved(folder, seed=5, bits=None, **changes):
    model = LanguageModel(ModelConfig(**{**SMALL, **changes}), seed=seed)
    if bits is not None:
        nn.quantize(model, 64, bits)
    save(folder, model, train_tokenizer([TEXT * 30], 380), mx.float32)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("base"))


def trained(base, folder, **how):
    text = folder.parent / f"{folder.name}.py"
    text.write_text("".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(80)))
    settings = {"steps": 4, "batch_size": 2, "warmup": 1, "lr": 1e-2, "sample_tokens": 0, **how}
    finetune(FinetuneConfig(model=str(base), data=str(text), out=str(folder), **settings))
    return folder


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """An adapter of each kind."""
    folder = tmp_path_factory.mktemp("adapters")
    return {name: trained(base, folder / name, **how) for name, how in KINDS.items()}


def logits(model):
    return model(mx.arange(3, 23)[None])


def text(model, tokenizer):
    return generate(model, tokenizer, "def f1(x):", max_tokens=30, sampling=GREEDY)


# --- ours, theirs, fused


@pytest.mark.parametrize("kind", KINDS)
def test_mlx_lm_reads_an_adapter(base, adapters, kind):
    from mlx_hla.mlx_lm import register

    register()
    ours, _ = load_adapted(adapters[kind])
    source = base
    if kind == "bits":  # mlx-lm has no base that is quantised in memory: one that was quantised before
        source = adapters[kind].parent / "quantised"
        cli.main(["lm", "convert", "--model", str(base), "--mlx-path", str(source), "-q", "--q-bits", "4"])
    theirs, _ = utils.load(str(source), adapter_path=str(adapters[kind]))
    assert mx.allclose(logits(ours), logits(theirs), atol=1e-5).item()


@pytest.mark.parametrize("kind", KINDS)
def test_a_fused_model_writes_the_same_text(base, adapters, tmp_path, kind):
    from mlx_hla.mlx_lm import register

    register()
    ours, tokenizer = load_adapted(adapters[kind])
    out = fuse(adapters[kind], tmp_path / "fused")
    fused, _ = load(out)
    assert entry_of(fused) is None
    assert flat(fused.parameters()).keys() == flat(load(base)[0].parameters()).keys()
    assert mx.allclose(logits(ours), logits(fused), atol=1e-4).item()
    assert text(fused, tokenizer) == text(ours, tokenizer)
    assert text(fused, tokenizer) != text(load(base)[0], tokenizer)
    theirs, _ = utils.load(str(out))
    assert mx.allclose(logits(theirs), logits(fused), atol=1e-5).item()
    with pytest.raises(InputError, match="holds a model already"):
        fuse(adapters[kind], out)


def test_a_fused_model_has_the_form_of_its_base(tmp_path):
    base = saved(tmp_path / "base", bits=4)
    fused, _ = load(fuse(trained(base, tmp_path / "a", type="dora"), tmp_path / "fused"))
    assert entry_of(fused) == entry_of(load(base)[0])
    half = saved(tmp_path / "half")
    save(half, *load(half, mx.float32))
    out = fuse(trained(half, tmp_path / "b"), tmp_path / "fused2")
    assert {dtype for dtype, _ in read_header(out / "model.safetensors").values()} == {"BF16"}


def test_the_commands_read_an_adapter(base, adapters, tmp_path, capsys):
    words = ["--prompt", "def f1(x):", "--max-tokens", "20", "--temperature", "0", "--quiet"]
    said = []
    for kind in KINDS:
        assert cli.main(["generate", "--adapter", str(adapters[kind]), *words]) == 0
        said.append(capsys.readouterr().out)
    assert cli.main(["generate", "--model", str(base), *words]) == 0
    assert capsys.readouterr().out not in said
    assert cli.main(["fuse", "--adapter", str(adapters["lora"]), "--out", str(tmp_path / "fused")]) == 0
    assert cli.main(["generate", "--model", str(tmp_path / "fused"), *words]) == 0
    assert capsys.readouterr().out.endswith(said[0])
    assert cli.main(["info", "--adapter", str(adapters["bits"]), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["adapter"]["bits"] == 4
    assert told["model"] == str(base)
    assert cli.main(["info", "--adapter", str(adapters["full"])]) == 0
    assert '"type": "full"' in capsys.readouterr().out
    command = ["lm", "generate", "--model", str(base), "--adapter-path", str(adapters["lora"]), "--temp", "0"]
    assert cli.main([*command, "--prompt", "def f1(x):", "--max-tokens", "20", "--ignore-chat-template"]) == 0
    assert said[0].removeprefix("def f1(x):").strip() in capsys.readouterr().out


def test_an_adapter_of_mlx_lm_is_read(base, adapters, tmp_path):
    """Without our entry: judged by names and shapes."""
    shutil.copytree(adapters["lora"], tmp_path / "a")
    path = tmp_path / "a" / CONFIG
    values = json.loads(path.read_text())
    del values["mlx_hla"], values["lora_parameters"]["keys"]
    path.write_text(json.dumps({**values, "optimizer": "adam", "iters": 5}))
    one, other = (load_adapted(f, base)[0] for f in (tmp_path / "a", adapters["lora"]))
    assert mx.array_equal(logits(one), logits(other)).item()


def test_what_the_stock_tuner_wrote_is_read(base, tmp_path, capsys):
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text(
            json.dumps({"text": TEXT * 2}) + "\n" + json.dumps({"text": TEXT})
        )
    words = ["lm", "lora", "--model", base, "--data", tmp_path, "--adapter-path", tmp_path / "a", "--train"]
    words += ["--iters", 3, "--batch-size", 1, "--num-layers", -1, "--max-seq-length", 32, "--val-batches", 1]
    assert cli.main(list(map(str, words))) == 0
    ours, tokenizer = load_adapted(tmp_path / "a")  # its config says where the base is
    theirs, _ = utils.load(str(base), adapter_path=str(tmp_path / "a"))
    assert mx.allclose(logits(ours), logits(theirs), atol=1e-5).item()
    fused, _ = load(fuse(tmp_path / "a", tmp_path / "fused"))
    assert text(fused, tokenizer) == text(ours, tokenizer)


# --- refusals


def test_an_adapter_for_another_model_is_refused(adapters, tmp_path, capsys):
    for name, changes in (
        ("seed", {"seed": 6}),
        ("shape", {"hidden_dims": 192}),
        ("layers", {"num_layers": 1}),
    ):
        other = saved(tmp_path / name, **changes)
        for adapter in adapters.values():
            with pytest.raises(InputError, match="an adapter for other weights"):
                load_adapted(adapter, other)
    with pytest.raises(InputError, match="an adapter for other weights"):
        load_adapted(adapters["lora"], PRETRAINED)
    # Without a digest, by its shapes and names.
    shutil.copytree(adapters["lora"], tmp_path / "a")
    path = tmp_path / "a" / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "mlx_hla": None}))
    for name in ("shape", "layers"):
        with pytest.raises(InputError, match="no adapter of this model"):
            load_adapted(tmp_path / "a", tmp_path / name)
    assert cli.main(["generate", "--adapter", str(tmp_path / "none"), "--prompt", "x"]) == 1
    assert "no such folder" in capsys.readouterr().err


def nan(folder):
    arrays = mx.load(str(folder / ARRAYS))
    name = next(iter(arrays))
    mx.save_safetensors(str(folder / ARRAYS), {**arrays, name: arrays[name] * mx.nan})


def renamed(folder):
    arrays = mx.load(str(folder / ARRAYS))
    mx.save_safetensors(str(folder / ARRAYS), {f"x.{name}": a for name, a in arrays.items()})


def fewer(folder):
    arrays = mx.load(str(folder / ARRAYS))
    del arrays[next(iter(arrays))]
    mx.save_safetensors(str(folder / ARRAYS), arrays)


def cut(folder):
    (folder / ARRAYS).write_bytes((folder / ARRAYS).read_bytes()[:-9])


def pickled(folder):
    (folder / ARRAYS).write_bytes(b"\x80\x04cos\nsystem\n(S'echo no'\ntR.")


@pytest.mark.parametrize(
    ("harm", "match"),
    [
        (nan, "NaN"),
        (renamed, "no adapter of this model"),
        (fewer, "missing"),
        (cut, "cut short"),
        (pickled, "not a safetensors file"),
        (lambda f: (f / ARRAYS).unlink(), "cannot read it"),
        (lambda f: (f / CONFIG).unlink(), "cannot read it"),
        (lambda f: (f / CONFIG).write_text("{"), "not valid JSON"),
        (lambda f: (f / CONFIG).write_text("[]"), "must be a JSON object"),
    ],
)
def test_harmed_adapters_are_refused_in_one_line(adapters, tmp_path, harm, match):
    shutil.copytree(adapters["lora"], tmp_path / "a")
    harm(tmp_path / "a")
    with pytest.raises(InputError, match=match) as e:
        load_adapted(tmp_path / "a")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fine_tune_type", "lokr"),
        ("fine_tune_type", ["lora"]),
        ("model", 3),
        ("num_layers", 3),
        ("num_layers", "all"),
        ("lora_parameters", None),
        ("lora_parameters", {"rank": 10**6, "scale": 1.0}),
        ("lora_parameters", {"rank": 8, "scale": "1"}),
        ("lora_parameters", {"rank": 8, "scale": 1.0, "keys": [3]}),
        ("lora_parameters", {"rank": 8, "scale": 1.0, "keys": ["mixer_norm"]}),
        ("mlx_hla", {"version": 2, "base": "0", "bits": None}),
        ("mlx_hla", {"version": 1, "base": "0", "bits": True}),
        ("mlx_hla", {"version": 1, "base": "0"}),
        ("mlx_hla", "yes"),
    ],
)
def test_odd_configs_are_refused_in_one_line(base, adapters, tmp_path, key, value):
    shutil.copytree(adapters["lora"], tmp_path / "a")
    path = tmp_path / "a" / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(InputError, match=str(tmp_path)) as e:
        load_adapted(tmp_path / "a", base)
    assert "\n" not in str(e.value)
