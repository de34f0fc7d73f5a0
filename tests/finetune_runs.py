"""What tests of fine-tuning share: a tiny base, a little text, quick settings, and what a log tells."""

import json

import mlx.core as mx

from mlx_hla.models import LanguageModel, ModelConfig, save
from mlx_hla.tokenizer import train_tokenizer
from mlx_hla.train.checkpoint import find_checkpoints
from mlx_hla.tune import FinetuneConfig

SMALL = {"vocab_size": 380, "dims": 64, "num_layers": 2, "num_heads": 2, "hidden_dims": 128, "context": 32}
TEXT = "def f(x):\n    return x\nimport os, sys\n"
QUICK = {
    "steps": 6,
    "batch_size": 2,
    "warmup": 2,
    "lr": 2e-3,
    "valid_every": 2,
    "save_every": 3,
    "valid_fraction": 0.3,
    "sample_tokens": 3,
    "log_every": 1,
}


def make_base(folder):
    save(folder, LanguageModel(ModelConfig(**SMALL), seed=5), train_tokenizer([TEXT * 30], 380), mx.float32)
    return folder


def make_texts(folder):
    for i in range(20):
        (folder / f"f{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n\n\nprint(f{i}(2))\n" * 4)
    return folder


def settings(base, data, out, **changes):
    return FinetuneConfig(**{**QUICK, "model": str(base), "data": str(data), "out": str(out), **changes})


def events(out, kind):
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == kind]


def losses(out):
    return [(row["step"], row["loss"]) for row in events(out, "step")]


def trained(out):
    return find_checkpoints(out)[-1] / "trained.safetensors"
