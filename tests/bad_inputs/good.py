"""Good files to break, as small as they can be."""

from __future__ import annotations

from pathlib import Path

from mlx_hla.generate import read
from mlx_hla.models import LanguageModel, ModelConfig, load, save
from mlx_hla.models.snapshot import save_snapshot
from mlx_hla.tokenizer import Tokenizer, train_tokenizer
from mlx_hla.train import preset, train

SIZES = {"vocab_size": 380, "dims": 16, "num_layers": 1, "num_heads": 2, "hidden_dims": 24, "context": 16}
TEXTS = ["def f(x):\n    return x\nimport os, sys\n" * 30]


def tokenizer(place, path: Path) -> None:
    path.write_bytes(train_tokenizer(TEXTS, 380).proto)


def model(place, path: Path) -> None:
    save(path, LanguageModel(ModelConfig(**SIZES)), Tokenizer.load(place.good("tokenizer")))


def state(place, path: Path) -> None:
    """What a text leaves in the model."""
    loaded, _ = load(place.good("model"))
    save_snapshot(path, loaded, read(loaded, [1, 5, 9]))


def corpus(place, path: Path) -> None:
    path.mkdir()
    for i in range(12):
        (path / f"f{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n\n\nprint(f{i}(2))\n" * 6)


def settings(place, out, **more):
    return {
        "data": str(place.good("corpus")),
        "tokenizer": str(place.good("tokenizer")),
        "out": str(out),
        "batch_size": 2,
        "warmup": 1,
        "steps": 2,
        "valid_every": 2,
        "valid_batches": 1,
        "save_every": 2,
        "valid_fraction": 0.2,
        **more,
    }


def run(place, path: Path) -> None:
    """A finished run of two steps, which a third can lengthen."""
    sizes = {k: v for k, v in SIZES.items() if k != "vocab_size"}
    train(*preset("tiny", sizes, settings(place, path)))
