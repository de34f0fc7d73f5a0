"""Models on disk: a folder with `config.json`, `model.safetensors` and `tokenizer.model`.

It is a folder of mlx-lm's as well: `portable` has what that adds, and what `load` takes of mlx-lm's.

A file is checked before it is believed: sizes in the config against limits, then every tensor's name, shape
and dtype in the safetensors header against the config, then the header against the file's length. Nothing is
unpickled, and nothing large is allocated for a file that is refused.
"""

from __future__ import annotations

import dataclasses
import json
import os
import struct
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
from mlx.utils import tree_unflatten

from mlx_hla.devices import on_gpu
from mlx_hla.errors import InputError
from mlx_hla.files import as_path, open_regular, unchanged, write_atomic
from mlx_hla.models import portable
from mlx_hla.models.config import MAX_PARAMETERS, ModelConfig
from mlx_hla.models.lm import LanguageModel
from mlx_hla.models.quantization import entry_of, quantize_as, quantized_modules
from mlx_hla.settings import parse_json, read_json
from mlx_hla.tokenizer import Tokenizer
from mlx_hla.trees import cast, finite, flat, is_float

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.model"
PRETRAINED = Path(__file__).resolve().parent.parent / "pretrained"
MAX_HEADER_BYTES = 16 * 2**20
MAX_WEIGHTS_BYTES = 9 * MAX_PARAMETERS  # an optimizer's two float32 moments, and a header
DTYPES = {
    "F32": (mx.float32, 4),
    "F16": (mx.float16, 2),
    "BF16": (mx.bfloat16, 2),
    "U64": (mx.uint64, 8),
    "U32": (mx.uint32, 4),
    "U8": (mx.uint8, 1),
}
FLOATS = ("F32", "F16", "BF16")
Header = dict[str, tuple[str, tuple[int, ...]]]  # name -> (dtype, shape)


def save(folder: str | Path, model: LanguageModel, tokenizer: Tokenizer, dtype: mx.Dtype = mx.bfloat16):
    """Write the model; each file appears whole or not at all, the weights last.

    Quantised modules are saved as they are, packed, and all else in `dtype`.
    """
    folder = as_path("the model's folder", folder)
    _check_dtype(dtype)
    if not hasattr(model, "config") or not hasattr(tokenizer, "proto"):
        got = f"{type(model).__name__} and {type(tokenizer).__name__}"
        raise InputError(f"save takes a LanguageModel and its Tokenizer, got {got}")
    packed = tuple(f"{path}." for path in quantized_modules(model))
    weights = {
        name: a if name.startswith(packed) or not is_float(a) else a.astype(dtype)
        for name, a in flat(model.parameters()).items()
    }
    if not finite(weights):
        raise InputError(f"{folder}: the weights hold NaN or infinity as {dtype}: not saved")
    config = dataclasses.asdict(model.config) | portable.entries(model.config, tokenizer)
    if (entry := entry_of(model)) is not None:
        config[portable.QUANTIZATION] = entry
    added = portable.files(model.config, tokenizer)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"{folder}: cannot make this folder ({e.strerror or e})") from e
    texts = {TOKENIZER: tokenizer.proto, CONFIG: (json.dumps(config, indent=2) + "\n").encode(), **added}
    for name, text in texts.items():
        write_atomic(folder / name, partial(_write, data=text))
    for name in set(portable.FILES) - set(added):
        (folder / name).unlink(missing_ok=True)  # of another model, saved here before
    write_atomic(folder / WEIGHTS, lambda file: mx.save_safetensors(file, weights, {"format": "mlx"}))


def _write(file: BinaryIO, data: bytes) -> None:
    file.write(data)


def load(folder: str | Path | None = None, dtype: mx.Dtype | None = None) -> tuple[LanguageModel, Tokenizer]:
    """Read a model, by default the one that ships with the package.

    `dtype` None keeps the file's dtype on a GPU and widens to float32 on a CPU, which is faster there. Packed
    weights stay packed.
    """
    folder = PRETRAINED if folder is None else as_path("the model's folder", folder)
    _check_dtype(dtype)
    if not folder.is_dir():
        what = "is a file; a model is a folder" if folder.exists() else "no such model folder"
        raise InputError(f"{folder}: {what} with {CONFIG}, {WEIGHTS} and {TOKENIZER}")
    values = read_json(folder / CONFIG)
    fields, entry = portable.own_fields(values, str(folder / CONFIG))
    config = ModelConfig.from_dict(fields, str(folder / CONFIG))
    portable.check_code(folder)
    portable.check_one_file(folder / WEIGHTS)
    tokenizer, path = portable.load_tokenizer(folder, TOKENIZER)
    check_vocabulary(config, tokenizer, path)
    portable.check_token_ids(values, tokenizer, str(folder / CONFIG))
    model = LanguageModel(config)  # lazy: no weight of it is ever computed

    def fit(names):
        if entry is not None:
            quantize_as(model, entry, names, str(folder / CONFIG))
        return flat(model.parameters())

    weights = load_tensors(folder / WEIGHTS, fit)
    if dtype is None and not on_gpu():
        dtype = mx.float32
    if dtype is not None:
        weights = cast(weights, dtype)
    if not finite(weights):
        raise InputError(f"{folder / WEIGHTS}: holds NaN or infinity")
    model.update(tree_unflatten(list(weights.items())))
    mx.eval(model.parameters())
    return model, tokenizer


def _check_dtype(dtype: object) -> None:
    if dtype is not None and dtype not in [kind for name, (kind, _) in DTYPES.items() if name in FLOATS]:
        raise InputError(f"dtype must be float32, float16 or bfloat16 of mlx.core, got {repr(dtype)[:60]}")


def check_vocabulary(config: ModelConfig, tokenizer: Tokenizer, path: Path) -> None:
    """A token beyond the embedding is a read out of bounds, a row beyond the tokens has no text."""
    if tokenizer.vocab_size != config.vocab_size:
        raise InputError(f"{path}: has {tokenizer.vocab_size} tokens, the config says {config.vocab_size}")


def load_tensors(
    path: str | Path,
    like: Mapping[str, mx.array] | Callable[[Collection[str]], Mapping[str, mx.array]],
    floats: Collection[str] = FLOATS,
) -> dict[str, mx.array]:
    """The tensors of a safetensors file that holds exactly the names and shapes of `like`.

    `like` may be a function of the names in the file. Integers must have their dtype, floats one of `floats`.
    """
    with open_regular(path, MAX_WEIGHTS_BYTES) as file:
        still = unchanged(file)
        header = _read_header(file, path)
        _check_header(path, header, like(header.keys()) if callable(like) else like, floats)
        file.seek(0)
        try:
            # From the file that was checked: its path may lead elsewhere by now.
            tensors = mx.load(file, format="safetensors")
            mx.eval(tensors)
        except (RuntimeError, ValueError) as e:
            raise InputError(f"{path}: cannot be read ({' '.join(str(e).split())[:200]})") from e
        if not still():
            raise InputError(f"{path}: was written to while it was read")
    return flat(tensors) if isinstance(tensors, dict) else {}


def _check_header(path: str | Path, header: Header, like: Mapping[str, mx.array], floats) -> None:
    for kind, names in (("missing", set(like) - set(header)), ("unknown", set(header) - set(like))):
        if names:
            # As text that can be read: a name may hold anything.
            shown = ", ".join(sorted(ascii(n)[1:61].removesuffix("'") for n in names)[:3])
            raise InputError(f"{path}: {len(names)} tensors are {kind}, among them {shown}")
    for name, (dtype, shape) in header.items():
        if shape != tuple(like[name].shape):
            raise InputError(f"{path}: {name} has the shape {shape}, expected {tuple(like[name].shape)}")
        exact = [d for d, (kind, _) in DTYPES.items() if kind == like[name].dtype]
        allowed = floats if is_float(like[name]) else exact
        if dtype not in allowed:
            raise InputError(f"{path}: {name} has the dtype {dtype}, expected one of {', '.join(allowed)}")


def read_header(path: str | Path) -> Header:
    """name -> (dtype, shape) of a safetensors file, whose data must follow without gap or overlap."""
    with open_regular(path, MAX_WEIGHTS_BYTES) as file:
        return _read_header(file, path)


def _read_header(file: BinaryIO, path: str | Path) -> Header:
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        raise InputError(f"{path}: not a safetensors file, or cut short")
    header = parse_json(file.read(length), f"{path} (header)")
    if not isinstance(header, dict):
        raise InputError(f"{path}: the header is no JSON object")
    header.pop("__metadata__", None)
    entries, spans = {}, []
    for name, entry in header.items():
        entries[name], span = _read_entry(path, name, entry)
        spans.append(span)
    end = 0
    for first, last in sorted(spans):
        if first != end:
            raise InputError(f"{path}: the tensors' data overlap or leave gaps")
        end = last
    if end != size - 8 - length:
        raise InputError(f"{path}: has {size - 8 - length} bytes of data, the header says {end}: cut short?")
    return entries


def _read_entry(
    path: str | Path, name: str, entry: object
) -> tuple[tuple[str, tuple[int, ...]], tuple[int, int]]:
    def natural(values, count=None):
        return (
            isinstance(values, list)
            and (count is None or len(values) == count)
            and all(type(v) is int and 0 <= v < 2**48 for v in values)
        )

    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    values: list[Any] = [fields.get(k) for k in ("dtype", "shape", "data_offsets")]
    dtype, shape, offsets = values
    known = isinstance(dtype, str) and dtype in DTYPES and natural(shape) and natural(offsets, 2)
    if not known or len(shape) > 8:
        raise InputError(f"{path}: the entry of {name[:60]} is not a tensor of a known kind")
    count = 1
    for n in shape:
        count *= n
    if offsets[1] - offsets[0] != count * DTYPES[dtype][1]:
        raise InputError(f"{path}: the entry of {name[:60]} contradicts itself: {dtype} {shape} at {offsets}")
    return (dtype, tuple(shape)), (offsets[0], offsets[1])
