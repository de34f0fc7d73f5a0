"""A run from its settings to a model on disk, or from its last checkpoint."""

from __future__ import annotations

import dataclasses
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_hla import data
from mlx_hla.devices import compute_dtype
from mlx_hla.errors import InputError
from mlx_hla.files import as_path
from mlx_hla.losses import Scorer
from mlx_hla.models import LanguageModel, ModelConfig, load, save
from mlx_hla.models.io import CONFIG, WEIGHTS
from mlx_hla.models.quantization import entry_of
from mlx_hla.progress import require
from mlx_hla.tokenizer import Tokenizer, train_tokenizer
from mlx_hla.train.checkpoint import (
    Checkpoint,
    find_checkpoints,
    last_checkpoint,
    lengthened,
    load_checkpoint,
)
from mlx_hla.train.course import Course
from mlx_hla.train.estimate import memory
from mlx_hla.train.folder import held_by
from mlx_hla.train.presets import TrainConfig
from mlx_hla.train.report import Report, Silence
from mlx_hla.train.signals import stop_on_signals
from mlx_hla.train.step import Trainer
from mlx_hla.train.team import ALONE, Team, check_alike, check_weights


class Result(NamedTuple):
    finished: bool  # False: stopped by a signal, and resumable
    step: int
    nats_per_byte: float | None  # of the validation text, at the end
    out: Path


def train(config: ModelConfig, settings: TrainConfig, team: Team = ALONE) -> Result:
    """Train a fresh model. Refuses a folder that holds a run already.

    team: the ranks that train it together, each of which makes this call with the same settings.
    """
    kinds = ("config", config, ModelConfig), ("settings", settings, TrainConfig), ("team", team, Team)
    for name, value, kind in kinds:
        if not isinstance(value, kind):
            raise InputError(f"{name} must be a {kind.__name__}, got {repr(value)[:60]}")
    _check_extra(team)
    # A run may be resumed from another folder than the one that it was begun in.
    for name in ("data", "extra", "tokenizer", "init_from"):
        if (path := getattr(settings, name)) is not None:
            settings = dataclasses.replace(settings, **{name: os.path.abspath(path)})
    out = as_path("out", settings.out)
    check_alike(team, "the settings", config, settings)
    _check_fresh(out, team)
    corpus = _read_corpus(settings, team)
    model, tokenizer = _begin(config, settings, corpus, team)
    trainer = Trainer(model, settings, team)
    with held_by(team, out):
        _check_fresh(out, team)  # another run may have come and gone while this one read
        return _run(Checkpoint(0, settings, model, tokenizer, trainer, corpus.digest), corpus)


def resume(out: str | Path, steps: int | None = None, team: Team = ALONE) -> Result:
    """Go on with the run in `out` from its last checkpoint, with the settings that it has.

    `steps`: as many in all, instead of the run's own number; from here on the learning rate is that of a run
    which was to have so many from its start. A finished run can be lengthened. `team`: as `train` takes it,
    of any number of ranks, whatever it was before. Rank 0 reads the checkpoint.
    """
    out = as_path("out", out)
    check_alike(team, "the settings", {"steps": steps})
    _check_extra(team)
    if team.first:
        last_checkpoint(out)
    with held_by(team, out):
        saved = load_checkpoint(out, team)
        if steps is not None:
            saved = lengthened(saved, steps)
        corpus = _read_corpus(saved.settings, team)
        if corpus.digest != saved.corpus:
            raise InputError(f"{out}: the corpus ({corpus.name}) is not the one that the run began with")
        return _run(saved, corpus)


def _begin(
    config: ModelConfig, settings: TrainConfig, corpus: data.Corpus, team: Team
) -> tuple[LanguageModel, Tokenizer]:
    """A model to train, and the tokenizer of its texts."""
    if settings.init_from is not None:
        model, tokenizer = load(settings.init_from, mx.float32)
        if entry_of(model) is not None:
            raise InputError(f"{settings.init_from}: is quantised: packed weights cannot be trained")
        # All that the weights fit comes with them; how long a text is trained on does not.
        model.config = dataclasses.replace(model.config, context=config.context)
        memory(model.config, settings, team.share)
        check_weights(team, "init_from", model.parameters())
        return model, tokenizer

    def make() -> list[bytes]:
        if settings.tokenizer is not None:
            return [Tokenizer.load(settings.tokenizer).proto]
        made = train_tokenizer(corpus.train, config.vocab_size)
        if made.vocab_size < config.vocab_size:
            print(
                f"a corpus of this size gives {made.vocab_size} tokens: vocab_size is that, "
                f"and not {config.vocab_size}",
                flush=True,
            )
        return [made.proto]

    (proto,) = team.blobs_of_first(make, 1, "the tokenizer")
    tokenizer = Tokenizer(proto)
    config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
    memory(config, settings, team.share)
    return LanguageModel(config, settings.seed), tokenizer


def _check_fresh(out: Path, team: Team) -> None:
    if not team.first:
        return
    if find_checkpoints(out) or (out / CONFIG).exists():
        raise InputError(f"{out}: holds a run already; choose another --out, or --resume it")


def _check_extra(team: Team) -> None:
    """Miss a package now, not when an hour of training has gone by."""
    for name in ("tqdm", "matplotlib") if team.first else ():
        require(name)


def _read_corpus(settings: TrainConfig, team: Team) -> data.Corpus:
    s = settings
    corpus = data.load_corpus(s.data, s.valid_fraction, s.max_bytes, s.suffix, s.extra, s.repeat)
    if team.first:
        print(corpus.describe(), flush=True)
    team.agree("the data", {"the corpus": corpus.digest})
    return corpus


def _run(run: Checkpoint, corpus: data.Corpus) -> Result:
    settings, model, tokenizer, trainer = run.settings, run.model, run.tokenizer, run.trainer
    team, context, out = trainer.team, model.config.context, Path(settings.out)
    team.check_split(model.config, settings)
    trainer.params, trainer.state = team.tree_of_first((trainer.params, trainer.state), "the weights")
    stream = data.encode_texts(tokenizer, corpus.train)
    sizes = data.bytes_per_token(tokenizer)
    batches = data.Batches(stream, settings.batch_size, context, settings.seed)
    scorer = Scorer(
        model,
        data.encode_texts(tokenizer, corpus.valid),
        sizes,
        batch_size=settings.batch_size,
        context=context,
        dtype=compute_dtype(settings.dtype),
        max_batches=settings.valid_batches,
        team=team,
    )
    per_step = settings.batch_size * settings.accumulate * context
    report: Any = Silence()
    if team.first:
        report = Report(
            out, start=run.step, steps=settings.steps, tokens_per_step=per_step, log_every=settings.log_every
        )
    report.say(
        f"{model.config.mixer_name} model of {model.num_parameters:,} parameters; {len(stream):,} tokens of "
        f"{sizes[stream].mean():.2f} bytes; steps of {per_step:,} tokens; {mx.default_device()}{team}; "
        f"{memory(model.config, settings, team.share)}"
    )
    report.event(
        "resume" if run.step else "start",
        step=run.step,
        model=dataclasses.asdict(model.config),
        settings=dataclasses.asdict(settings),
        parameters=model.num_parameters,
        corpus=corpus.describe(),
        digest=corpus.digest,
        train_tokens=len(stream),
        valid_bytes=scorer.bytes,
        ranks=team.size,
        mlx=version("mlx"),
    )
    try:
        with stop_on_signals(report.say) as stop:
            course = Course(run, batches, scorer, report, stop)
            course.take()
        step, valid = course.step, course.valid
        title = f"{model.config.mixer_name}, {model.num_parameters / 1e6:.1f} M parameters"
        if not course.finished:
            report.say(f"stopped after step {step}; go on with: mlx-hla train --resume --out {out}")
            return Result(False, step, valid, out)
        if not team.first:
            return Result(True, step, valid, out)
        report.event("end", step=step, nats_per_byte=valid, peak_memory=mx.get_peak_memory())
        model.update(trainer.params)
        save(out, model, tokenizer)
        picture = report.picture(title, float(sizes[stream].mean()))
        size = (out / WEIGHTS).stat().st_size / 1e6
        report.say(
            f"validation {valid:.4f} nats/byte; model in {out} ({size:.2f} MB), losses in {picture}\n"
            f"try it: mlx-hla generate --model {out} --prompt 'def '"
        )
        return Result(True, step, valid, out)
    finally:
        report.close()
