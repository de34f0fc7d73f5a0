"""What makes a folder of ours one of mlx-lm's as well, and what of mlx-lm's own is taken on the way back.

`save` adds to config.json the keys of `entries`, and beside it the files of `files`: `hla.py`, one import
that mlx-lm runs under its `--trust-remote-code`, and the tokenizer in the format of transformers.

`load` takes folders that mlx-lm wrote: `convert` and `fuse` drop `tokenizer.model` and add the keys
`quantization` and `quantization_config`. All other keys are refused, and `hla.py` is compared, never run.
A model with full softmax attention in it stays what it is, one of this package only.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mlx_hla.errors import InputError
from mlx_hla.files import read_bytes
from mlx_hla.models.config import ModelConfig
from mlx_hla.models.tokenizer_json import sentencepiece_model, tokenizer_config, tokenizer_json
from mlx_hla.settings import parse_json, read_json
from mlx_hla.tokenizer import Tokenizer

MODEL_TYPE, MODEL_FILE = "hla", "hla.py"
TOKENIZER_JSON, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
FILES = (MODEL_FILE, TOKENIZER_JSON, TOKENIZER_CONFIG)
# Once released, a text stays one that `check_code` takes.
SOURCE = b'''"""Where mlx-lm finds this model: pip install 'mlx-hla[lm]'."""

from mlx_hla.mlx_lm import Model, ModelArgs  # noqa: F401
'''
QUANTIZATION, QUANTIZATION_COPY = "quantization", "quantization_config"
# Keys of config.json that are not fields of `ModelConfig`.
ADDED = ("model_type", "model_file", "bos_token_id", "eos_token_id", QUANTIZATION, QUANTIZATION_COPY)
MAX_TOKENIZER_BYTES = 32 * 2**20


def entries(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """The keys to add to config.json."""
    if not config.constant_state:
        return {}
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    return {"model_type": MODEL_TYPE, "model_file": MODEL_FILE, **ids}


def files(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, bytes]:
    """The files to add by their names; without a tokenizer where transformers has none with its tokens."""
    if not config.constant_state:
        return {}
    out = {MODEL_FILE: SOURCE}
    if (content := tokenizer_json(tokenizer.proto)) is not None:
        compact = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        out[TOKENIZER_JSON] = compact.encode()
        out[TOKENIZER_CONFIG] = (json.dumps(tokenizer_config(), indent=2) + "\n").encode()
    return out


def own_fields(values: object, name: str) -> tuple[object, object]:
    """The fields of `ModelConfig` in a parsed config.json, and its entry of quantisation or None."""
    if not isinstance(values, dict):
        return values, None  # `ModelConfig.from_dict` says what is wrong
    for key, ours in (("model_type", MODEL_TYPE), ("model_file", MODEL_FILE)):
        if values.get(key) not in (None, ours):
            raise InputError(
                f"{name}: {key} must be {ours}, got {repr(values[key])[:60]}: not a model of mlx-hla"
            )
    entry = values.get(QUANTIZATION)
    if QUANTIZATION_COPY in values and values[QUANTIZATION_COPY] != entry:
        raise InputError(f"{name}: {QUANTIZATION_COPY} is not what {QUANTIZATION} is")
    return {key: value for key, value in values.items() if key not in ADDED}, entry


def check_code(folder: Path) -> None:
    """Refuse a folder with code that is not ours: none of it runs here, but mlx-lm or transformers would."""
    path = folder / MODEL_FILE
    if os.path.lexists(path) and read_bytes(path, 1 << 16) != SOURCE:
        raise InputError(
            f"{path}: not the file that mlx-hla writes, and mlx-lm would run it: remove it first"
        )
    path = folder / TOKENIZER_CONFIG
    if os.path.lexists(path) and "auto_map" in str(read_json(path)):
        raise InputError(f"{path}: names code to run (auto_map): not a folder of mlx-hla")


def check_token_ids(values: object, tokenizer: Tokenizer, name: str) -> None:
    """Refuse a config whose ids of the first and the last token are not the tokenizer's."""
    for key, ours in (("bos_token_id", tokenizer.bos_id), ("eos_token_id", tokenizer.eos_id)):
        if isinstance(values, dict) and values.get(key, ours) not in (ours, [ours]):
            raise InputError(f"{name}: {key} must be the tokenizer's {ours}, got {repr(values[key])[:60]}")


def check_one_file(weights: Path) -> None:
    """mlx-lm writes more than 5 GB in several files."""
    if not weights.exists() and any(weights.parent.glob("model-*-of-*.safetensors")):
        raise InputError(f"{weights}: missing; weights in several files are not read here, only in one")


def load_tokenizer(folder: Path, own: str) -> tuple[Tokenizer, Path]:
    """The tokenizer of a folder and its file: `own`, the SentencePiece model, or else tokenizer.json."""
    path = folder / TOKENIZER_JSON
    if os.path.lexists(folder / own) or not path.exists():
        return Tokenizer.load(folder / own), folder / own
    content = parse_json(read_bytes(path, MAX_TOKENIZER_BYTES), str(path))
    return Tokenizer(sentencepiece_model(content, str(path)), str(path)), path
