"""A fine-tuning run as a value, and what of it is on disk to go on from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_hla.devices import compute_dtype
from mlx_hla.errors import InputError
from mlx_hla.files import read_bytes, write_atomic
from mlx_hla.models import LanguageModel, load
from mlx_hla.models.snapshot import digest
from mlx_hla.settings import MAX_JSON_BYTES, parse_json
from mlx_hla.tokenizer import Tokenizer
from mlx_hla.train.checkpoint import last_checkpoint, last_good, load_tree, replace_checkpoint
from mlx_hla.train.estimate import memory
from mlx_hla.train.step import Trainer
from mlx_hla.train.team import ALONE, Team
from mlx_hla.trees import finite
from mlx_hla.tune.adapters import Adaptation, adapt
from mlx_hla.tune.options import FinetuneConfig

TRAINED, OPTIMIZER, PROGRESS = "trained.safetensors", "optimizer.safetensors", "progress.json"


@dataclasses.dataclass
class Standing:
    """How the validations have gone, in nats per byte."""

    before: float | None = None  # of the base
    best: float | None = None
    best_step: int = 0
    worse: int = 0  # validations since the best
    validated: int = -1  # the step of the last one


class Run(NamedTuple):
    step: int  # steps taken so far
    settings: FinetuneConfig
    model: LanguageModel
    tokenizer: Tokenizer
    trainer: Trainer
    corpus: str  # the data's digest
    base: str  # the base's
    standing: Standing


def begin(settings: FinetuneConfig, corpus: str, team: Team = ALONE) -> Run:
    """The base, ready to be trained, with no step taken. Every rank reads the base itself."""
    dtype = mx.float32 if settings.type == "full" else compute_dtype(settings.dtype)
    model, tokenizer = load(settings.model, dtype)
    base = digest(model)
    team.agree("the base", {"the weights": base})
    if settings.context is not None:
        model.config = dataclasses.replace(model.config, context=settings.context)
    alike: Any = settings  # it has the fields that the estimate needs
    memory(model.config, alike, team.share)
    adapt(model, adaptation(settings), settings.seed)
    return Run(0, settings, model, tokenizer, Trainer(model, alike, team), corpus, base, Standing())


def adaptation(settings: FinetuneConfig) -> Adaptation:
    s = settings
    return Adaptation(s.type, s.layers, s.rank, s.scale, bits=s.bits)


def save_run(run: Run, step: int) -> None:
    """Write `checkpoint-<step>` beside the older one, then remove that: there is always a whole one."""
    out, trainer = Path(run.settings.out), run.trainer
    final = out / f"checkpoint-{step:08d}"
    if not finite((trainer.params, trainer.state)):
        raise InputError(f"step {step}: the weights hold NaN or infinity: not saved; {last_good(out)}")
    progress = {
        "step": step,
        "corpus": run.corpus,
        "base": run.base,
        "settings": dataclasses.asdict(run.settings),
        "standing": dataclasses.asdict(run.standing),
    }
    text = (json.dumps(progress, indent=2) + "\n").encode()
    if final.exists():
        # Stopped again before its first step, or validated since: the arrays are the same.
        write_atomic(final / PROGRESS, lambda file: file.write(text))
        return
    trees = {TRAINED: trainer.params, OPTIMIZER: trainer.state}
    replace_checkpoint(final, {PROGRESS: text}, trees)


def load_run(out: Path, team: Team = ALONE) -> Run:
    """The run in `out` as its last checkpoint has it: rank 0 reads it, and sends the others what it reads."""
    folder = last_checkpoint(out) if team.first else out
    path = folder / PROGRESS
    (text,) = team.blobs_of_first(lambda: [read_bytes(path, MAX_JSON_BYTES)], 1, "the checkpoint")
    progress: Any = parse_json(text, str(path))
    known = {"step", "corpus", "base", "settings", "standing"}
    if not isinstance(progress, dict) or set(progress) != known:
        raise InputError(f"{path}: not the progress file of a fine-tuning run")
    settings = FinetuneConfig.from_dict(progress["settings"], str(path))
    settings = dataclasses.replace(settings, out=str(out))  # the folder may have been moved
    step, corpus = progress["step"], progress["corpus"]
    if type(step) is not int or not 0 <= step <= settings.steps or not isinstance(corpus, str):
        raise InputError(f"{path}: step or corpus make no sense")
    standing = _standing(progress["standing"], path)
    run = begin(settings, corpus, team)
    if run.base != progress["base"]:
        raise InputError(f"{out}: the base is not the one that the run began with")
    if team.first:
        run.trainer.params = load_tree(folder / TRAINED, run.trainer.params)
        run.trainer.state = load_tree(folder / OPTIMIZER, run.trainer.state)
    return run._replace(step=step, standing=standing)


def _standing(values: object, path: Path) -> Standing:
    names = [f.name for f in dataclasses.fields(Standing)]
    if not isinstance(values, dict) or set(values) != set(names):
        raise InputError(f"{path}: standing must have {', '.join(names)}")
    for name, value in values.items():
        if type(value) not in ((int, float, type(None)) if name in ("before", "best") else (int,)):
            raise InputError(f"{path}: {name} makes no sense: {repr(value)[:40]}")
    return Standing(**values)
