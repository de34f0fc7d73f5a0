"""Fine-tuning: what is learned, what counts, what is refused."""

import dataclasses
import json
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from finetune_runs import QUICK, TEXT, events, losses, make_base, make_texts, settings

from mlx_hla import cli
from mlx_hla.errors import InputError
from mlx_hla.losses import weighted_sum
from mlx_hla.models import load, save
from mlx_hla.train.step import Trainer
from mlx_hla.train.team import ALONE
from mlx_hla.trees import flat
from mlx_hla.tune import FinetuneConfig, finetune, load_adapted, resume
from mlx_hla.tune.examples import Windows, encode, pieces, read_material, train_batches, valid_batches
from mlx_hla.tune.tuner import Validation

pytest.importorskip("mlx_lm")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return make_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [{"prompt": f"def f{i}(x):\n", "completion": f"    return x + {i}\n"} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def logits(model):
    return model(mx.arange(3, 23)[None])


@pytest.fixture(scope="module")
def whole(base, texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    return finetune(settings(base, texts, out))


# --- what is learned


def test_a_run_lowers_the_loss_and_tells_of_it(whole, base):
    assert whole.finished
    assert whole.step == whole.best_step == 6
    assert whole.best < whole.before
    assert [row["step"] for row in events(whole.out, "valid")] == [0, 2, 4, 6]
    assert events(whole.out, "valid")[0]["nats_per_byte"] == whole.before
    samples = events(whole.out, "sample")
    assert [s["when"] for s in samples] == ["before", "after"]
    assert samples[0]["prompt"] == samples[1]["prompt"]
    names = {p.name for p in whole.out.iterdir()}
    assert names == {"adapters.safetensors", "adapter_config.json", "log.jsonl", "checkpoint-00000006"}
    adapted, _ = load_adapted(whole.out)
    assert mx.abs(logits(adapted) - logits(load(base)[0])).max().item() > 1e-3


@pytest.mark.parametrize(
    "how",
    [
        {"type": "dora"},
        {"type": "full", "lr": 1e-3},
        {"bits": 4},
        {"bits": 8, "type": "dora"},
        {"layers": 1, "rank": 2, "scale": 4.0},
        {"type": "full", "layers": 1},
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "type": "full", "lr": 1e-3},
        {"dropout": 0.1, "checkpoint_blocks": True, "accumulate": 2},
        {"pack": False},
    ],
    ids=str,
)
def test_every_kind_learns_and_loads(base, texts, tmp_path, how):
    done = finetune(settings(base, texts, tmp_path / "a", steps=2, **how))
    assert done.best < done.before
    model, _ = load_adapted(tmp_path / "a")
    found = flat(mx.load(str(tmp_path / "a" / "adapters.safetensors")))
    layers = {name.split(".")[1] for name in found}
    assert layers == ({"1"} if how.get("layers") == 1 else {"0", "1"})
    assert mx.isfinite(logits(model)).all().item()
    # The adapter is the weights that were validated.
    config = settings(base, texts, tmp_path, **how)
    tokenizer = load(base)[1]
    held = valid_batches(read_material(config), tokenizer, config, 32)
    sizes = np.array([len(tokenizer.token_bytes(i)) for i in range(380)], np.float32)
    again = Validation(model, held, sizes, mx.float32)(model.parameters())
    assert again == pytest.approx(done.best, rel=1e-2 if "dtype" in how else 1e-4)


def test_accumulation_is_a_larger_batch(base, texts, tmp_path):
    """Two batches of two, of the same windows as one of four."""
    model, tokenizer = load(base)
    config = settings(base, texts, "x", type="full")
    windows = train_batches(read_material(config), tokenizer, config, 16)
    batches = [windows[0], windows[1]]
    one = tuple(mx.concatenate([a[i] for a in batches]) for i in (0, 1))
    results = []
    for accumulate, given in ((1, [one]), (2, batches)):
        trainer = Trainer(model, dataclasses.replace(config, accumulate=accumulate))
        results.append([a.item() for a in trainer.step(0, given)])  # the loss and the gradient's norm
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_checkpointed_blocks_change_nothing(base, texts, tmp_path):
    runs = [
        finetune(settings(base, texts, tmp_path / str(flag), steps=2, checkpoint_blocks=flag))
        for flag in (False, True)
    ]
    one, other = (dict(losses(run.out)) for run in runs)
    assert one == pytest.approx(other, rel=1e-5)


# --- what counts


def test_the_loss_ignores_prompts(base):
    model, tokenizer = load(base)
    one = encode(tokenizer, (("def f(x):\n", False), ("return x", True)))
    assert not one.counts[: len(tokenizer.encode("def f(x):\n")) + 1].any()
    assert one.counts[-len(tokenizer.encode("return x")) - 1 :].all()  # and the end of the text
    n = len(one.tokens) - 1
    tokens, counts = mx.array(one.tokens[None]), mx.array(one.counts[None, 1:])
    weights = ALONE.part((tokens, counts))[1]
    assert weighted_sum(mx.ones((1, n)) * 7, weights).item() == pytest.approx(7)
    values = mx.where(counts, 1.0, mx.nan)  # what does not count may be anything
    assert weighted_sum(values, weights).item() == pytest.approx(1)
    # A gradient by the logits is zero wherever a prompt's token is predicted.

    def loss(z):
        picked = mx.take_along_axis(z, tokens[:, 1:, None], -1)[..., 0]
        return weighted_sum(mx.logsumexp(z, -1) - picked, weights)

    grad = mx.abs(mx.grad(loss)(model(tokens[:, :-1]))).sum(-1)
    assert ((grad > 0) == counts).all().item()


def test_examples_are_split_and_masked(base, pairs, tmp_path):
    config = settings(base, pairs, tmp_path / "a")
    material = read_material(config)
    assert material.examples
    assert len(material.train) + len(material.valid) == 20
    assert not set(material.train) & set(material.valid)
    tokens, counts = Windows([encode(load(base)[1], s) for s in material.train], 2, 32, 0)[0]
    assert tokens.shape == (2, 33)
    assert 0 < counts.sum().item() < counts.size
    done = finetune(config)
    assert done.best < done.before
    assert events(done.out, "sample")[0]["prompt"].startswith("def f")


def test_messages_count_what_the_assistant_says(base, tmp_path):
    def row(i):
        say = [("system", "Be brief."), ("user", f"Say {i}"), ("assistant", f"It is {i}.")]
        return {"messages": [{"role": r, "content": c} for r, c in say * 2]}

    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row(i)) + "\n" for i in range(8)))
    (tmp_path / "valid.jsonl").write_text(json.dumps(row(99)) + "\n")
    material = read_material(settings(base, tmp_path, "x"))
    assert len(material.train) == 8
    (only,) = material.valid
    assert [text for text, counts in only if counts] == ["It is 99.\n"] * 2
    assert only[0][0] == "system:\nBe brief.\nuser:\nSay 99\nassistant:\n"


def test_examples_beside_code_are_text(base, pairs, texts, tmp_path):
    (tmp_path / "f.py").write_text(TEXT * 20)
    (tmp_path / "pairs.jsonl").write_text(pairs.read_text())
    assert not read_material(settings(base, tmp_path, "x")).examples
    (tmp_path / "f.py").unlink()
    assert read_material(settings(base, tmp_path, "x")).examples
    (tmp_path / "a.jsonl").write_text("{")
    with pytest.raises(InputError, match="empty or too small"):
        read_material(settings(base, tmp_path, "x"))


def test_long_examples_keep_their_answers(base):
    tokenizer = load(base)[1]
    row = encode(tokenizer, (("x = 1\n" * 30, False), ("return x", True)))
    (kept,) = pieces(row, 32)
    assert len(kept.tokens) == 33
    assert kept.counts.sum() == row.counts.sum()
    text = encode(tokenizer, (("x = 1\n" * 30, True),))
    cut = pieces(text, 32)
    assert sum(len(r.tokens) - 1 for r in cut) == len(text.tokens) - 1  # every token predicted once
    assert [r.tokens[0] for r in cut[1:]] == [r.tokens[-1] for r in cut[:-1]]


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": "a"}',
        '{"prompt": "a", "completion": 3}',
        '{"prompt": "a", "completion": ""}',
        '{"prompt": "a", "completion": "\\ud800"}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": 5}',
        "[]",
        "{",
    ],
)
def test_bad_examples_are_told_in_one_line(base, pairs, tmp_path, line):
    (tmp_path / "bad.jsonl").write_text(pairs.read_text() + line + "\n")
    with pytest.raises(InputError, match=r"bad\.jsonl") as e:
        read_material(settings(base, tmp_path / "bad.jsonl", "x"))
    assert "\n" not in str(e.value)


# --- refusals


@pytest.mark.parametrize(
    "wrong",
    [
        {"type": "qlora"},
        {"bits": 5},
        {"bits": 4, "type": "full"},
        {"rank": 0},
        {"layers": 0},
        {"scale": 0.0},
        {"steps": 0},
        {"lr": -1.0},
        {"patience": -1},
        {"prompt": ""},
        {"context": 0},
        {"valid_fraction": 1.0},
    ],
    ids=str,
)
def test_settings_are_checked(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        FinetuneConfig(**wrong)


def test_a_folder_is_not_trained_into_twice(base, texts, whole):
    with pytest.raises(InputError, match="holds a run"):
        finetune(settings(base, texts, whole.out))
    with pytest.raises(InputError, match="holds a run"):
        finetune(settings(base, texts, base))


def test_a_resumed_run_refuses_other_data_and_another_base(base, texts, tmp_path):
    data, model = tmp_path / "data.py", tmp_path / "model"
    data.write_text("def f(x):\n    return x\n" * 50)
    ours, tokenizer = load(base, mx.float32)
    save(model, ours, tokenizer, mx.float32)
    finetune(settings(model, data, tmp_path / "a", steps=2))
    data.write_text("def g(x):\n    return x\n" * 50)
    with pytest.raises(InputError, match="not what the run began with"):
        resume(tmp_path / "a")
    ours.norm.weight = ours.norm.weight * 2
    save(model, ours, tokenizer, mx.float32)
    with pytest.raises(InputError, match="not the one that the run began with"):
        resume(tmp_path / "a")


def test_the_command_trains_and_resumes(base, texts, tmp_path, capsys):
    out = str(tmp_path / "a")
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in QUICK.items()]
    assert cli.main(["finetune", "--model", str(base), "--data", str(texts), "--out", out, *flags]) == 0
    said = capsys.readouterr().out
    for word in ("a sample before", "nats/token", "tokens/s", "peak", "a sample after", "% lower", "try it"):
        assert word in said
    assert cli.main(["finetune", "--resume", "--out", out]) == 0
    capsys.readouterr()
    assert cli.main(["finetune", "--resume", "--out", out, "--lr", "1"]) == 1
    assert "leave out --lr" in capsys.readouterr().err
    assert cli.main(["finetune", "--out", str(tmp_path / "b")]) == 1
    assert "no data" in capsys.readouterr().err


def test_without_mlx_lm_the_extra_is_named(base, texts, tmp_path):
    script = (
        "import sys; sys.modules['mlx_lm'] = None\n"
        "from mlx_hla.cli import main\n"
        f"sys.exit(main(['finetune', '--model', {str(base)!r}, '--data', {str(texts)!r}, "
        f"'--out', {str(tmp_path / 'a')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("mlx-hla: error: mlx-lm is missing")
    assert done.stderr.endswith("pip install 'mlx-hla[lm]'\n")
