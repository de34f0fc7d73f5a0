"""What quantising the shipped model costs: bytes, nats per byte, tokens per second; and what a state costs.

    python examples/quantize.py                      about five minutes on two CPU cores
    python examples/quantize.py --valid-batches 2    a quick look

Weights are counted as `save` writes them. Nats per byte are those of the held-out files of the standard
library, in windows of the model's context; rows differ by the weights alone. Tokens per second are those of
one text after its prompt. The gates, convolutions and norms are never quantised; a layer whose width is no
multiple of the group is not either.

The second table has the bytes that a text of so many tokens leaves in the model, beside the keys and values
that softmax attention of the same sizes keeps; keys and values of either are in bfloat16, sums in float32.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from mlx_hla.process import prefer_openblas

prefer_openblas()  # before MLX is imported

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_unflatten  # noqa: E402

from mlx_hla import data  # noqa: E402
from mlx_hla.devices import compute_dtype  # noqa: E402
from mlx_hla.generate import read, stream_generate  # noqa: E402
from mlx_hla.losses import Scorer  # noqa: E402
from mlx_hla.models import load, save  # noqa: E402
from mlx_hla.models.io import WEIGHTS  # noqa: E402
from mlx_hla.models.quantization import quantized_modules  # noqa: E402
from mlx_hla.nn.cache import cache_bytes  # noqa: E402
from mlx_hla.sampling import Sampling  # noqa: E402
from mlx_hla.trees import flat  # noqa: E402

KINDS = {
    "16 bits (as shipped)": None,
    "8 bits": {"group_size": 64, "bits": 8},
    "4 bits": {"group_size": 64, "bits": 4},
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
}
LENGTHS = {"1,024": 1 << 10, "32,768": 1 << 15, "1,048,576": 1 << 20}


def speed(model, tokenizer, tokens: int) -> float:
    chunks = stream_generate(
        model, tokenizer, "def fibonacci(n):", max_tokens=tokens, sampling=Sampling(temperature=0)
    )
    return max(chunk.generation_tps for chunk in chunks)


def widened(model) -> dict:
    """The parameters of the model with packed weights as the numbers that they stand for: products of those
    are the same, and on a CPU many times as fast as of packed ones."""
    params = flat(model.parameters())
    for path, m in quantized_modules(model).items():
        packed = (params.pop(f"{path}.{name}", None) for name in ("weight", "scales", "biases"))
        params[f"{path}.weight"] = mx.dequantize(*packed, group_size=m.group_size, bits=m.bits, mode=m.mode)
    return tree_unflatten(list(params.items()))


def row(name: str, how: dict | None, scorer_of, tokens: int) -> str:
    model, tokenizer = load()
    if how is not None:
        width = how["group_size"]
        nn.quantize(
            model,
            **how,
            class_predicate=lambda _, m: hasattr(m, "to_quantized") and m.weight.shape[-1] % width == 0,
        )
    with tempfile.TemporaryDirectory() as folder:
        save(folder, model, tokenizer)
        size = (Path(folder) / WEIGHTS).stat().st_size
    loss = scorer_of(*load())(widened(model))
    return f"| {name} | {size / 1e6:.2f} | {loss:.4f} | {speed(model, tokenizer, tokens):.0f} |"


def states() -> list[str]:
    model, tokenizer = load(dtype=mx.bfloat16)
    config = model.config
    held = cache_bytes(read(model, [tokenizer.bos_id]).cache)
    rows = ["| tokens | state of this model, MB | softmax keys and values, MB |", "|--:|--:|--:|"]
    for name, length in LENGTHS.items():
        grown = 2 * 2 * length * config.num_layers * config.kv_heads * config.key_dim
        rows.append(f"| {name} | {held / 1e6:.2f} | {grown / 1e6:,.2f} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--valid-batches", type=int, default=0, help="batches of windows at most; 0: all")
    parser.add_argument("--batch-size", type=int, default=8, help="windows at a time")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to write for the speed")
    args = parser.parse_args()
    corpus = data.load_corpus()

    def scorer_of(model, tokenizer):
        return Scorer(
            model,
            data.encode_texts(tokenizer, corpus.valid),
            data.bytes_per_token(tokenizer),
            batch_size=args.batch_size,
            context=model.config.context,
            dtype=compute_dtype(),
            max_batches=args.valid_batches,
        )

    print(f"MLX {mx.__version__}, {mx.default_device()}; {corpus.describe()}\n")
    print("| weights | MB | nats per byte | tokens/s |\n|---|--:|--:|--:|")
    for name, how in KINDS.items():
        print(row(name, how, scorer_of, args.tokens), flush=True)
    print()
    print("\n".join(states()))


if __name__ == "__main__":
    main()
