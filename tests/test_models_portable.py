"""A saved folder is one of mlx-lm's too; what mlx-lm adds is taken, what anyone else adds is refused."""

import json
import shutil

import mlx.core as mx
import pytest

from mlx_hla.errors import InputError
from mlx_hla.models import PRETRAINED, LanguageModel, ModelConfig, load, save
from mlx_hla.models.portable import FILES, SOURCE, entries, files
from mlx_hla.tokenizer import Tokenizer, train_tokenizer

TINY = {"vocab_size": 380, "dims": 16, "num_layers": 1, "num_heads": 2, "hidden_dims": 24, "context": 32}
TEXT = "def f(x):\n    return x\nimport os, sys\n" * 30
OURS = ["config.json", "model.safetensors", "tokenizer.model"]
MARK = "x = open({path!r}, 'w')\n"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT], 380)


@pytest.fixture(scope="module")
def good(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("model")
    save(folder, LanguageModel(ModelConfig(**TINY), seed=1), tokenizer)
    return folder


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good, tmp_path / "m")


def configured(folder, **changes):
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v != "absent"}))
    return folder


def refuse(folder, match):
    with pytest.raises(InputError, match=match) as e:
        load(folder)
    assert "\n" not in str(e.value)


def test_what_is_written(good, tokenizer):
    assert sorted(f.name for f in good.iterdir()) == sorted([*OURS, *FILES])
    config = json.loads((good / "config.json").read_text())
    assert {k: v for k, v in config.items() if k not in ModelConfig.__dataclass_fields__} == {
        "model_type": "hla",
        "model_file": "hla.py",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert load(good)[0].config == ModelConfig(**TINY)


def test_the_model_that_ships_has_what_save_writes():
    model, tokenizer = load(PRETRAINED)
    for name, data in files(model.config, tokenizer).items():
        assert (PRETRAINED / name).read_bytes() == data, f"write {name} again"
        assert len(data) < 130_000
    config = json.loads((PRETRAINED / "config.json").read_text())
    assert entries(model.config, tokenizer).items() <= config.items()


def test_the_softmax_baseline_stays_ours(folder, tokenizer):
    save(folder, LanguageModel(ModelConfig(**TINY, operator="softmax")), tokenizer)
    assert sorted(f.name for f in folder.iterdir()) == OURS  # nothing is left of the model before
    assert "model_type" not in (folder / "config.json").read_text()


def test_a_tokenizer_that_transformers_cannot_have(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_prefix=str(tmp_path / "t"),
        model_type="unigram",
        vocab_size=300,
        hard_vocab_limit=False,
        byte_fallback=True,
        minloglevel=2,
        num_threads=1,
    )
    foreign = Tokenizer.load(tmp_path / "t.model")
    config = ModelConfig(**{**TINY, "vocab_size": foreign.vocab_size})
    save(tmp_path / "m", LanguageModel(config), foreign)
    assert sorted(f.name for f in (tmp_path / "m").iterdir()) == sorted([*OURS, "hla.py"])
    assert load(tmp_path / "m")[1].proto == foreign.proto


def test_without_tokenizer_model(folder, tokenizer):
    (folder / "tokenizer.model").unlink()
    model, again = load(folder)
    for text in (TEXT, "x \u2581\0 é日本🎉\n        return", "<s>"):
        assert again.encode(text, bos=True) == tokenizer.encode(text, bos=True)
    save(folder, model, again)  # whole again
    assert (folder / "tokenizer.model").exists()
    assert (folder / "tokenizer.json").read_bytes() == files(model.config, tokenizer)["tokenizer.json"]


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b'{"a": NaN}', b"\xff"], ids=range(5))
def test_broken_tokenizer_files(folder, data):
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer.json").write_bytes(data)
    refuse(folder, r"tokenizer\.json: not ")
    (folder / "tokenizer.json").unlink()
    refuse(folder, r"tokenizer\.model: cannot read")
    (folder / "tokenizer.json").mkdir()
    refuse(folder, r"tokenizer\.json: cannot read it \(it is a folder")


def test_keys_that_may_be_missing(folder):
    for keys in (("model_file",), ("model_type", "bos_token_id"), ("eos_token_id",)):
        load(configured(folder, **dict.fromkeys(keys, "absent")))
    load(configured(folder, quantization=None, quantization_config=None, eos_token_id=[2]))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "llama"}, "model_type must be hla, got 'llama': not a model of mlx-hla"),
        ({"model_type": ["hla"]}, "model_type must be hla"),
        ({"model_file": "evil.py"}, r"model_file must be hla.py, got 'evil.py': not a model of mlx-hla"),
        ({"model_file": "../hla.py"}, "model_file must be hla.py"),
        ({"bos_token_id": 7}, "bos_token_id must be the tokenizer's 1, got 7"),
        ({"eos_token_id": [2, 3]}, "eos_token_id must be the tokenizer's 2"),
        ({"quantization_config": {"group_size": 64, "bits": 4}}, "quantization_config is not what"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "unknown keys 'auto_map'"),
        ({"architectures": ["x"]}, "unknown keys 'architectures'"),
    ],
    ids=str,
)
def test_other_keys_are_refused(folder, changes, match):
    refuse(configured(folder, **changes), match)


def test_nothing_in_a_folder_runs(folder, tmp_path):
    """Neither the file of ours nor another that a config names."""
    mark = tmp_path / "ran"
    for name in ("hla.py", "evil.py"):
        (folder / name).write_text(MARK.format(path=str(mark)))
    refuse(folder, r"hla\.py: not the file that mlx-hla writes, and mlx-lm would run it: remove it first")
    (folder / "hla.py").write_bytes(SOURCE)
    assert load(folder)
    refuse(configured(folder, model_file="evil.py"), "model_file must be")
    (folder / "hla.py").unlink()
    load(configured(folder, model_file="hla.py"))  # we have no need of it
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoTokenizer": "evil.x"}}))
    refuse(folder, r"tokenizer_config\.json: names code to run \(auto_map\)")
    assert not mark.exists()


def test_weights_in_several_files_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    refuse(folder, r"model\.safetensors: missing; weights in several files are not read")


def test_a_killed_save_is_swept(tmp_path):
    from mlx_hla.train.folder import held

    for name in (*OURS, *FILES):
        (tmp_path / f".0123abcd.{name}").write_bytes(b"half")
    (tmp_path / ".0123abcd.notes").write_bytes(b"not ours")
    with held(tmp_path):
        pass
    assert [f.name for f in tmp_path.iterdir()] == [".0123abcd.notes"]


def test_every_file_is_written_whole(folder, tokenizer, monkeypatch):
    """A full disk at any of the files leaves that one as it was."""
    from mlx_hla.models import io

    model = load(folder)[0]
    before = {f.name: f.read_bytes() for f in folder.iterdir()}

    def fail(file, **_):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(io, "_write", fail)
    with pytest.raises(InputError, match="No space left on device"):
        save(folder, model, tokenizer, mx.float32)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before
