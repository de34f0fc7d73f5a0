"""Time the training of language models that differ in their mixers alone, one at a time on the device.

    python examples/study/throughput.py --size small --arms softmax window+hla2 --context 1024 4096 16384
    python examples/study/throughput.py --size large --arms softmax hla2 --context 2048 --json times.json

A row is an arm and a context: tokens per second as the median over `--repeats` blocks of `--steps` steps,
after two steps that compile; that rate as a multiple of the first arm's at the same context; the peak of
memory, less what was there before; seconds until the second step was done. A step has `--tokens` tokens,
drawn at random: what a token costs does not depend on which it is. Arms are those of language.py, or
NAME=JSON.
"""

# ruff: noqa: E402
from mlx_hla.process import prefer_openblas

prefer_openblas()  # before MLX is imported

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
from language_run import ARMS, SIZES, arms_of, build, configure
from mlx.utils import tree_flatten
from results import read, write

from mlx_hla.devices import compute_dtype
from mlx_hla.errors import InputError
from mlx_hla.train import TrainConfig
from mlx_hla.train.step import Trainer


def measure(size: str, arm: dict[str, Any], context: int, args: argparse.Namespace) -> dict[str, Any]:
    batch = max(1, args.tokens // context)
    config = configure(size, arm, context=context)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    settings = TrainConfig(batch_size=batch, dropout=0.0, dtype=args.dtype)
    trainer = Trainer(build(config, arm, 0), settings)
    tokens = mx.random.randint(0, config.vocab_size, (batch, context + 1), key=mx.random.key(0))
    began = time.perf_counter()
    for step in range(2):
        mx.eval(trainer.step(step, [tokens]))
    first, step, times = time.perf_counter() - began, 2, []
    for _ in range(args.repeats):
        start = time.perf_counter()
        for _ in range(args.steps):
            last = trainer.step(step, [tokens])
            step += 1
        mx.eval(last, trainer.params)
        times.append((time.perf_counter() - start) / args.steps)
    seconds = statistics.median(times)
    return {
        "parameters": sum(x.size for _, x in tree_flatten(trainer.params)),
        "context": context,
        "batch_size": batch,
        "seconds_per_step": seconds,
        "tokens_per_second": batch * context / seconds,
        "first_seconds": first,
        "peak_memory": mx.get_peak_memory() - before,
        "dtype": str(compute_dtype(args.dtype)),
        "device": mx.device_info().get("device_name", "CPU") if mx.default_device() == mx.gpu else "CPU",
    }


def make_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--size", choices=SIZES, default="small", help="of the models (default: small)")
    add("--arms", nargs="+", default=["softmax", "window+hla2"], help=f"{', '.join(ARMS)}, or NAME=JSON")
    add("--context", nargs="+", type=int, default=[1024, 4096, 16384], help="default: 1024 4096 16384")
    add("--tokens", type=int, default=32768, help="of a step (default: 32768)")
    add("--steps", type=int, default=10, help="of a block (default: 10)")
    add("--repeats", type=int, default=3, help="blocks (default: 3)")
    add("--dtype", default="auto", help="bfloat16, float32 or auto, by the device (default: auto)")
    add("--json", type=Path, help="keep the figures in this file too, beside those that it has")
    return p


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    found: dict[str, dict[str, Any]] = {}
    try:
        arms = arms_of(args.arms)
        for context in args.context:
            base = None
            for name, arm in arms.items():
                key = f"{args.size}-{name}-c{context}"
                r = found[key] = {"arm": name, **measure(args.size, arm, context, args)}
                base = base or r["tokens_per_second"]
                print(
                    f"{key:32} {r['parameters']:>12,} parameters  {r['tokens_per_second']:>11,.0f} tokens/s  "
                    f"{r['tokens_per_second'] / base:5.2f}x  {r['peak_memory'] / 1e9:6.2f} GB  "
                    f"first {r['first_seconds']:5.1f} s",
                    flush=True,
                )
    except InputError as e:
        sys.stderr.write(f"throughput.py: error: {e}\n")
        return 1
    finally:
        if args.json and found:
            write(args.json, read(args.json) | found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
