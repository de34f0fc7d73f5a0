"""What a fine-tuning run is told."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_hla.data import parse_suffixes
from mlx_hla.errors import InputError
from mlx_hla.settings import check_types, check_whole, from_dict, option
from mlx_hla.train.presets import DTYPES, MOST, warmed_cosine

TYPES = ("lora", "dora", "full")
BITS = (4, 8)
MAX_RANK = 1024


@dataclass(frozen=True)
class FinetuneConfig:
    """One run. Every field is a flag of `mlx-hla finetune`."""

    out: str = option("runs/adapter", "folder for the adapter, checkpoints and log")
    data: str | None = option(None, "folder or file of text, or of JSON lines with prompts and completions")
    model: str | None = option(None, "folder of the base; none: the model that ships with the package")
    type: str = option("lora", "lora, dora, or full: the layers' own weights")
    bits: int | None = option(None, "4 or 8: quantise the base in memory first; none: as it is")
    rank: int = option(8, "of the adapter's matrices")
    scale: float = option(20.0, "factor of what the adapter adds")
    layers: int = option(-1, "train the last layers only, so many; -1: all")
    suffix: str | None = option(None, "read files that end so, as .swift,.h; none: Python, prose, .jsonl")
    max_bytes: int | None = option(None, "read no more of the data than this")
    valid_fraction: float = option(0.1, "share of the files that validate")
    pack: bool = option(True, "texts in one row, windows at any place; no: a window begins with its text")
    context: int | None = option(None, "tokens of a window; none: the base's")
    prompt: str | None = option(None, "begins the samples; none: the head of a held-out text")
    sample_tokens: int = option(60, "tokens of a sample; 0: no samples")
    seed: int = option(0, "of the adapter, batches, dropout and samples")
    steps: int = option(120, "optimiser steps at most")
    batch_size: int = option(1, "windows per batch")
    accumulate: int = option(1, "batches per step")
    lr: float = option(2e-4, "learning rate after the warm-up; at 1e-3 LoRA is unstable")
    final_lr: float = option(0.1, "learning rate at the end, as a fraction of lr")
    warmup: int = option(5, "steps of linear warm-up, before the cosine")
    weight_decay: float = option(0.0, "AdamW's, on matrices")
    beta1: float = option(0.9, "AdamW's")
    beta2: float = option(0.99, "AdamW's")
    clip: float = option(1.0, "largest global norm of the gradients")
    dropout: float = option(0.0, "rate, after every mixer and MLP")
    checkpoint_blocks: bool = option(False, "compute blocks again in the backward pass, to save memory")
    dtype: str = option("auto", "of the computation: bfloat16, float32 or auto, by the device")
    valid_every: int = option(30, "steps between validations")
    valid_batches: int = option(64, "batches of a validation; 0: all of the held-out text")
    patience: int = option(3, "stop after so many validations without a better one; 0: never")
    save_every: int = option(30, "steps between checkpoints")
    log_every: int = option(5, "steps between lines, where there is no terminal for a bar")

    def __post_init__(self):
        check_types(self)
        for name in ("out", "data", "model"):
            if getattr(self, name) == "":
                raise InputError(f"{name} must be a path, got ''")
        for name, allowed in (("type", TYPES), ("dtype", DTYPES), ("bits", (*BITS, None))):
            if (value := getattr(self, name)) not in allowed:
                raise InputError(f"{name} must be {', '.join(map(str, allowed))}, got {repr(value)[:60]}")
        if self.type == "full" and self.bits is not None:
            raise InputError("packed weights cannot be trained: leave out bits, or take type lora or dora")
        parse_suffixes(self.suffix)
        check_whole("rank", self.rank, 1, MAX_RANK)
        check_whole("layers", self.layers, -1, MOST)
        for name in ("steps", "batch_size", "accumulate", "valid_every", "save_every", "log_every"):
            check_whole(name, getattr(self, name), 1, MOST)
        for name in ("warmup", "valid_batches", "patience", "sample_tokens"):
            check_whole(name, getattr(self, name), 0, MOST)
        check_whole("seed", self.seed, 0, 2**32 - 1)
        if self.layers == 0:
            raise InputError("layers must be -1 (all) or at least 1, got 0")
        if self.prompt == "":
            raise InputError("prompt must be some text, got ''")
        for name in ("max_bytes", "context"):
            if (value := getattr(self, name)) is not None:
                check_whole(name, value, 1)
        if self.weight_decay < 0:
            raise InputError(f"weight_decay must not be negative, got {self.weight_decay}")
        for name in ("final_lr", "beta1", "beta2", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must be from 0 to below 1, got {getattr(self, name)}")
        for name in ("lr", "clip", "scale"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 < self.valid_fraction < 1:
            raise InputError(f"valid_fraction must be between 0 and 1, got {self.valid_fraction}")

    @classmethod
    def from_dict(cls, values: object, name: str = "settings") -> FinetuneConfig:
        return from_dict(cls, values, name)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine from `lr` to `final_lr · lr`. Steps count from 0."""
        return warmed_cosine(step, self.steps, self.warmup, self.lr, self.final_lr)
