"""A run from its settings to a model on disk, or from its last checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from mlx_hla import data
from mlx_hla.devices import compute_dtype
from mlx_hla.errors import InputError
from mlx_hla.files import as_path
from mlx_hla.losses import Scorer
from mlx_hla.models import LanguageModel, ModelConfig, save
from mlx_hla.models.io import CONFIG, WEIGHTS
from mlx_hla.tokenizer import Tokenizer, train_tokenizer
from mlx_hla.train.checkpoint import Checkpoint, find_checkpoints, last_good, load_checkpoint, save_checkpoint
from mlx_hla.train.folder import held
from mlx_hla.train.presets import TrainConfig
from mlx_hla.train.report import Report, require
from mlx_hla.train.step import Trainer


class Result(NamedTuple):
    finished: bool  # False: stopped by a signal, and resumable
    step: int
    nats_per_byte: float | None  # of the validation text, at the end
    out: Path


def train(config: ModelConfig, settings: TrainConfig) -> Result:
    """Train a fresh model. Refuses a folder that holds a run already."""
    for name, value, kind in (("config", config, ModelConfig), ("settings", settings, TrainConfig)):
        if not isinstance(value, kind):
            raise InputError(f"{name} must be a {kind.__name__}, got {repr(value)[:60]}")
    _check_extra()
    out = Path(settings.out)
    _check_fresh(out)
    corpus = _read_corpus(settings)
    if settings.tokenizer is not None:
        tokenizer = Tokenizer.load(settings.tokenizer)
        config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
    else:
        tokenizer = train_tokenizer(corpus.train, config.vocab_size)
        if tokenizer.vocab_size < config.vocab_size:
            print(
                f"a corpus of this size gives {tokenizer.vocab_size} tokens: vocab_size is that, "
                f"and not {config.vocab_size}",
                flush=True,
            )
        config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
    model = LanguageModel(config, settings.seed)
    trainer = Trainer(model, settings)
    with held(out):
        _check_fresh(out)  # another run may have come and gone while this one read
        return _run(Checkpoint(0, settings, model, tokenizer, trainer, corpus.digest), corpus)


def resume(out: str | Path) -> Result:
    """Go on with the run in `out` from its last checkpoint, with the settings that it has."""
    _check_extra()
    out = as_path("out", out)
    if not find_checkpoints(out):
        raise InputError(f"{out}: no checkpoint to resume from")
    with held(out):
        saved = load_checkpoint(out)
        corpus = _read_corpus(saved.settings)
        if corpus.digest != saved.corpus:
            raise InputError(f"{out}: the corpus ({corpus.name}) is not the one that the run began with")
        return _run(saved, corpus)


def _check_fresh(out: Path) -> None:
    if find_checkpoints(out) or (out / CONFIG).exists():
        raise InputError(f"{out}: holds a run already; choose another --out, or --resume it")


def _check_extra() -> None:
    """Miss a package now, not when an hour of training has gone by."""
    for name in ("tqdm", "matplotlib"):
        require(name)


def _read_corpus(settings: TrainConfig) -> data.Corpus:
    corpus = data.load_corpus(settings.data, settings.valid_fraction, settings.max_bytes, settings.suffix)
    print(corpus.describe(), flush=True)
    return corpus


def _run(run: Checkpoint, corpus: data.Corpus) -> Result:
    settings, model, tokenizer, trainer = run.settings, run.model, run.tokenizer, run.trainer
    context, out = model.config.context, Path(settings.out)
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
    )
    per_step = settings.batch_size * settings.accumulate * context
    report = Report(
        out, start=run.step, steps=settings.steps, tokens_per_step=per_step, log_every=settings.log_every
    )
    report.say(
        f"{model.config.operator} model of {model.num_parameters:,} parameters; {len(stream):,} tokens of "
        f"{sizes[stream].mean():.2f} bytes; steps of {per_step:,} tokens; {mx.default_device()}"
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
        mlx=mx.__version__,
    )
    try:
        with _signals() as stopping:
            step, valid = _steps(run, batches, scorer, report, corpus, stopping)
        title = f"{model.config.operator}, {model.num_parameters / 1e6:.1f} M parameters"
        if step < settings.steps:
            report.say(f"stopped after step {step}; go on with: mlx-hla train --resume --out {out}")
            return Result(False, step, valid, out)
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


def _steps(run, batches, scorer, report, corpus, stopping) -> tuple[int, float | None]:
    """Train until the end or a signal; returns the steps taken and the last validation's result."""
    settings, trainer = run.settings, run.trainer
    out, A = Path(settings.out), settings.accumulate
    valid, pending, step = None, None, run.step

    def write_down():
        if pending is not None:
            number, loss, norm = pending[0], pending[1].item(), pending[2].item()
            rate = settings.learning_rate(number)
            check(number + 1, ("loss", loss), ("gradient norm", norm), rate=rate)
            report.step(number + 1, loss, norm, rate)

    def check(number, *values, rate):
        for name, value in values:
            if not math.isfinite(value):
                report.event("diverged", step=number, what=name, lr=rate)
                raise InputError(
                    f"the run diverged: at step {number} the {name} is {value}, at a learning rate of "
                    f"{rate:.3g}; {last_good(out)}. Begin again with a lower --lr or a longer --warmup"
                )

    def keep():
        report.flush()  # a run that is killed later goes on from here, and must find the log up to here
        return save_checkpoint(out, step, trainer, run.model.config, run.tokenizer, corpus.digest)

    while step < settings.steps and not stopping.is_set():
        loss, norm = trainer.step(step, [batches[step * A + i] for i in range(A)])
        write_down()  # of the step before: reading its loss must not hold this one up
        pending = (step, loss, norm)
        step += 1
        last = step == settings.steps
        if step % settings.valid_every == 0 or last:
            write_down()
            pending = None
            with report.pause():
                valid = scorer(trainer.params)
            check(step, ("validation loss", valid), rate=settings.learning_rate(step - 1))
            report.validated(step, valid)
        if step % settings.save_every == 0 or last:
            write_down()
            pending = None
            with report.pause():
                keep()
    write_down()
    if step < settings.steps:
        keep()
    elif run.step == settings.steps:  # all steps taken, but perhaps killed before its model was saved
        valid = scorer(trainer.params)
    return step, valid


@contextlib.contextmanager
def _signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C or a termination sets, so that a step is never cut in two; twice stops at once."""
    stopping = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def handle(number, frame):
        stopping.set()
        signal.signal(number, signal.default_int_handler)

    for s in before:
        signal.signal(s, handle)
    try:
        yield stopping
    finally:
        for s, old in before.items():
            signal.signal(s, old)
