"""Everything that a run needs to go on as if it had never stopped, in one folder per saved step."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import mlx.core as mx
from mlx.utils import tree_unflatten

from mlx_hla.errors import InputError
from mlx_hla.files import read_bytes, write_atomic
from mlx_hla.models import LanguageModel, ModelConfig
from mlx_hla.models.io import CONFIG, TOKENIZER, check_vocabulary, load_tensors
from mlx_hla.settings import MAX_JSON_BYTES, parse_json
from mlx_hla.tokenizer import MAX_MODEL_BYTES, Tokenizer
from mlx_hla.train.folder import new_folder
from mlx_hla.train.presets import TrainConfig
from mlx_hla.train.step import Trainer
from mlx_hla.train.team import ALONE, Team
from mlx_hla.trees import finite, flat

WEIGHTS, OPTIMIZER, PROGRESS = "weights.safetensors", "optimizer.safetensors", "progress.json"
_NAME = re.compile(r"checkpoint-([0-9]{8})")


class Checkpoint(NamedTuple):
    step: int  # steps taken so far
    settings: TrainConfig
    model: LanguageModel
    tokenizer: Tokenizer
    trainer: Trainer
    corpus: str  # the corpus's digest


def save_checkpoint(out: Path, step: int, run: Checkpoint) -> Path:
    """Write `checkpoint-<step>` beside the older one, then remove that: there is always a whole one."""
    final, trainer = out / f"checkpoint-{step:08d}", run.trainer
    if final.exists():
        return final  # a run resumed and stopped again before its first step
    if not finite((trainer.params, trainer.state)):
        raise InputError(f"step {step}: the weights hold NaN or infinity: not saved; {last_good(out)}")
    progress = {"step": step, "corpus": run.corpus, "settings": dataclasses.asdict(trainer.settings)}
    files = {
        TOKENIZER: run.tokenizer.proto,
        CONFIG: run.model.config.to_json().encode(),
        PROGRESS: (json.dumps(progress, indent=2) + "\n").encode(),
    }
    replace_checkpoint(final, files, {WEIGHTS: trainer.params, OPTIMIZER: trainer.state})
    return final


def replace_checkpoint(final: Path, files: dict[str, bytes], trees: dict[str, dict]) -> None:
    """Write the folder `final` whole or not at all, then remove the other checkpoints beside it."""
    folder = new_folder(final.parent)
    try:
        for name, data in files.items():
            write_atomic(folder / name, partial(_write, data=data))
        for name, tree in trees.items():
            write_atomic(folder / name, partial(mx.save_safetensors, arrays=flat(tree)))
        folder.rename(final)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for other in find_checkpoints(final.parent):
        if other != final:
            shutil.rmtree(other, ignore_errors=True)


def _write(file: BinaryIO, data: bytes) -> None:
    file.write(data)


def find_checkpoints(out: Path) -> list[Path]:
    """The saved steps of a run, oldest first."""
    if not out.is_dir():
        return []
    return sorted(p for p in out.iterdir() if _NAME.fullmatch(p.name) and p.is_dir())


def last_good(out: Path) -> str:
    """Where a run that failed can go on from, in words."""
    found = find_checkpoints(out)
    return f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet"


def load_checkpoint(out: Path, team: Team = ALONE) -> Checkpoint:
    """The run in `out` as its last checkpoint has it: rank 0 reads it, and sends the others what it reads."""
    folder = out

    def read() -> list[bytes]:
        nonlocal folder
        folder = last_checkpoint(out)
        limits = {PROGRESS: MAX_JSON_BYTES, CONFIG: MAX_JSON_BYTES, TOKENIZER: MAX_MODEL_BYTES}
        return [read_bytes(folder / name, limit) for name, limit in limits.items()]

    texts = team.blobs_of_first(read, 3, "the checkpoint")
    progress: Any = parse_json(texts[0], str(folder / PROGRESS))
    if not isinstance(progress, dict) or set(progress) != {"step", "corpus", "settings"}:
        raise InputError(f"{folder / PROGRESS}: not a checkpoint's progress file")
    step, corpus = progress["step"], progress["corpus"]
    settings = TrainConfig.from_dict(progress["settings"], str(folder / PROGRESS))
    if type(step) is not int or not 0 <= step <= settings.steps or not isinstance(corpus, str):
        raise InputError(f"{folder / PROGRESS}: step or corpus make no sense")
    settings = dataclasses.replace(settings, out=str(out))  # the folder may have been moved
    config = ModelConfig.from_dict(parse_json(texts[1], str(folder / CONFIG)), str(folder / CONFIG))
    tokenizer = Tokenizer(texts[2], str(folder / TOKENIZER))
    check_vocabulary(config, tokenizer, folder / TOKENIZER)
    model = LanguageModel(config)
    trainer = Trainer(model, settings, team)
    if team.first:
        trainer.params = load_tree(folder / WEIGHTS, trainer.params)
        trainer.state = load_tree(folder / OPTIMIZER, trainer.state)
    return Checkpoint(step, settings, model, tokenizer, trainer, corpus)


def last_checkpoint(out: Path) -> Path:
    found = find_checkpoints(out)
    if not found:
        raise InputError(f"{out}: no checkpoint to resume from")
    return found[-1]


def lengthened(run: Checkpoint, steps: int) -> Checkpoint:
    """The same run with another number of steps in all."""
    settings = dataclasses.replace(run.settings, steps=steps)
    if steps <= run.step:
        raise InputError(f"{settings.out}: has taken {run.step} steps; steps must be more, got {steps}")
    run.trainer.settings = settings
    return run._replace(settings=settings)


def load_tree(path: Path, like: dict) -> dict:
    """The float32 tensors of a checkpoint's file, in the shape of `like`."""
    wanted = flat(like)
    tensors = load_tensors(path, wanted, ("F32",))
    if not finite(tensors):
        raise InputError(f"{path}: holds NaN or infinity: a run that diverged cannot go on from it")
    return tree_unflatten([(name, tensors[name]) for name in wanted])
