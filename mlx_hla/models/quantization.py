"""Quantised models: what `mlx.nn.quantize` did to one, as mlx-lm writes it into a config, and back.

The entry holds group_size, bits and mode of most modules, and under its path those of a module that differs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

import mlx.nn as nn

from mlx_hla.errors import InputError
from mlx_hla.trees import flat

KEYS = ("group_size", "bits", "mode")
MODES = ("affine", "mxfp4", "nvfp4", "mxfp8")
Entry = dict[str, Any]


def quantized_modules(model: nn.Module) -> dict[str, Any]:
    """The quantised modules by their paths."""
    kinds = (nn.QuantizedLinear, nn.QuantizedEmbedding)
    return {path: m for path, m in model.named_modules() if isinstance(m, kinds)}


def entry_of(model: nn.Module) -> Entry | None:
    """The config's entry for a model; None: nothing is quantised."""
    settings = {path: tuple(getattr(m, key) for key in KEYS) for path, m in quantized_modules(model).items()}
    if not settings:
        return None
    common = Counter(settings.values()).most_common(1)[0][0]
    others = {path: dict(zip(KEYS, s, strict=True)) for path, s in settings.items() if s != common}
    return {**dict(zip(KEYS, common, strict=True)), **others}


def quantize_as(model: nn.Module, entry: object, names: Collection[str], source: str) -> None:
    """Give `model` the quantised modules that a file with tensors of these `names` is for."""
    paths = {path for path, m in model.named_modules() if hasattr(m, "to_quantized")}
    if not isinstance(entry, dict):
        raise InputError(f"{source}: quantization must be an object, got {repr(entry)[:40]}")
    default = _checked({k: v for k, v in entry.items() if k in KEYS}, source)
    others = {path: v for path, v in entry.items() if path not in KEYS}
    unknown = sorted(str(path)[:60] for path in set(others) - paths)
    if unknown:
        raise InputError(f"{source}: quantization names {unknown[0]!r}, which the model has not")
    chosen = {path: default for path in paths if f"{path}.scales" in names and others.get(path) is not False}
    chosen |= {path: _checked(v, source) for path, v in others.items() if v not in (False, True)}
    try:
        nn.quantize(model, class_predicate=lambda path, _: chosen.get(path, False))
    except (ValueError, RuntimeError) as e:
        raise InputError(f"{source}: quantization cannot be: {' '.join(str(e).split())[:200]}") from None


def _checked(values: object, source: str) -> Entry:
    if not isinstance(values, dict) or set(values) - set(KEYS) or not {"group_size", "bits"} <= set(values):
        raise InputError(f"{source}: quantization needs group_size and bits, may have mode, and nothing else")
    for key, most in (("group_size", 1024), ("bits", 8)):
        if type(values[key]) is not int or not 1 <= values[key] <= most:
            got = repr(values[key])[:40]
            raise InputError(f"{source}: quantization's {key} must be a number from 1 to {most}, got {got}")
    mode = values.get("mode", "affine")
    if mode not in MODES:
        raise InputError(f"{source}: quantization's mode must be {', '.join(MODES)}, got {repr(mode)[:40]}")
    return {**values, "mode": mode}


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """name -> how many numbers it holds; a quantised weight those that it stands for, its scales none."""
    counts = {name: a.size for name, a in flat(model.parameters()).items()}
    for path, m in quantized_modules(model).items():
        counts[f"{path}.weight"] = m.weight.size * 32 // m.bits
        counts |= {name: 0 for name in (f"{path}.scales", f"{path}.biases") if name in counts}
    return counts
