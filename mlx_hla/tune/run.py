"""A fine-tuning run from its settings to an adapter on disk, or from its last checkpoint.

The folder holds at every moment the best adapter so far, whole, and the checkpoint that the run goes on from.
"""

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
from mlx_hla.generate import generate
from mlx_hla.models import LanguageModel
from mlx_hla.models.io import CONFIG, WEIGHTS
from mlx_hla.sampling import Sampling
from mlx_hla.train.checkpoint import find_checkpoints, last_checkpoint
from mlx_hla.train.course import Course
from mlx_hla.train.folder import held_by
from mlx_hla.train.report import Report, Silence
from mlx_hla.train.signals import Stopped, stop_on_signals
from mlx_hla.train.team import ALONE, Team, check_alike
from mlx_hla.trees import flat
from mlx_hla.tune.adapters import (
    ADAPTERS,
    linear_keys,
    read_arrays,
    tuner_of_mlx_lm,
    write_arrays,
    write_config,
)
from mlx_hla.tune.examples import Material, read_material, train_batches, valid_batches
from mlx_hla.tune.options import FinetuneConfig
from mlx_hla.tune.saved import Run, adaptation, begin, load_run, save_run
from mlx_hla.tune.tuner import Validation


class Finetuned(NamedTuple):
    finished: bool  # False: stopped by a signal, and resumable
    step: int
    before: float | None  # nats per byte of the held-out text, without the adapter
    best: float | None  # and with the one that was kept
    best_step: int
    out: Path


def finetune(settings: FinetuneConfig, team: Team = ALONE) -> Finetuned:
    """Train an adapter. Refuses a folder that holds a run or an adapter already.

    team: the ranks that train it together, each of which makes this call with the same settings.
    """
    if not isinstance(settings, FinetuneConfig):
        raise InputError(f"settings must be a FinetuneConfig, got {repr(settings)[:60]}")
    # A run may be resumed from another folder than the one that it was begun in.
    for name in ("data", "model"):
        if (path := getattr(settings, name)) is not None:
            settings = dataclasses.replace(settings, **{name: os.path.abspath(path)})
    out = as_path("out", settings.out)
    check_alike(team, "the settings", settings)
    _check_fresh(out, team)
    tuner_of_mlx_lm()  # miss it now, not when the data has been read
    material = _read(settings, team)
    run = begin(settings, material.digest, team)
    with held_by(team, out):
        _check_fresh(out, team)  # another run may have come and gone while this one read
        if team.first:
            keys = None if settings.type == "full" else _plain_keys(run.model)
            write_config(out, adaptation(settings)._replace(keys=keys), settings.model, run.base)
        return _go(run, material)


def resume(out: str | Path, team: Team = ALONE) -> Finetuned:
    """Go on with the run in `out` from its last checkpoint, with the settings that it has, on any ranks."""
    out = as_path("out", out)
    check_alike(team, "the settings")
    if team.first:
        last_checkpoint(out)
    with held_by(team, out):
        run = load_run(out, team)
        material = _read(run.settings, team)
        if material.digest != run.corpus:
            raise InputError(f"{out}: the data ({material.name}) is not what the run began with")
        return _go(run, material)


def _read(settings: FinetuneConfig, team: Team) -> Material:
    material = read_material(settings)
    if team.first:
        print(material.about, flush=True)
    team.agree("the data", {"the texts": material.digest})
    return material


def _plain_keys(model: LanguageModel) -> tuple[str, ...]:
    """The keys of the modules that were adapted; the base's own module lies below each as `linear`."""
    return tuple(sorted({key.removesuffix(".linear") for key in linear_keys(model)}))


def _check_fresh(out: Path, team: Team) -> None:
    if not team.first:
        return
    if find_checkpoints(out) or any((out / name).exists() for name in (ADAPTERS, CONFIG, WEIGHTS)):
        raise InputError(f"{out}: holds a run or a model already; choose another --out, or --resume it")


class _Enough(Stopped):
    """No validation has been better for long enough."""


class _Tuning(Course):
    """The course of a run that keeps the best adapter and stops when none comes any more."""

    def __init__(self, run: Run, batches: Any, scorer: Validation, report: Report, stop: Any):
        like: Any = run  # as much of a `Checkpoint` as a course asks for
        scores: Any = scorer
        super().__init__(like, batches, scores, report, stop)
        self._tuned = run
        self.enough = self._is_enough()

    @property
    def finished(self) -> bool:
        done = self.step == self._tuned.settings.steps or self.enough
        return done and self._tuned.standing.validated == self.step

    def _take(self) -> None:
        if self.enough:
            return
        if self.step == 0:
            self._save()  # so that there is never an adapter without a run to go on with
            try:
                self._validate()
            except Stopped:
                return
        super()._take()

    def _is_enough(self) -> bool:
        patience = self._tuned.settings.patience
        return 0 < patience <= self._tuned.standing.worse

    def _validate(self) -> None:
        standing, out = self._tuned.standing, Path(self._tuned.settings.out)
        super()._validate()
        if self.valid is None or standing.validated >= self.step:
            return
        if self.step == 0:
            standing.before = self.valid
        if standing.best is None or self.valid < standing.best:
            if self._team.first:
                write_arrays(out, self._tuned.trainer.params)
            standing.best, standing.best_step, standing.worse = self.valid, self.step, 0
        else:
            standing.worse += 1
        standing.validated = self.step
        if self._is_enough():
            self.enough = True
            raise _Enough

    def _write(self) -> None:
        save_run(self._tuned, self.step)


def _go(run: Run, material: Material) -> Finetuned:
    settings, model, tokenizer = run.settings, run.model, run.tokenizer
    trainer, context, out = run.trainer, model.config.context, Path(settings.out)
    team = trainer.team
    team.check_split(model.config, settings)
    trainer.params, trainer.state = team.tree_of_first((trainer.params, trainer.state), "the weights")
    batches = train_batches(material, tokenizer, settings, context)
    sizes = data.bytes_per_token(tokenizer)
    held_out = valid_batches(material, tokenizer, settings, context)
    scorer = Validation(model, held_out, sizes, compute_dtype(settings.dtype), team)
    prompt = settings.prompt or material.prompt
    trained = sum(a.size for a in flat(trainer.params).values())
    per_step = round(settings.batch_size * settings.accumulate * batches.tokens)
    ratio = scorer.bytes / scorer.tokens
    report: Any = Silence()
    if team.first:
        report = Report(
            out,
            start=run.step,
            steps=settings.steps,
            tokens_per_step=per_step,
            log_every=settings.log_every,
            bytes_per_token=ratio,
        )
    report.say(
        f"{settings.type}{'' if settings.bits is None else f' on {settings.bits} bits'}: {trained:,} of "
        f"{model.num_parameters:,} parameters are trained; windows of {context} tokens, {per_step:,} tokens "
        f"a step; {scorer.tokens:,} held-out tokens; {mx.default_device()}{team}"
    )
    report.event(
        "resume" if run.step else "start",
        step=run.step,
        settings=dataclasses.asdict(settings),
        trained=trained,
        data=material.about,
        digest=material.digest,
        base=run.base,
        valid_tokens=scorer.tokens,
        valid_bytes=scorer.bytes,
        ranks=team.size,
        mlx=version("mlx"),
        mlx_lm=version("mlx-lm"),
    )
    try:
        if run.step == 0 and team.first:
            _sample(report, "before", 0, run, prompt)
        with stop_on_signals(report.say) as stop:
            course = _Tuning(run, batches, scorer, report, stop)
            course.take()
        standing = run.standing
        result = Finetuned(
            course.finished, course.step, standing.before, standing.best, standing.best_step, out
        )
        if not course.finished:
            report.say(f"stopped after step {course.step}; go on with: mlx-hla finetune --resume --out {out}")
            return result
        if not team.first:
            return result
        if course.enough:
            report.say(f"no better validation since step {standing.best_step}: stopped at step {course.step}")
        read_arrays(out, model)
        _sample(report, "after", course.step, run, prompt)
        before, best = standing.before or 0.0, standing.best or 0.0
        report.event("end", step=course.step, before=before, best=best, best_step=standing.best_step)
        size = (out / ADAPTERS).stat().st_size / 1e6
        lower = f"{1 - best / before:.0%}" if before else "0%"
        report.say(
            f"held-out loss {before * ratio:.3f} -> {best * ratio:.3f} nats per token, {before:.3f} -> "
            f"{best:.3f} per byte ({lower} lower), at step {standing.best_step}; "
            f"adapter in {out} ({size:.2f} MB)\n"
            f"try it: mlx-hla generate --adapter {out} --prompt 'def '"
        )
        return result
    finally:
        report.close()


def _sample(report: Report, when: str, step: int, run: Run, prompt: str) -> None:
    """A text of the model as it is now, from the same prompt and the same draws."""
    settings = run.settings
    if not settings.sample_tokens:
        return
    sampling = Sampling(temperature=0.6, top_p=0.95, seed=settings.seed)
    text = generate(run.model, run.tokenizer, prompt, max_tokens=settings.sample_tokens, sampling=sampling)
    report.event("sample", step=step, when=when, prompt=prompt, text=text)
    report.say(f"--- a sample {when}:\n{prompt}|{text}\n---")
