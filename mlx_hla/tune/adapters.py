"""Adapters: mlx-lm's LoRA or DoRA layers on a base, in mlx-lm's file format, read with distrust.

A folder holds `adapters.safetensors`, the trained arrays by their names in the model, and
`adapter_config.json`: the kind, the rank and the modules, as mlx-lm reads them, and under "mlx_hla" the
digest of the base's weights and how many bits it was quantised to. A folder that mlx-lm's `lora` wrote has no
such entry, and is judged by names and shapes alone.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_hla.errors import InputError, about_import
from mlx_hla.files import as_path, write_atomic
from mlx_hla.models import PRETRAINED, LanguageModel, load, save
from mlx_hla.models.io import DTYPES, FLOATS, WEIGHTS, load_tensors, read_header
from mlx_hla.models.quantization import entry_of
from mlx_hla.models.snapshot import digest
from mlx_hla.settings import check_number, check_whole, read_json
from mlx_hla.tokenizer import Tokenizer
from mlx_hla.trees import finite, flat
from mlx_hla.tune.options import BITS, MAX_RANK, TYPES

ADAPTERS, ADAPTER_CONFIG = "adapters.safetensors", "adapter_config.json"
VERSION, OURS = 1, "mlx_hla"
GROUP_SIZE = 64
ENTRIES = {"version", "base", "bits"}


class Adaptation(NamedTuple):
    """What makes a base ready for an adapter's arrays."""

    type: str
    layers: int  # the last so many; -1: all
    rank: int = 8
    scale: float = 20.0
    dropout: float = 0.0
    keys: tuple[str, ...] | None = None  # modules in a layer; None: all that are linear
    bits: int | None = None  # of a base that is quantised in memory

    def to_json(self, model: str | None, base: str) -> bytes:
        """`adapter_config.json`: `model` is where the base was found, `base` its digest."""
        lora = {"rank": self.rank, "scale": self.scale, "dropout": self.dropout, "keys": self.keys}
        content = {
            "fine_tune_type": self.type,
            "model": model,
            "num_layers": self.layers,
            "lora_parameters": None if self.type == "full" else lora,
            OURS: {"version": VERSION, "base": base, "bits": self.bits},
        }
        return (json.dumps(content, indent=2) + "\n").encode()


def tuner_of_mlx_lm() -> Any:
    try:
        from mlx_lm.tuner import utils
    except ImportError as e:
        raise InputError(about_import(e)) from e
    return utils


def linear_keys(model: LanguageModel) -> tuple[str, ...]:
    """The linear modules of a layer, by their names in it."""
    kinds = (nn.Linear, nn.QuantizedLinear)
    return tuple(
        sorted({p for layer in model.layers for p, m in layer.named_modules() if isinstance(m, kinds)})
    )


def adapt(model: LanguageModel, how: Adaptation, seed: int = 0) -> None:
    """Freeze a base but for what is trained, in place: fresh LoRA or DoRA layers, or the layers' weights."""
    tuner = tuner_of_mlx_lm()
    if how.layers > len(model.layers):
        raise InputError(f"layers must be at most the model's {len(model.layers)}, got {how.layers}")
    if how.bits is not None:
        if entry_of(model) is not None:
            raise InputError("the base is quantised already: leave out bits")
        nn.quantize(model, GROUP_SIZE, how.bits, class_predicate=_packs)
        if entry_of(model) is None:
            raise InputError(f"no module's width is a multiple of {GROUP_SIZE}: leave out bits")
    model.freeze()
    if how.type == "full":
        if entry_of(model) is not None:
            raise InputError("packed weights cannot be trained: take type lora or dora")
        for layer in model.layers[-max(how.layers, 0) :]:
            layer.unfreeze()
        return
    lora: dict[str, Any] = {"rank": how.rank, "scale": how.scale, "dropout": how.dropout}
    if how.keys is not None:
        if unknown := sorted(set(how.keys) - set(linear_keys(model))):
            raise InputError(f"its layers have no linear module {repr(unknown[0])[:60]}")
        lora["keys"] = set(how.keys)
    with _seeded(seed):
        tuner.linear_to_lora_layers(model, how.layers, lora, use_dora=how.type == "dora")
        mx.eval(model.parameters())


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """mlx-lm draws from MLX's global state, which is the caller's again afterwards."""
    state: Any = mx.random.state
    high, low = state[0].tolist()
    mx.random.seed(seed)
    try:
        yield
    finally:
        mx.random.seed(high << 32 | low)


def _packs(path: str, module: nn.Module) -> bool:
    wide = hasattr(module, "to_quantized") and module.weight.shape[-1] % GROUP_SIZE == 0
    return wide and not path.endswith("_gate")


def write_config(folder: Path, how: Adaptation, model: str | None, base: str) -> None:
    write_atomic(folder / ADAPTER_CONFIG, partial(_write, data=how.to_json(model, base)))


def _write(file: BinaryIO, data: bytes) -> None:
    file.write(data)


def write_arrays(folder: Path, params: dict) -> None:
    """Put the arrays in the place of those before, whole or not at all."""
    write_atomic(
        folder / ADAPTERS, partial(mx.save_safetensors, arrays=flat(params), metadata={"format": "mlx"})
    )


def read_arrays(folder: Path, model: LanguageModel) -> None:
    """Load the arrays into a model that is adapted as they are for."""
    path = folder / ADAPTERS
    try:
        tensors = load_tensors(path, flat(model.trainable_parameters()))
    except InputError as e:
        raise InputError(f"{path}: no adapter of this model ({str(e).removeprefix(f'{path}: ')})") from None
    if not finite(tensors):
        raise InputError(f"{path}: holds NaN or infinity")
    like = flat(model.trainable_parameters())
    model.update(tree_unflatten([(name, a.astype(like[name].dtype)) for name, a in tensors.items()]))


class About(NamedTuple):
    """What `adapter_config.json` says."""

    how: Adaptation
    model: str | None  # where the base was, when the adapter was trained
    base: str | None  # the base's digest; None: mlx-lm wrote the file


def read_config(folder: Path) -> About:
    path = folder / ADAPTER_CONFIG
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; an adapter is one with {ADAPTERS} and {ADAPTER_CONFIG}")
    values = read_json(path)
    if not isinstance(values, dict):
        raise InputError(f"{path}: must be a JSON object, got {type(values).__name__}")
    ours: Any
    type_, model, ours = values.get("fine_tune_type", "lora"), values.get("model"), values.get(OURS)
    if type_ not in TYPES:
        raise InputError(f"{path}: fine_tune_type must be {', '.join(TYPES)}, got {repr(type_)[:60]}")
    if model is not None and (not isinstance(model, str) or not model):
        raise InputError(f"{path}: model must be a path, got {repr(model)[:60]}")
    base: str | None = None
    bits: Any = None
    if ours is not None:
        if not isinstance(ours, dict) or set(ours) != ENTRIES or not isinstance(ours["base"], str):
            raise InputError(f"{path}: {OURS} must have {', '.join(sorted(ENTRIES))}")
        if ours["version"] != VERSION:
            raise InputError(f"{path}: of version {repr(ours['version'])[:20]}; this reads {VERSION}")
        base, bits = ours["base"], ours["bits"]
        if bits not in (*BITS, None) or type(bits) not in (int, type(None)):
            raise InputError(f"{path}: bits must be 4, 8 or null, got {repr(bits)[:40]}")
    try:
        layers = check_whole("num_layers", values.get("num_layers", -1), -1)
        how = Adaptation(type_, layers, bits=bits)
        return About(how if type_ == "full" else _lora(how, values.get("lora_parameters")), model, base)
    except InputError as e:
        raise InputError(f"{path}: {e}") from None


def _lora(how: Adaptation, values: object) -> Adaptation:
    if not isinstance(values, dict) or not {"rank", "scale"} <= set(values):
        raise InputError("lora_parameters must have rank and scale")
    keys = values.get("keys")
    if keys is not None and (not isinstance(keys, list) or not all(isinstance(k, str) for k in keys)):
        raise InputError(f"keys must be names of modules, got {repr(keys)[:60]}")
    return how._replace(
        rank=check_whole("rank", values["rank"], 1, MAX_RANK),
        scale=check_number("scale", values["scale"]),
        dropout=check_number("dropout", values.get("dropout", 0.0), 0, 0.99),
        keys=None if keys is None else tuple(keys),
    )


def load_adapted(
    adapter: str | Path, model: str | Path | None = None, dtype: mx.Dtype | None = None
) -> tuple[LanguageModel, Tokenizer]:
    """A base with an adapter on top. `model`: the base's folder; None: where it was when it was adapted."""
    folder = as_path("the adapter's folder", adapter)
    about = read_config(folder)
    base, tokenizer = load(about.model if model is None else model, dtype)
    if about.base is not None and about.base != digest(base):
        was = about.model or "the model that ships with the package"
        raise InputError(
            f"{folder}: an adapter for other weights: it was trained on {ascii(was)[1:-1][:200]}"
        )
    try:
        adapt(base, about.how)
    except InputError as e:
        raise InputError(f"{folder}: no adapter of this model ({e})") from None
    read_arrays(folder, base)
    base.eval()
    mx.eval(base.parameters())
    return base, tokenizer


def fuse(adapter: str | Path, out: str | Path, model: str | Path | None = None) -> Path:
    """Write base and adapter as one plain model, in the form that the base's folder has.

    A base that was quantised in memory only is written with all its bits; one that is quantised in its folder
    is quantised again, which rounds what the adapter has learned.
    """
    out = as_path("the model's folder", out)
    if (out / WEIGHTS).exists():
        raise InputError(f"{out}: holds a model already; choose another folder")
    about = read_config(as_path("the adapter's folder", adapter))
    given = about.model if model is None else model
    source = PRETRAINED if given is None else as_path("the model's folder", given)
    whole, tokenizer = load_adapted(adapter, source, mx.float32)
    keep = about.how.bits is None
    fused = [(p, m.fuse(dequantize=not keep)) for p, m in whole.named_modules() if hasattr(m, "fuse")]
    whole.update_modules(tree_unflatten(fused))
    if not keep:
        from mlx_lm.utils import dequantize_model

        dequantize_model(whole)
    mx.eval(whole.parameters())
    found = {d for d, _ in read_header(source / WEIGHTS).values()} & set(FLOATS)
    save(out, whole, tokenizer, DTYPES[next(d for d in FLOATS if d in found)][0])
    return out
