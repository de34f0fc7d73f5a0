"""One run of `language.py`: the arms, the text, a model trained on it, and what is measured.

An arm is a change to the size's ModelConfig, with two keys of its own: "matrices" 1 gives every HLAttention
half of the heads at twice the width, for operators that keep one matrix a head where HLA2 keeps two, so that
states are equal; "mixer" "gdn" puts the gated delta rule of gdn.py in its place.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from gdn import GDNAttention

from mlx_hla import data
from mlx_hla.devices import compute_dtype
from mlx_hla.errors import InputError
from mlx_hla.files import write_atomic
from mlx_hla.losses import Scorer, lent, token_losses, windows
from mlx_hla.models import LanguageModel, ModelConfig
from mlx_hla.nn import HLAttention
from mlx_hla.nn.cache import cache_bytes
from mlx_hla.progress import progress
from mlx_hla.settings import parse_json
from mlx_hla.tokenizer import Tokenizer, train_tokenizer
from mlx_hla.train import TrainConfig
from mlx_hla.train.step import Trainer
from mlx_hla.trees import cast, flat

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 512, "dims": 32, "num_layers": 2, "num_heads": 2, "hidden_dims": 64},
    "mini": {"vocab_size": 1024, "dims": 128, "num_layers": 4, "num_heads": 2, "hidden_dims": 352},
    "small": {},  # the shipped model's: 5.9 million parameters
    "medium": {"vocab_size": 8192, "dims": 512, "num_layers": 12, "num_heads": 8, "hidden_dims": 1408},
    "large": {"vocab_size": 16384, "dims": 768, "num_layers": 12, "num_heads": 12, "hidden_dims": 2048},
}
ARMS: dict[str, dict[str, Any]] = {
    "hla2": {"operator": "hla2"},
    "ahla": {"operator": "ahla"},
    "hla3": {"operator": "hla3"},
    "mixed": {"operator": "mixed", "coefficients": "learned"},
    "readout": {"operator": "readout", "coefficients": "learned"},
    "first": {"operator": "first", "matrices": 1},
    "gdn": {"operator": "first", "matrices": 1, "mixer": "gdn"},
    "softmax": {"operator": "softmax"},
    "window": {"layers": ("window",)},
    "window+first": {"layers": ("window", "first"), "matrices": 1},
    "window+gdn": {"layers": ("window", "first"), "matrices": 1, "mixer": "gdn"},
    "window+hla2": {"layers": ("window", "hla2")},
    "window+ahla": {"layers": ("window", "ahla")},
    "window+hla3": {"layers": ("window", "hla3")},
    "window+mixed": {"layers": ("window", "mixed"), "coefficients": "learned"},
    "window+readout": {"layers": ("window", "readout"), "coefficients": "learned"},
}
BIN, BLOCKS = 64, 40


class Run(NamedTuple):
    size: str
    arm: str
    seed: int
    lr: float
    context: int
    steps: int

    @property
    def key(self) -> str:
        return f"{self.size}-{self.arm}-s{self.seed}-lr{self.lr:g}-c{self.context}-n{self.steps}"


class Text(NamedTuple):
    train: np.ndarray  # tokens
    valid: np.ndarray
    sizes: np.ndarray  # bytes of each token
    about: str


def arms_of(texts: list[str]) -> dict[str, dict[str, Any]]:
    """The arms by name, of names, of NAME=JSON, or of "all"."""
    out: dict[str, dict[str, Any]] = {}
    for text in texts:
        name, given, changes = text.partition("=")
        if given:
            value = parse_json(changes.encode(), name)
            if not isinstance(value, dict) or not name or "/" in name:
                raise InputError(f"an arm must be NAME=JSON object, got {text[:60]!r}")
            out[name] = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
        elif name == "all":
            out |= ARMS
        elif name in ARMS:
            out[name] = ARMS[name]
        else:
            raise InputError(f"arms must be all, {', '.join(ARMS)} or NAME=JSON, got {name[:60]!r}")
    return out


def configure(size: str, arm: dict[str, Any], **fields: Any) -> ModelConfig:
    changes = {k: v for k, v in arm.items() if k not in ("matrices", "mixer")}
    if unknown := changes.keys() - ModelConfig.__dataclass_fields__.keys():
        raise InputError(f"this mlx_hla has no ModelConfig.{min(unknown)}")
    return ModelConfig(**{**SIZES[size], **changes, **fields})


def build(config: ModelConfig, arm: dict[str, Any], seed: int) -> LanguageModel:
    model = LanguageModel(config, seed)
    mixer, matrices = arm.get("mixer"), arm.get("matrices", 2)
    if mixer not in (None, "gdn"):
        raise InputError(f"mixer must be gdn, got {mixer!r}")
    if mixer is None and matrices == 2:
        return model
    options: dict[str, Any] = {
        n: getattr(config, n) for n in ("conv_size", "decay", "output_norm", "output_gate")
    }
    heads = config.num_heads * matrices // 2
    options["head_dim"] = config.key_dim * config.num_heads // heads
    for layer in model.layers:
        if type(layer.mixer) is not HLAttention:  # a window stays one
            continue
        old = flat(layer.mixer.parameters())
        if mixer is None:
            layer.mixer = HLAttention(config.dims, heads, operator=layer.mixer.operator, **options)
        else:
            layer.mixer = GDNAttention(config.dims, heads, **options)
        new = flat(layer.mixer.parameters())
        same = {k: old[k] for k in new.keys() & old.keys() if new[k].shape == old[k].shape}
        layer.mixer.load_weights(list(same.items()), strict=False)  # begun as every model's
    return model


# --- the text


def prepare(args: argparse.Namespace) -> Text:
    """The text as tokens: learned and encoded once for --out, and kept there; or what --text names."""
    if args.text is not None:
        return read_text(Path(args.text))
    return read_text(kept_text(args))


def read_text(path: Path) -> Text:
    with np.load(path, allow_pickle=False) as arrays:
        return Text(arrays["train"], arrays["valid"], arrays["sizes"], str(arrays["about"]))


def kept_text(args: argparse.Namespace) -> Path:
    """The file in --out that holds the text, written unless it is there."""
    corpus = data.load_corpus(args.data, max_bytes=args.max_bytes, extra=args.extra, repeat=args.repeat)
    vocab = ModelConfig(**SIZES[args.size]).vocab_size
    out = Path(args.out)
    path = Path(args.tokenizer or out / f"text-{corpus.digest[:12]}-{vocab}.model")
    if args.tokenizer is None and not path.exists():
        tokenizer = train_tokenizer(corpus.train, vocab)
        write_atomic(path, lambda file: file.write(tokenizer.proto))
    tokenizer = Tokenizer.load(path)
    name = hashlib.sha256(tokenizer.proto + corpus.digest.encode()).hexdigest()[:12]
    kept = out / f"text-{name}.npz"
    if not kept.exists():
        parts = {part: data.encode_texts(tokenizer, getattr(corpus, part)) for part in ("train", "valid")}
        parts |= {"sizes": data.bytes_per_token(tokenizer), "about": np.array(corpus.describe())}
        write_atomic(kept, lambda file: np.savez(file, **parts))
    return kept


# --- one run


def by_position(model: LanguageModel, params: dict, text: Text, batch: int, context: int) -> list:
    """[end, mean nats, tokens] for each bin of 64 positions of the windows of the validation text."""
    nats, count = np.zeros(context), np.zeros(context, np.int64)
    for tokens, real in windows(text.valid, batch, context):
        losses = np.array(token_losses(model, params, mx.array(tokens)))
        nats[: real.shape[1]] += (losses * real).sum(0)
        count[: real.shape[1]] += real.sum(0)
    out = []
    for start in range(0, context, BIN):
        end = min(start + BIN, context)
        if seen := int(count[start:end].sum()):
            out.append([end, float(nats[start:end].sum() / seen), seen])
    return out


class _Trainer(Trainer):
    """A trainer that begins again with other weights: what was compiled for it serves them too."""

    def __init__(self, model: LanguageModel, settings: TrainConfig):
        super().__init__(model, settings)
        self.model, self.scorer = model, None

    def begin(self, model: LanguageModel, settings: TrainConfig) -> None:
        fresh = Trainer(model, settings)
        self.settings, self.params, self.state = settings, fresh.params, fresh.state


_kept: dict[tuple, _Trainer] = {}


def _trainer(model: LanguageModel, settings: TrainConfig, key: tuple) -> _Trainer:
    """A trainer of these weights; the one before, where only seed, rate and steps differ."""
    if key not in _kept:
        _kept.clear()
        _kept[key] = _Trainer(model, settings)
    _kept[key].begin(model, settings)
    return _kept[key]


def state_bytes(model: LanguageModel, params: dict, context: int) -> int:
    cache = model.make_cache()
    with lent(model, params):
        mx.eval(model.features(mx.zeros((1, context), mx.int32), cache))
    return cache_bytes(cache)


def take(run: Run, arm: dict[str, Any], text: Text, args: argparse.Namespace, until: float) -> dict | None:
    """Train and measure one run; None if the time was over first."""
    config = configure(run.size, arm, context=run.context, vocab_size=len(text.sizes))
    batch = max(1, args.tokens // (run.context * args.accumulate))
    settings = TrainConfig(
        seed=run.seed,
        steps=run.steps,
        batch_size=batch,
        accumulate=args.accumulate,
        lr=run.lr,
        warmup=max(1, run.steps // 16),
        dropout=args.dropout,
        dtype=args.dtype,
        checkpoint_blocks=args.checkpoint_blocks,
    )
    mx.clear_cache()
    mx.reset_peak_memory()
    start = time.perf_counter()
    model = build(config, arm, run.seed)
    trainer = _trainer(model, settings, (run.size, run.arm, run.context, args.accumulate, args.dropout))
    model = trainer.model
    batches = data.Batches(text.train, batch, run.context, run.seed)
    block, losses, times = max(1, run.steps // BLOCKS), [], [start]
    with progress(run.steps, "step") as one_more:
        for step in range(run.steps):
            parts = [batches[step * args.accumulate + i] for i in range(args.accumulate)]
            loss, _ = trainer.step(step, parts)
            one_more()
            if (step + 1) % block == 0 or step + 1 == run.steps:
                losses.append([step + 1, loss.item()])  # waits for the block
                times.append(time.perf_counter())
                if not np.isfinite(losses[-1][1]) or time.time() > until:
                    break
    diverged = not np.isfinite(losses[-1][1])
    if losses[-1][0] < run.steps and not diverged:
        return None
    per_step = batch * args.accumulate * run.context
    counts = np.diff([0] + [n for n, _ in losses]) * per_step
    speeds = (counts / np.diff(times))[min(2, len(counts) - 1) :]  # the first blocks compile and warm up
    dtype = compute_dtype(args.dtype)
    result: dict[str, Any] = {
        **run._asdict(),
        "config": config.__dict__,
        "changes": arm,
        "text": text.about,
        "train_tokens": len(text.train),
        "tokens_per_step": per_step,
        "batch_size": batch,
        "dtype": str(dtype),
        "device": str(mx.default_device()),
        "losses": losses if not diverged else losses[:-1],
        "diverged": diverged,
        "tokens_per_second": statistics.median(speeds.tolist()),
        "peak_memory": mx.get_peak_memory(),
        "parameters": model.num_parameters,
        "nats_per_byte": None,
    }
    params = cast(trainer.params, dtype)
    result["state_bytes"] = state_bytes(model, params, run.context)
    if not diverged:
        options = {"batch_size": batch, "context": run.context, "dtype": dtype}
        if trainer.scorer is None:
            trainer.scorer = Scorer(model, text.valid, text.sizes, **options)
        result["nats_per_byte"] = trainer.scorer(trainer.params)
        result["positions"] = by_position(model, params, text, batch, run.context)
    return {**result, "seconds": time.perf_counter() - start}
