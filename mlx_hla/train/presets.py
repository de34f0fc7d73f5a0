"""What a training run is told, and the presets."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TypeVar

from mlx_hla.data import MAX_REPEAT, parse_suffixes
from mlx_hla.errors import InputError
from mlx_hla.models import ModelConfig
from mlx_hla.settings import check_types, check_whole, from_dict, option

T = TypeVar("T")
MOST = 10**8 - 1  # a checkpoint's name has eight digits
DTYPES = ("auto", "bfloat16", "float32")


@dataclass(frozen=True)
class TrainConfig:
    """One run. Every field is a flag of `mlx-hla train`."""

    out: str = option("runs/small", "folder for the model, checkpoints, log and picture")
    data: str | None = option(None, "folder or file of text; none: the Python standard library")
    extra: str | None = option(None, "folder or file of more text to train on; none of it validates")
    repeat: int = option(1, "times that data stands in the training text, to count for more beside extra")
    tokenizer: str | None = option(None, "a tokenizer.model; none: learn one from the corpus")
    init_from: str | None = option(None, "a model's folder: start from its weights, with its tokenizer")
    suffix: str | None = option(None, "read files that end so, as .swift,.h; none: Python, prose, .jsonl")
    max_bytes: int | None = option(None, "read no more of data than this; does not cut extra")
    valid_fraction: float = option(0.05, "share of the files that validate")
    seed: int = option(0, "of weights, batches and dropout")
    steps: int = option(1600, "optimiser steps")
    batch_size: int = option(32, "sequences per batch")
    accumulate: int = option(1, "batches per step")
    lr: float = option(1.5e-3, "learning rate after the warm-up")
    final_lr: float = option(0.05, "learning rate at the end, as a fraction of lr")
    warmup: int = option(100, "steps of linear warm-up, before the cosine")
    weight_decay: float = option(0.1, "AdamW's, on matrices")
    beta1: float = option(0.9, "AdamW's")
    beta2: float = option(0.95, "AdamW's")
    clip: float = option(1.0, "largest global norm of the gradients")
    dropout: float = option(0.2, "rate, after every mixer and MLP")
    checkpoint_blocks: bool = option(False, "compute blocks again in the backward pass, to save memory")
    dtype: str = option("auto", "of the computation: bfloat16, float32 or auto, by the device")
    valid_every: int = option(200, "steps between validations")
    valid_batches: int = option(0, "batches of a validation; 0: all of the text")
    save_every: int = option(500, "steps between checkpoints")
    log_every: int = option(20, "steps between lines, where there is no terminal for a bar")

    def __post_init__(self):
        check_types(self)
        for name in ("out", "data", "extra", "tokenizer", "init_from"):
            if getattr(self, name) == "":
                raise InputError(f"{name} must be a path, got ''")
        if self.init_from is not None and self.tokenizer is not None:
            raise InputError("init_from brings a tokenizer of its own: leave out tokenizer")
        parse_suffixes(self.suffix)
        for name in ("steps", "batch_size", "accumulate", "valid_every", "save_every", "log_every"):
            check_whole(name, getattr(self, name), 1, MOST)
        check_whole("repeat", self.repeat, 1, MAX_REPEAT)
        for name in ("warmup", "valid_batches"):
            check_whole(name, getattr(self, name), 0, MOST)
        check_whole("seed", self.seed, 0, 2**32 - 1)
        if self.weight_decay < 0:
            raise InputError(f"weight_decay must not be negative, got {self.weight_decay}")
        for name in ("final_lr", "beta1", "beta2", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must be from 0 to below 1, got {getattr(self, name)}")
        for name in ("lr", "clip"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.max_bytes is not None and self.max_bytes < 1:
            raise InputError(f"max_bytes must be at least 1, got {self.max_bytes}")
        if not 0 < self.valid_fraction < 1:
            raise InputError(f"valid_fraction must be between 0 and 1, got {self.valid_fraction}")
        if self.dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {repr(self.dtype)[:60]}")

    @classmethod
    def from_dict(cls, values: object, name: str = "settings") -> TrainConfig:
        return from_dict(cls, values, name)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine from `lr` to `final_lr · lr`. Steps count from 0."""
        return warmed_cosine(step, self.steps, self.warmup, self.lr, self.final_lr)


def warmed_cosine(step: int, steps: int, warmup: int, lr: float, final_lr: float) -> float:
    if step < warmup:
        return lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    height = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return lr * (final_lr + (1 - final_lr) * height)


@dataclass(frozen=True)
class Preset:
    about: str
    model: ModelConfig
    train: TrainConfig


PRESETS = {
    "small": Preset(
        "5.9 million parameters, windows and HLA2 by turns: the sizes of the model that ships",
        ModelConfig(layers=("window", "hla2"), window=256, num_heads=2),
        TrainConfig(),
    ),
    "tiny": Preset(
        "a try-out: the shapes of Python after about a minute on two CPU cores with OpenBLAS",
        ModelConfig(vocab_size=1024, dims=128, num_layers=1, num_heads=2, hidden_dims=256, context=128),
        TrainConfig(
            out="runs/tiny",
            max_bytes=2_000_000,
            valid_fraction=0.1,
            steps=800,
            batch_size=4,
            lr=8e-3,
            warmup=20,
            dropout=0.0,
            valid_every=200,
            valid_batches=64,
            save_every=400,
            log_every=50,
        ),
    ),
}


def preset(
    name: str, model: dict | None = None, train: dict | None = None
) -> tuple[ModelConfig, TrainConfig]:
    """A preset's settings with some fields replaced; an operator takes the place of the preset's layers."""
    if not isinstance(name, str) or name not in PRESETS:
        raise InputError(f"preset must be one of {', '.join(PRESETS)}, got {repr(name)[:60]}")
    chosen = PRESETS[name]
    if isinstance(model, dict) and "operator" in model:
        if model.get("layers") is not None:
            raise InputError("operator and layers exclude each other: operator is the mixer of every block")
        model = {**model, "layers": None}
    return _replaced(chosen.model, model, "model"), _replaced(chosen.train, train, "train")


def _replaced(settings: T, changes: dict | None, name: str) -> T:
    if changes is not None and not isinstance(changes, dict):
        raise InputError(f"{name} must be a dict of fields, got {repr(changes)[:60]}")
    known = {f.name for f in dataclasses.fields(settings)}  # type: ignore[arg-type]
    unknown = sorted(str(key) for key in set(changes or {}) - known)
    if unknown:
        raise InputError(f"{name} has no field {unknown[0][:40]!r}; it has {', '.join(sorted(known))}")
    return dataclasses.replace(settings, **(changes or {}))  # type: ignore[type-var]
