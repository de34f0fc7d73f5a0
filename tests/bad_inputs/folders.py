"""Model folders and checkpoints: every file of one, broken."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mlx_hla.generate import generate
from mlx_hla.models import ModelConfig, load
from mlx_hla.train import TrainConfig

from . import damage
from .case import ACCEPTED, EITHER, REFUSED, Case
from .commands import base
from .damage import Damage
from .values import label

SEED, A_FIELD = 3, 100
CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.model"
TOKENIZER_JSON, TOKENIZER_CONFIG, HLA = "tokenizer.json", "tokenizer_config.json", "hla.py"


def _fields(cls: type, rng: random.Random, *keys: str) -> Iterator[Damage]:
    """A JSON object's fields, with values of a wrong type or range."""
    for field in dataclasses.fields(cls):
        values = damage.WRONG[str(field.type)]
        for value in rng.sample(values, min(A_FIELD, len(values))):
            change = partial(damage.set_field, keys=(*keys, field.name), value=value)
            yield Damage(f"{field.name}={label(value)}", change)
        yield Damage(f"no-{field.name}", partial(damage.without_field, keys=(*keys, field.name)), EITHER)
    for name in ("", "Dims", "extra", "\u0000", "__class__", "a" * 9000):
        yield Damage(f"extra-{name[:9]!a}", partial(damage.set_field, keys=(*keys, name), value=1))


QUANTIZATIONS: tuple[Any, ...] = (
    3,
    "q4",
    [],
    {},
    {"group_size": 64},
    {"group_size": 0, "bits": 4},
    {"group_size": 64, "bits": 99},
    {"group_size": 64, "bits": 3.5},
    {"group_size": True, "bits": 4},
    {"group_size": 64, "bits": 4, "mode": "x"},
    {"group_size": 64, "bits": 4, "mode": ["affine"]},
    {"group_size": 64, "bits": 4, "mode": None},
    {"group_size": 64, "bits": 4, "layers.9.mlp": {"group_size": 64, "bits": 4}},
    {"group_size": 64, "bits": 4, "embedding": 3},
    {"group_size": 64, "bits": 4, "embedding": {"group_size": 7, "bits": 4}},
    {"group_size": 64, "bits": 4, "norm": {"group_size": 64, "bits": 4}},
)


# Keys of config.json for mlx-lm, and what they must not be.
ADDED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama", "", 3, [], {}, True),
    "model_file": ("/etc/passwd", "../x.py", "", 3, ["hla.py"], {}),
    "bos_token_id": (0, -1, "1", [], [1, 2], {}, 10**30),
    "eos_token_id": (0, -1, "2", [], [1, 2], {}, None),
    "quantization_config": (3, {}, {"group_size": 64, "bits": 4}),
    "auto_map": ({"AutoModel": "evil.Model"}, None),
}


def _alone(path: Path, apply: damage.Break) -> None:
    """Damage a tokenizer.json on which the folder depends."""
    path.with_name(TOKENIZER).unlink()
    apply(path)


def _companions(rng: random.Random, name: str) -> Iterator[Damage]:
    for d in damage.anything(rng, forgiving=name == TOKENIZER):
        absent = d.name in ("missing", "dangling", "loop")
        if name == TOKENIZER_JSON:
            yield d._replace(apply=partial(_alone, apply=d.apply))
        elif absent and (name == HLA or d.name == "missing"):
            yield d._replace(expect=EITHER)
        else:
            yield d
    if name != TOKENIZER_JSON:
        return
    for d in damage.json_texts():
        yield d._replace(apply=partial(_alone, apply=d.apply))
    for key in ("model", "added_tokens", "pre_tokenizer", "decoder", "normalizer", "version"):
        for value in (None, 3, "x", [], {}, [3], {"type": "BPE"}, {"type": "BPE", "vocab": 3}):
            change = partial(damage.set_field, keys=(key,), value=value)
            yield Damage(f"{key}={label(value)}", partial(_alone, apply=change), EITHER)
    for key in ("vocab", "merges", "unk_token", "byte_fallback", "type"):
        for value in (None, 3, "x", [], {}, [3], [["a"]], {"a": -1}, {"a": 10**30}, {"a": "b"}, ["a b c"]):
            change = partial(damage.set_field, keys=("model", key), value=value)
            yield Damage(f"model.{key}={label(value)}", partial(_alone, apply=change), EITHER)


def _model_damages() -> Iterator[tuple[str, Damage]]:
    rng = random.Random(SEED)
    for name in (CONFIG, WEIGHTS):
        yield from ((name, d) for d in damage.anything(rng))
    # Without a tokenizer.model there may be a tokenizer.json, without hla.py nothing is lost.
    for name in (TOKENIZER, TOKENIZER_JSON, HLA):
        yield from ((name, d) for d in _companions(rng, name))
    # Read only for the code that it may name.
    for d in (*damage.anything(rng), *damage.json_texts()):
        yield TOKENIZER_CONFIG, d._replace(expect=EITHER)
    code = partial(damage.set_field, keys=("auto_map",), value={"AutoTokenizer": "evil.Tokenizer"})
    yield TOKENIZER_CONFIG, Damage("code", code)
    yield from ((CONFIG, d) for d in damage.json_texts())
    yield from ((CONFIG, d) for d in _fields(ModelConfig, rng))
    for key, values in ADDED.items():
        for value in values:
            yield CONFIG, Damage(f"{key}={label(value)}", partial(damage.set_field, keys=(key,), value=value))
    sizes = [f.name for f in dataclasses.fields(ModelConfig) if str(f.type).startswith("int")]
    for name in sizes:
        for value in (0, 10**9, 2**63):
            expect = EITHER if (name, value) == ("conv_size", 0) else REFUSED
            yield (
                CONFIG,
                Damage(f"{name}={value}", partial(damage.set_field, keys=(name,), value=value), expect),
            )
    for value in QUANTIZATIONS:
        change = partial(damage.set_field, keys=("quantization",), value=value)
        shown = (
            label(value)
            if not isinstance(value, dict)
            else "-".join(f"{k}={v}" for k, v in value.items())[:60]
        )
        yield CONFIG, Damage(f"quantization-{shown}", change)
    yield from ((WEIGHTS, d) for d in damage.safetensors(rng))
    for seed in range(40):
        yield TOKENIZER, Damage(f"flips-{seed}", partial(damage.flipped, seed=seed, most=60), EITHER)


def _model(place: Any, name: str, change: damage.Break, how: str) -> Any:
    folder = place.copy("model")
    change(folder / name)
    if how == "load":
        model, tokenizer = load(folder)
        return generate(model, tokenizer, "def", max_tokens=2)
    if how == "train":
        words = "--steps 1 --batch-size 2 --context 16 --valid-batches 1 --preset tiny"
        flags = {"init-from": folder, "data": place.good("corpus"), "out": place.path / "out"}
        return place.command("train", *words.split(), *(f"--{n}={v}" for n, v in flags.items()))
    return place.command(*base(place, how), "--model", folder)


def _model_cases() -> Iterator[Case]:
    rng = random.Random(SEED)
    for file, d in _model_damages():
        how = rng.choice(["load", "load", "load", "info", "generate", "eval", "train"])
        shown = file if file == TOKENIZER_JSON else file.partition(".")[0]
        name = f"model:{shown}-{d.name}-{how}"
        yield Case(name, partial(_call, _model, file, d.apply, how), d.expect, d.as_user)


def _call(function: Any, *rest: Any) -> Any:
    *arguments, place = rest
    return function(place, *arguments)


# ---- checkpoints

CHECKPOINT = "checkpoint-00000002"
NUMBERS = (None, True, "2", 1.5, -1, 10**30, [], {}, 99, 2.0)
LOG_LINES = (
    b"",
    b"{",
    b"null",
    b"3",
    b"[]",
    b"{}",
    b'"step"',
    b'{"event": "step"}',
    b'{"event": "step", "step": 1}',
    b'{"event": "step", "step": "1", "loss": 1, "grad_norm": 1, "lr": 1}',
    b'{"event": "step", "step": 1.0, "loss": 1, "grad_norm": 1, "lr": 1}',
    b'{"event": "step", "step": true, "loss": 1, "grad_norm": 1, "lr": 1}',
    b'{"event": "step", "step": 1, "loss": null, "grad_norm": 1, "lr": 1}',
    b'{"event": "step", "step": 1, "loss": NaN, "grad_norm": 1, "lr": 1}',
    b'{"event": "step", "step": 1, "loss": 1e999, "grad_norm": 1, "lr": 1}',
    b'{"event": "step", "step": 1, "loss": -1, "grad_norm": 1, "lr": 1}',
    b'{"event": "step", "step": 1, "loss": 0, "grad_norm": 1, "lr": 1}',
    b'{"event": "step", "step": -5, "loss": 1, "grad_norm": 1, "lr": 1}',
    b'{"event": "step", "step": 1, "loss": ' + b"9" * 500 + b', "grad_norm": 1, "lr": 1}',
    b'{"event": "valid", "step": 1}',
    b'{"event": "valid", "step": 1, "nats_per_byte": "1"}',
    b'{"event": "valid", "step": 1, "nats_per_byte": [1]}',
    b'{"event": "valid", "step": 2, "nats_per_byte": 1e90}',
    b'{"event": ["step"], "step": 1}',
    b'{"event": {"a": 1}, "step": 1}',
    b'{"event": "odd", "step": 1, "a": NaN}',
    b'{"event": "odd", "step": 1, "a": 1e999}',
    b'{"event": "odd", "step": 1, "a": "\\ud800"}',
    b'{"event": "odd", "step": 10000000000000000000000000000000000}',
    b'{"event": "step", "event": "step"}',
    b"\xff\xfe\x00",
    b"\0" * 100,
    b"[" * 100_000,
    b"x" * 1_000_000,
    b'{"event": "step", "step": 1, "loss": 1, "grad_norm": 1, "lr": 1}\r',
)


def _resume(place: Any, file: str, change: damage.Break) -> Any:
    run = place.copy("run")
    change(run / file)
    ended = place.command("train", "--resume", "--out", run, "--steps", 3)
    if ended.status == 0:
        _check_log(run / "log.jsonl")
    return ended


def _check_log(path: Path) -> None:
    """The log of a run that has ended holds rows of JSON and every step."""

    def refuse(text: str) -> None:
        raise AssertionError(f"the log holds {text}")

    rows = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert [r["step"] for r in rows if r["event"] == "step"][-1] == 3, "the log has lost steps"


def _log(path: Path, line: bytes, first: bool) -> None:
    rows = path.read_bytes().splitlines()
    rows.insert(0 if first else len(rows), line)
    path.write_bytes(b"\n".join(rows) + b"\n" * (not first))


def _elsewhere(path: Path, name: str) -> None:
    path.rename(path.with_name(name))


def _newer(path: Path, name: str, emptied: str | None) -> None:
    """Beside the checkpoint another, which counts as the newest."""
    other = Path(shutil.copytree(path, path.with_name(name)))
    if emptied:
        (other / emptied).write_bytes(b"")


def _checkpoint_damages() -> Iterator[tuple[str, Damage]]:
    rng = random.Random(SEED + 1)
    files = (
        "config.json",
        "tokenizer.model",
        "weights.safetensors",
        "optimizer.safetensors",
        "progress.json",
    )
    for name in files:
        at = f"{CHECKPOINT}/{name}"
        several = list(damage.anything(rng, forgiving=name == "tokenizer.model"))
        yield from ((at, d) for d in rng.sample(several, 14))
        if name.endswith("safetensors"):
            yield from ((at, d) for d in rng.sample(list(damage.safetensors(rng)), 18))
        if name.endswith("json"):
            yield from ((at, d) for d in rng.sample(list(damage.json_texts()), 12))
    config, progress = f"{CHECKPOINT}/config.json", f"{CHECKPOINT}/progress.json"
    yield from ((config, d) for d in rng.sample(list(_fields(ModelConfig, rng)), 20))
    yield from ((progress, d) for d in rng.sample(list(_fields(TrainConfig, rng, "settings")), 50))
    for field, values in {
        "step": NUMBERS,
        "settings": (None, [], 3, "x", {"a": 1}),
        "corpus": NUMBERS,
    }.items():
        for value in values:
            yield (
                progress,
                Damage(f"{field}={label(value)}", partial(damage.set_field, keys=(field,), value=value)),
            )
        yield progress, Damage(f"no-{field}", partial(damage.without_field, keys=(field,)))
    yield progress, Damage("corpus-other", partial(damage.set_field, keys=("corpus",), value="0" * 64))
    yield progress, Damage("extra", partial(damage.set_field, keys=("extra",), value=1))
    yield CHECKPOINT, Damage("gone", shutil.rmtree)
    yield CHECKPOINT, Damage("short-name", partial(_elsewhere, name="checkpoint-2"))
    yield CHECKPOINT, Damage("other-digits", partial(_elsewhere, name="checkpoint-٠٠٠٠٠٠٠٢"))
    yield CHECKPOINT, Damage("wrong-step", partial(_elsewhere, name="checkpoint-00000001"), EITHER)
    for name in files:
        newest = partial(_newer, name="checkpoint-00000003", emptied=name)
        yield CHECKPOINT, Damage(f"newest-without-{name}", newest)
    for line in LOG_LINES:
        first = rng.random() < 0.5
        yield "log.jsonl", Damage(f"line-{label(line)}", partial(_log, line=line, first=first), ACCEPTED)
    for d in damage.anything(rng):
        special = d.name in ("folder", "pipe", "zero", "null", "sparse", "locked")
        yield "log.jsonl", d._replace(expect=REFUSED if special else EITHER)
    for name in ("loss.png", "model.safetensors", "config.json", "tokenizer.model"):
        several = [
            d for d in damage.anything(rng) if d.name in ("missing", "folder", "pipe", "zero", "noise-100")
        ]
        yield from ((name, d._replace(expect=EITHER)) for d in rng.sample(several, 2))


def _checkpoint_cases() -> Iterator[Case]:
    for file, d in _checkpoint_damages():
        shown = file.rpartition("/")[2].partition(".")[0]
        yield Case(
            f"checkpoint:{shown}-{d.name}", partial(_call, _resume, file, d.apply), d.expect, d.as_user
        )


def cases() -> Iterator[Case]:
    yield from _model_cases()
    yield from _checkpoint_cases()
