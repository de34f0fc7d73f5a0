"""The course of a run: steps, validations, checkpoints, until the end, a signal or a divergence.

Ranks that train together go the same way: what decides it, a signal on one of them or a loss, all of them
know. Rank 0 alone writes.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_hla.data import Batches
from mlx_hla.errors import InputError
from mlx_hla.losses import Scorer
from mlx_hla.ranks import Lost
from mlx_hla.train.checkpoint import Checkpoint, last_good, save_checkpoint
from mlx_hla.train.report import Report
from mlx_hla.train.signals import Stop, Stopped


class Taken(NamedTuple):
    """A step whose numbers nobody has looked at yet."""

    step: int  # steps taken with it
    loss: mx.array
    norm: mx.array


class Course:
    """One run from its checkpoint on."""

    def __init__(self, run: Checkpoint, batches: Batches, scorer: Scorer, report: Report, stop: Stop):
        self.step = run.step
        self.valid: float | None = None  # the last validation's result
        self._run, self._batches, self._scorer, self._report, self._stop = run, batches, scorer, report, stop
        self._out, self._team = Path(run.settings.out), run.trainer.team
        self._pending: Taken | None = None

    @property
    def finished(self) -> bool:
        return self.step == self._run.settings.steps and self.valid is not None

    def take(self) -> None:
        """Go on until the end or a signal, and leave a checkpoint of the last step taken."""
        try:
            self._take()
        except Lost as e:
            raise InputError(f"{e}; {last_good(self._out)}" if self._team.first else str(e)) from e

    def _take(self) -> None:
        settings = self._run.settings
        try:
            if self.step and self._due(settings.valid_every):
                self._validate()  # unless it was, before the run was stopped
            while self.step < settings.steps:
                self._check_stop()
                self._take_one()
                if self._due(settings.valid_every):
                    self._validate()
                if self._due(settings.save_every):
                    self._save()
        except Stopped:
            pass
        self._save()

    def _check_stop(self, *_) -> None:
        """Leave off if a signal came, to any rank."""
        if self._team.any(bool(self._stop), f"step {self.step + 1}"):
            self._stop.set()
            raise Stopped

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self._run.settings.steps

    def _take_one(self) -> None:
        trainer, settings = self._run.trainer, self._run.settings
        self._stop.busy_with = f"a forward and backward pass of step {self.step + 1} of {settings.steps}"
        first = self.step * settings.accumulate
        batches = [self._batches[first + i] for i in range(settings.accumulate)]
        loss, norm = trainer.step(self.step, batches, self._check_stop)
        self._write_down()  # of the step before: reading its loss must not hold this one up
        self.step += 1
        self._pending = Taken(self.step, loss, norm)
        if trainer.waits:
            self._write_down()

    def _write_down(self) -> None:
        if self._pending is None:
            return
        taken, self._pending = self._pending, None
        numbers: list[Any] = [taken.loss.item(), taken.norm.item()]
        step, (loss, norm) = taken.step, numbers
        self._check(step, "loss", loss)
        self._check(step, "gradient norm", norm)
        self._report.step(step, loss, norm, self._run.settings.learning_rate(step - 1))

    def _check(self, step: int, name: str, value: float) -> None:
        if math.isfinite(value):
            return
        rate = self._run.settings.learning_rate(step - 1)
        self._report.event("diverged", step=step, what=name, lr=rate)
        raise InputError(
            f"the run diverged: at step {step} the {name} is {value}, at a learning rate of {rate:.3g}; "
            f"{last_good(self._out)}. Begin again with a lower --lr or a longer --warmup"
        )

    def _validate(self) -> None:
        self._write_down()
        self.valid = self._team.number_of_first(self._report.validation_of(self.step), "a validation")
        if self.valid is not None:
            return
        self._stop.busy_with = f"a batch of the validation after step {self.step}"
        with self._report.pause(), self._team.computing("a validation"):
            valid = self._scorer(self._run.trainer.params, self._check_stop)
        self._check(self.step, "validation loss", valid)
        self._report.validated(self.step, valid)
        self.valid = valid

    def _save(self) -> None:
        self._write_down()
        self._report.flush()  # a run killed later goes on from here, and must find the log up to here
        trainer, what = self._run.trainer, f"the checkpoint of step {self.step}"
        # Machines of other kinds may round a step otherwise: what rank 0 saves, all of them go on from.
        trainer.params, trainer.state = self._team.tree_of_first((trainer.params, trainer.state), what)
        if self._team.first:
            with self._report.pause():
                self._write()
        self._team.meet(what)  # a rank that ends may end the others: not before all is written

    def _write(self) -> None:
        save_checkpoint(self._out, self.step, self._run)
