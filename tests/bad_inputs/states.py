"""Saved states of a model, broken; and readings and snapshots that do not belong together."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_hla.generate import generate_step, read, stream_generate
from mlx_hla.models import LanguageModel, ModelConfig, load
from mlx_hla.models.snapshot import Snapshot, load_snapshot, save_snapshot
from mlx_hla.reading import Reading

from . import damage
from .case import EITHER, REFUSED, Case
from .commands import base
from .damage import Damage
from .good import SIZES
from .values import NOT_PATH, NOT_WHOLE, STRANGE, label, without

SEED = 17
IDS = (
    [],
    [380],
    [-1],
    [1.5],
    "x",
    None,
    3,
    [[1], [2]],
    mx.array([1.0]),
    mx.array([400]),
    mx.zeros((0,), mx.int32),
)
IDS += (np.array([2**63], np.uint64), [2**31], [None], {}, b"x", True, mx.array(3.5))


def _save(path: Path, tensors: dict[str, mx.array]) -> None:
    with path.open("wb") as file:  # a path without a suffix would get one
        mx.save_safetensors(file, tensors)


def _about(path: Path, change: Any) -> None:
    """Change what the file tells of itself."""
    tensors = dict(mx.load(str(path), format="safetensors"))
    mx.eval(tensors)
    about = json.loads(np.array(tensors["about"]).tobytes())
    text = change(about)
    text = text if isinstance(text, bytes) else json.dumps(about).encode()
    tensors["about"] = mx.array(np.frombuffer(text.ljust(512)[:512], np.uint8))
    _save(path, tensors)


def _set(about: dict[str, Any], key: str, value: Any) -> None:
    about[key] = value


def _tensor(path: Path, name: str, change: Any) -> None:
    tensors = dict(mx.load(str(path), format="safetensors"))
    mx.eval(tensors)
    tensors[name] = change(tensors[name])
    _save(path, tensors)


def _damages() -> Iterator[Damage]:
    rng = random.Random(SEED)
    yield from damage.anything(rng)
    yield from damage.safetensors(rng)
    values = {
        "version": (None, 0, 2, "1", 1.5, [], 10**30),
        "model": (None, "", "0" * 64, 3, [], {}),
        "length": (None, 0, -1, True, "5", 1.5, 2**53, 10**30, [], {}),
        "extra": (1, None),
    }
    for key, several in values.items():
        for value in several:
            change = partial(_set, key=key, value=value)
            yield Damage(f"about-{key}={label(value)}", partial(_about, change=change))
    for name in ("list", "null", "nan", "twice", "open", "latin-1", "deep-list", "spaces"):
        text = damage.JSON_TEXTS[name]
        yield Damage(f"about-{name}", partial(_about, change=lambda about, t=text: t))
    for name in ("tokens", "logits", "cache.0", "cache.1"):
        changes = {
            "nan": (
                lambda a: a * float("nan") if mx.issubdtype(a.dtype, mx.floating) else a + 2**31,
                REFUSED,
            ),
            "huge": (lambda a: a + 2**30 if a.dtype == mx.uint32 else a + 1e38, EITHER),
            "transposed": (lambda a: a[None], REFUSED),
            "half": (lambda a: a[: a.shape[0] // 2], REFUSED),
            "other-type": (lambda a: a.astype(mx.uint8), REFUSED),
            "empty": (lambda a: a[:0], REFUSED),
        }
        for how, (change, expect) in changes.items():
            yield Damage(f"{name}-{how}", partial(_tensor, name=name, change=change), expect)


def _load(place: Any, change: damage.Break, how: str) -> Any:
    path = place.copy("state")
    change(path)
    if how == "command":
        argv = [a for a in base(place, "generate") if a not in ("--prompt", "x")]
        return place.command(*argv, "--load-state", path, "--prompt", "y")
    model, tokenizer = load(place.good("model"))
    chunks = stream_generate(model, tokenizer, load_snapshot(path, model), max_tokens=2)
    return [chunk.text for chunk in chunks]


def _model(**changes: Any) -> LanguageModel:
    return LanguageModel(ModelConfig(**{**SIZES, **changes}))


def _snapshot(**changes: Any) -> Snapshot:
    return read(_model(**changes), [1, 5, 9])


def _calls() -> Iterator[tuple[str, Any, Any]]:
    """(what is called, how, bad values of what it takes)"""
    here = _snapshot
    others = [{"operator": "ahla"}, {"num_heads": 4}, {"num_layers": 2}, {"conv_size": 0}, {"dims": 32}]
    yield "Reading.model", lambda x: Reading(x).read([1]), (None, "model", 3, {}, LanguageModel)
    yield "Reading.every", lambda x: Reading(_model(), x), [0, *without(NOT_WHOLE)]
    yield "Reading.read", lambda x: Reading(_model()).read(x), IDS
    yield "Reading.rewind", lambda x: _read().rewind(x), [0, 4, *without(NOT_WHOLE)]
    yield "Reading.rewind-before", lambda x: Reading(_model()).rewind(x), [1, 3]
    yield "read.after", lambda x: read(_model(), [1], x), (3, "x", (), (1, 2, 3, 4), {}, [], *STRANGE)
    yield "read.tokens", lambda x: read(_model(), x), IDS
    yield "read.other", lambda x: read(_model(), [1], here(**x)), others
    yield "generate_step.other", lambda x: list(generate_step(_model(), here(**x), max_tokens=2)), others
    yield (
        "load_snapshot",
        lambda x: load_snapshot(x, _model()),
        (*NOT_PATH, "/no/such", "/dev/zero", "/", "a\0b"),
    )
    yield "load_snapshot.model", lambda x: load_snapshot("x", x), (None, 3, "model")
    yield (
        "save_snapshot",
        lambda x: save_snapshot(x, _model(), here()),
        (*NOT_PATH, "/dev/null/x", "/", "a\0b"),
    )
    yield "save_snapshot.state", lambda x: save_snapshot("/no/x", _model(), x), (None, 3, "x", (1, 2, 3, 4))
    yield "save_snapshot.softmax", lambda x: save_snapshot("/no/x", _model(operator=x), here()), ("softmax",)


def _read() -> Reading:
    reading = Reading(_model(), 2)
    reading.read([1, 5, 9])
    return reading


def cases() -> Iterator[Case]:
    rng = random.Random(SEED)
    for d in _damages():
        how = rng.choice(["load", "load", "command"])
        run = partial(_load, change=d.apply, how=how)
        yield Case(f"state:{d.name}-{how}", run, d.expect, d.as_user)
    for name, call, values in _calls():
        for value in values:
            yield Case(f"state:{name}={label(value)}", lambda place, c=call, v=value: c(v))
