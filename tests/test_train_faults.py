"""What goes wrong in a run: it stops in one line, and what was saved stays good."""

import json
import shutil

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_hla import cli
from mlx_hla.errors import InputError
from mlx_hla.losses import finite
from mlx_hla.models import LanguageModel, ModelConfig, load, save
from mlx_hla.tokenizer import train_tokenizer
from mlx_hla.train import loop, preset, resume, train
from mlx_hla.train.checkpoint import find_checkpoints
from mlx_hla.train.step import Trainer

MODEL = {"vocab_size": 380, "dims": 16, "num_layers": 1, "num_heads": 2, "hidden_dims": 24, "context": 16}
SETTINGS = {
    "steps": 9,
    "batch_size": 2,
    "warmup": 2,
    "valid_every": 4,
    "save_every": 2,
    "valid_fraction": 0.2,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(30):
        (folder / f"f{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n\n\nprint(f{i}(2))\n" * 8)
    return folder


def configs(corpus, out, **settings):
    return preset("tiny", MODEL, {**SETTINGS, "data": str(corpus), "out": str(out), **settings})


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(*configs(corpus, out))
    return out


def rows(out):
    def refuse(text):
        raise AssertionError(f"{text} is not JSON")

    lines = (out / "log.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def all_finite(folder):
    return all(finite(mx.load(str(path))) for path in folder.glob("*.safetensors"))


# --- divergence


def poisoned(at, what):
    """A step after which, at step `at`, "loss", "norm" or the weights alone are not finite."""
    step = Trainer.step

    def run(self, number, batches, *rest):
        loss, norm = step(self, number, batches, *rest)
        if number + 1 == at and what == "weights":
            self.params["norm"]["weight"] = mx.full((16,), mx.inf)
        bad = mx.array(mx.nan)
        return (bad if what == "loss" and number + 1 == at else loss), (
            bad if what == "norm" and number + 1 == at else norm
        )

    return run


@pytest.mark.parametrize(("what", "name"), [("loss", "loss"), ("norm", "gradient norm")])
@pytest.mark.parametrize("at", [1, 5, 6, 9])
def test_a_run_that_diverges_stops_there(corpus, tmp_path, monkeypatch, what, name, at):
    out = tmp_path / "run"
    monkeypatch.setattr(Trainer, "step", poisoned(at, what))
    with pytest.raises(InputError, match=f"at step {at} the {name} is nan, at a learning rate of") as e:
        train(*configs(corpus, out))
    last = (at - 1) // 2 * 2
    assert [int(p.name[-8:]) for p in find_checkpoints(out)] == [last] * bool(last)
    assert (f"checkpoint-{last:08d}" if last else "no checkpoint yet") in str(e.value)
    assert not (out / "model.safetensors").exists()
    assert [r["step"] for r in rows(out) if r["event"] == "step"] == list(range(1, at))
    assert rows(out)[-1]["event"] == "diverged"
    assert all(all_finite(folder) for folder in find_checkpoints(out))


def test_weights_that_are_not_finite_are_never_saved(corpus, tmp_path, monkeypatch):
    out = tmp_path / "run"
    monkeypatch.setattr(Trainer, "step", poisoned(4, "weights"))
    with pytest.raises(InputError, match=r"step 4: .* not saved; the last good checkpoint is .*00000002"):
        train(*configs(corpus, out, valid_every=100))
    assert [p.name for p in find_checkpoints(out)] == ["checkpoint-00000002"]
    assert not list(out.glob(".*"))


def test_a_validation_that_is_not_finite_stops_the_run(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.Scorer, "__call__", lambda self, params: float("inf"))
    with pytest.raises(InputError, match="at step 4 the validation loss is inf"):
        train(*configs(corpus, tmp_path / "run"))
    rows(tmp_path / "run")


def test_a_rate_beyond_reason_ends_in_one_line(corpus, tmp_path, capsys):
    out = tmp_path / "run"
    argv = ["--preset", "tiny", "--vocab-size", "380", "--data", str(corpus), "--out", str(out)]
    assert cli.main(["train", *argv, "--lr", "1e30", "--save-every", "1"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("mlx-hla: error: the run diverged: at step ")
    assert err.count("\n") == 1
    assert all(all_finite(folder) for folder in find_checkpoints(out))
    rows(out)


def test_resume_refuses_weights_that_are_not_finite(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for name in ("weights.safetensors", "optimizer.safetensors"):
        path = find_checkpoints(out)[0] / name
        content = path.read_bytes()
        tensors = mx.load(str(path))
        mx.eval(tensors)
        broken = next(n for n, a in tensors.items() if a.shape == (16,))
        tensors[broken] = mx.where(mx.arange(16) == 3, mx.nan, tensors[broken])
        mx.save_safetensors(str(path), tensors)
        with pytest.raises(InputError, match=f"{name}: holds NaN"):
            resume(out)
        path.write_bytes(content)


def test_resume_refuses_a_tokenizer_with_more_tokens_than_the_model(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    train_tokenizer(["def f(x):\n    return x + 1\nimport os\n" * 30], 390).save(
        find_checkpoints(out)[0] / "tokenizer.model"
    )
    with pytest.raises(InputError, match=r"tokenizer\.model: has 390 tokens, the config says 380"):
        resume(out)


def test_a_model_that_is_not_finite_is_not_saved(whole, tmp_path):
    model, tokenizer = load(whole)
    model.norm.weight = mx.full((16,), 1e6)
    save(tmp_path / "fine", model, tokenizer)
    with pytest.raises(InputError, match=r"NaN or infinity as mlx\.core.float16: not saved"):
        save(tmp_path / "half", model, tokenizer, mx.float16)
    assert not (tmp_path / "half").exists()
    assert finite(dict(tree_flatten(LanguageModel(ModelConfig(**MODEL)).parameters())))
