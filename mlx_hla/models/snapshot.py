"""What a model has read, as a value: to go on from later, more than once, or in another process.

A snapshot of a model whose state has a constant size is a file of that size, whatever the length of the
text. It is a safetensors file, bound to the weights that it belongs to by their digest: the tensor `about`
holds its version, the digest and the number of tokens as JSON. Nothing in it is unpickled or run.
"""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_hla.errors import InputError
from mlx_hla.files import as_path, write_atomic
from mlx_hla.models.io import load_tensors
from mlx_hla.models.lm import LanguageModel
from mlx_hla.nn.cache import arrays, fill
from mlx_hla.settings import parse_json
from mlx_hla.trees import cast, flat

VERSION = 1
ABOUT_BYTES = 512
LAST_TOKENS = 1024  # kept for the repetition penalty


class Snapshot(NamedTuple):
    """A text that was read: the layers' caches, the logits [1, V] of the token to come, its last tokens [n].

    length: tokens read in all. A snapshot is never changed: whoever goes on from it takes `fork()`.
    """

    cache: list[Any]
    logits: mx.array
    tokens: mx.array
    length: int

    def fork(self) -> list[Any]:
        """Caches to go on with; costs nothing, since arrays are never changed in place."""
        return [copy.copy(c) for c in self.cache]


def digest(model: LanguageModel) -> str:
    """The same for the same weights, whether they are held in bfloat16 or, widened, in float32."""
    h = hashlib.sha256()
    for name, a in sorted(flat(cast(model.parameters(), mx.bfloat16)).items()):
        data = np.array(a.view(mx.uint16) if a.dtype == mx.bfloat16 else a)
        h.update(f"{name} {a.dtype} {a.shape}\n".encode())
        h.update(data.tobytes())
    return h.hexdigest()


def save_snapshot(path: str | Path, model: LanguageModel, snapshot: Snapshot) -> None:
    """Write a snapshot; the file appears whole or not at all."""
    path = as_path("the state's file", path)
    _check_constant(model, path)
    if not isinstance(snapshot, Snapshot):
        raise InputError(f"only a Snapshot can be saved, got {type(snapshot).__name__}")
    about = json.dumps({"version": VERSION, "model": digest(model), "length": snapshot.length}).encode()
    tensors = _named([c.state for c in snapshot.cache])
    tensors |= {
        "about": mx.array(np.frombuffer(about.ljust(ABOUT_BYTES), np.uint8)),
        "logits": snapshot.logits,
        "tokens": _fixed(snapshot.tokens),
    }
    write_atomic(path, lambda file: mx.save_safetensors(file, tensors))


def load_snapshot(path: str | Path, model: LanguageModel) -> Snapshot:
    """Read a snapshot that this model's weights have written."""
    path = as_path("the state's file", path)
    _check_constant(model, path)
    cache = model.make_cache()
    model.features(mx.zeros((1, 1), mx.int32), cache)  # never computed: for its shapes alone
    template = [c.state for c in cache]
    like = _named(template)
    like |= {
        "about": mx.zeros((ABOUT_BYTES,), mx.uint8),
        "logits": mx.zeros((1, model.config.vocab_size)),
        "tokens": mx.zeros((LAST_TOKENS,), mx.uint32),
    }
    try:
        tensors = load_tensors(path, like)
        about = parse_json(np.array(tensors["about"]).tobytes(), "about")
    except InputError as e:
        raise InputError(f"{path}: no state of this model ({str(e).removeprefix(f'{path}: ')})") from None
    length = _length(about, digest(model), path)
    leaves = [tensors[f"cache.{i}"].astype(a.dtype) for i, a in enumerate(arrays(template))]
    for c, state in zip(cache, fill(template, leaves), strict=True):
        c.state = state
    tokens = tensors["tokens"][-min(length, LAST_TOKENS) :]
    if not mx.all(tokens < model.config.vocab_size).item():
        raise InputError(f"{path}: no state of this model (it holds tokens that the model has not)")
    if not all(mx.isfinite(a).all().item() for a in (*leaves, tensors["logits"])):
        raise InputError(f"{path}: holds NaN or infinity")
    return Snapshot(cache, tensors["logits"], tokens.astype(mx.int32), length)


def _named(states: list[Any]) -> dict[str, mx.array]:
    """The arrays of caches as the file has them; positions are counts, and no negative numbers."""
    stored = (a.astype(mx.uint32) if a.dtype == mx.int32 else a for a in arrays(states))
    return {f"cache.{i}": a for i, a in enumerate(stored)}


def _length(about: object, model: str, path: Path) -> int:
    """The number of tokens that `about` tells, if it is about a state of the model with this digest."""
    if not isinstance(about, dict) or set(about) != {"version", "model", "length"}:
        raise InputError(f"{path}: no state of a model")
    if about["version"] != VERSION:
        raise InputError(f"{path}: a state of version {ascii(about['version'])[:20]}; this reads {VERSION}")
    if about["model"] != model:
        raise InputError(f"{path}: the state of other weights: it goes on only with those that wrote it")
    length = about["length"]
    if type(length) is not int or not 1 <= length < 2**53:
        raise InputError(f"{path}: a state of {ascii(length)[:20]} tokens makes no sense")
    return length


def _fixed(tokens: mx.array) -> mx.array:
    """The last `LAST_TOKENS` tokens, zeros before them where there are fewer."""
    tokens = tokens[-LAST_TOKENS:].astype(mx.uint32)
    return mx.pad(tokens, [(LAST_TOKENS - tokens.size, 0)])


def _check_constant(model: LanguageModel, path: Path) -> None:
    if not isinstance(model, LanguageModel):
        raise InputError(f"a state belongs to a LanguageModel, got {type(model).__name__}")
    if not model.config.constant_state:
        raise InputError(f"{path}: softmax attention keeps every token: only constant states are saved")
