"""What a run tells while it goes on: a bar or lines, a log in JSON lines, and a picture of the losses."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_hla.errors import InputError
from mlx_hla.files import read_bytes, write_atomic
from mlx_hla.progress import require
from mlx_hla.settings import parse_json
from mlx_hla.train.estimate import pace

MAX_LOG_BYTES = 1 << 28
PACE_STEPS = 10  # after so many, the run says how long it will take
LOG, PICTURE = "log.jsonl", "loss.png"


class Report:
    """Takes each step's numbers as they become known.

    On a terminal a bar moves; elsewhere one line is printed every `log_every` steps. Every event is a line of
    `log.jsonl`; "step" counts steps taken, so the first step's loss stands at 1.
    """

    def __init__(
        self,
        out: Path,
        *,
        start: int,
        steps: int,
        tokens_per_step: int,
        log_every: int,
        bytes_per_token: float | None = None,
    ):
        self._path = out / LOG
        self._events = _kept(self._path, start)
        # Replaced by what is kept: the steps beyond the checkpoint will be taken again.
        kept = "".join(_line(event) for event in self._events).encode()
        write_atomic(self._path, lambda file: file.write(kept))
        self._file = self._path.open("a", encoding="utf-8")
        self._steps, self._tokens, self._every = steps, tokens_per_step, log_every
        self._ratio = bytes_per_token  # of the held-out text, to tell its loss per token too
        self._bar = None
        if sys.stderr.isatty():
            self._bar = require("tqdm").tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True)
        self._valid: float | None = None
        self._mark_time, self._mark_step = time.perf_counter(), start
        self._start_time, self._start_step = self._mark_time, start
        self._tps = 0.0

    def event(self, kind: str, **values) -> None:
        event = {"event": kind, **values}
        self._events.append(event)
        self._file.write(_line(event))
        if kind != "step":
            self.flush()

    def flush(self) -> None:
        self._file.flush()

    def say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line)
        else:
            print(line, flush=True)

    def step(self, step: int, loss: float, norm: float, lr: float) -> None:
        self.event("step", step=step, loss=loss, grad_norm=norm, lr=lr)
        taken, left = step - self._start_step, self._steps - step
        if taken == PACE_STEPS and left:
            self.say(pace(time.perf_counter() - self._start_time, taken, left))
        due = step % self._every == 0 or step == self._steps
        if due:
            self._measure(step)
            self.flush()
        peak = mx.get_peak_memory() / 1e9
        valid = "" if self._valid is None else f", valid {self._valid:.4f} nats/byte"
        tail = f"{self._tps:,.0f} tokens/s, peak {peak:.2f} GB{valid}"
        if self._bar is not None:
            self._bar.update(1)
            self._bar.set_postfix_str(f"loss {loss:.4f}, {tail}")
        elif due:
            self.say(f"step {step}/{self._steps}: loss {loss:.4f}, lr {lr:.2e}, {tail}")

    def _measure(self, step: int) -> None:
        """Tokens a second since the last time; two steps read back to back tell nothing of the pace."""
        now = time.perf_counter()
        if now - self._mark_time > 0.2 or not self._tps:
            self._tps = (step - self._mark_step) * self._tokens / max(now - self._mark_time, 1e-9)
            self._mark_time, self._mark_step = now, step

    def validation_of(self, step: int) -> float | None:
        """The result of a validation after `step`, if the log has one."""
        found = [e["nats_per_byte"] for e in self._events if e["event"] == "valid" and e["step"] == step]
        return found[-1] if found else None

    def validated(self, step: int, nats_per_byte: float) -> None:
        self._valid = nats_per_byte
        self.event("valid", step=step, nats_per_byte=nats_per_byte)
        if self._bar is None:
            more = "" if self._ratio is None else f", {nats_per_byte * self._ratio:.4f} nats/token"
            self.say(f"step {step}/{self._steps}: validation {nats_per_byte:.4f} nats/byte{more}")

    def pause(self):
        """A context whose time does not count as training."""
        return _Pause(self)

    def picture(self, title: str, bytes_per_token: float) -> Path:
        return draw(self._path.with_name(PICTURE), self._events, title, bytes_per_token)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._file.close()


class Silence:
    """A `Report` of a rank that is not the first: nothing is told and nothing is written."""

    def event(self, *_, **__) -> None:
        pass

    flush = say = step = validated = close = event

    def validation_of(self, step: int) -> None:
        return None

    def pause(self):
        return contextlib.nullcontext()


class _Pause:
    def __init__(self, report: Report):
        self._report = report

    def __enter__(self):
        self._start = time.perf_counter()

    def __exit__(self, *_):
        seconds = time.perf_counter() - self._start
        self._report._mark_time += seconds
        self._report._start_time += seconds


def _line(event: dict) -> str:
    return json.dumps(event, allow_nan=False) + "\n"


_NUMBERS = {"step": ("loss", "grad_norm", "lr"), "valid": ("nats_per_byte",)}


def _is_event(event: object) -> bool:
    """Whether a line of a log is one that a run wrote, with the numbers that the picture needs."""
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        return False
    numbers: list[Any] = [event.get(name) for name in _NUMBERS.get(event["event"], ())]
    if type(event.get("step")) is not int or any(type(n) not in (int, float) for n in numbers):
        return False
    return all(abs(n) < 1e100 for n in numbers)  # what a picture can show


def _kept(path: Path, start: int) -> list[dict]:
    """The events of earlier runs up to step `start`."""
    if start == 0 or not path.exists():
        return []
    events: list[dict] = []
    for line in read_bytes(path, MAX_LOG_BYTES).split(b"\n"):
        try:
            event: Any = parse_json(line, str(path))
        except InputError:
            continue  # a line that a killed run left half written
        if _is_event(event) and event["step"] <= start:
            events.append(event)
    return events


def draw(path: Path, events: list[dict], title: str, bytes_per_token: float) -> Path:
    """Plot the losses, both in nats per byte, to a PNG."""
    require("matplotlib").use("Agg")
    plt = require("matplotlib.pyplot")
    steps = [(e["step"], e["loss"] / bytes_per_token) for e in events if e["event"] == "step"]
    valid = [(e["step"], e["nats_per_byte"]) for e in events if e["event"] == "valid"]
    figure, axes = plt.subplots(figsize=(7, 4), dpi=150)
    if steps:
        axes.plot(*zip(*steps, strict=True), color="#9ab", linewidth=0.8, label="training, each batch")
    if valid:
        axes.plot(*zip(*valid, strict=True), color="#c33", marker="o", markersize=3, label="validation")
    axes.set(xlabel="step", ylabel="nats per byte", title=title, yscale="log")
    axes.grid(alpha=0.3, which="both")
    if steps or valid:
        axes.legend()
    figure.tight_layout()
    write_atomic(path, lambda file: figure.savefig(file, format="png"))
    plt.close(figure)
    return path
