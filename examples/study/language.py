"""Train language models that differ in their mixers alone, and keep what each one learns and costs.

    python examples/study/language.py --arms hla2 softmax --seeds 0 1 --out runs/language
    python examples/study/language.py --arms 'wide={"operator": "hla2", "num_heads": 2}' --context 4096
    python examples/study/language.py --size tiny --context 64 --steps 20 --max-bytes 400000 --arms all

A run is an arm, a seed, a learning rate and a context. It ends in a JSON file of its own in --out, written
whole or not at all, so that the same command goes on where it was ended; --bundle puts all of them into one
file. With --choose the first seed is trained at every rate, the others at the best of those alone, for each
arm and context by itself. With --workers N, N processes side by side, each with all runs of an arm and a
context: what a device compiles for the first serves the others. A run starts only if one as long as the
longest so far would still end within --minutes, and what runs then is ended. Nothing of the models is saved.

Every run of a size sees the same text and tokens, at any context as many a step (--tokens), and those of a
seed and a context the same batches. An arm is a change to the size's ModelConfig: one of the table in
language_run.py, or NAME=JSON.

What is kept: nats per byte of the validation text; nats per token by position in the window, in bins of 64
(end, mean, count); the training loss at the ends of blocks of steps, and tokens per second as the median of
the blocks; the peak of memory in training; parameters; bytes of the caches after a text of that length.
"""

# ruff: noqa: E402
from mlx_hla.process import prefer_openblas

prefer_openblas()  # before MLX is imported

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev

import mlx.core as mx
from language_run import ARMS, SIZES, Run, arms_of, configure, kept_text, prepare, take

from mlx_hla.errors import InputError
from mlx_hla.files import read_bytes, write_atomic


def write(path: Path, value: object) -> None:
    write_atomic(path, lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))


def folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"{out}: cannot write into it ({e.strerror})") from None


def read(out: Path) -> dict[str, dict]:
    """The results of a folder by key."""
    return {f.stem: json.loads(read_bytes(f, 1 << 26)) for f in sorted(out.glob("*-c*-n*.json"))}


def plan(args: argparse.Namespace) -> list[tuple[Run, dict]]:
    """The runs that have no result yet."""
    arms = arms_of(args.arms)
    for arm in arms.values():
        configure(args.size, arm, context=max(args.context))  # a wrong arm is refused before any is trained
    rest = itertools.product(args.context, args.seeds, args.lrs, arms)
    runs = [Run(args.size, arm, seed, lr, context, args.steps) for context, seed, lr, arm in rest]
    done = read(Path(args.out))
    runs = [r for r in runs if r.key not in done and (args.only is None or r.key in args.only)]
    wanted = [(r, arms[r.arm]) for r in runs]
    for run, _ in wanted:
        if run.context > args.tokens:
            raise InputError(f"tokens must be at least the context, {run.context}, got {args.tokens}")
    return wanted


def alone(runs: list[tuple[Run, dict]], args: argparse.Namespace, until: float) -> None:
    """One run after another, in this process."""
    mx.set_cache_limit(2 << 30)  # several processes share a GPU
    text, longest = prepare(args), 0.0
    print(text.about, flush=True)
    for run, arm in runs:
        start = time.time()
        if args.choose and run.seed != args.seeds[0] and run.lr != best_rate(run, args):
            continue
        if start + longest > until:
            print(f"{run.key}: no time left", flush=True)
            continue
        result = take(run, arm, text, args, until)
        if result is None:
            print(f"{run.key}: ended by the time", flush=True)
            continue
        write(Path(args.out) / f"{run.key}.json", result)
        longest = max(longest, time.time() - start)
        print(line(run.key, [result]), flush=True)


def best_rate(run: Run, args: argparse.Namespace) -> float | None:
    """The rate at which the first seed of this arm and context ended lowest; None before all have ended."""
    done = read(Path(args.out))
    first = [done.get(run._replace(seed=args.seeds[0], lr=lr).key) for lr in args.lrs]
    losses = {r["lr"]: r["nats_per_byte"] for r in first if r and r["nats_per_byte"] is not None}
    return min(losses, key=losses.__getitem__) if all(first) and losses else None


def side_by_side(runs: list[tuple[Run, dict]], args: argparse.Namespace, until: float) -> None:
    """Up to --workers processes, each with an arm's runs of a context; with --devices, CUDA's by turns."""
    text = args.text or str(kept_text(args))  # what all of them read
    groups: dict[tuple[str, int], list[Run]] = {}
    for run, _ in runs:
        groups.setdefault((run.arm, run.context), []).append(run)
    waiting = list(groups.values())
    busy: dict[subprocess.Popen, tuple[Run, int]] = {}
    try:
        while waiting or busy:
            for process in [p for p in busy if p.poll() is not None]:
                run, _ = busy.pop(process)
                if process.returncode:
                    print(f"{run.arm}, {run.context}: failed with status {process.returncode}", flush=True)
            if time.time() > until and waiting:
                print(f"{sum(map(len, waiting))} runs: no time left", flush=True)
                waiting = []
            if waiting and len(busy) < args.workers:
                group = waiting.pop(0)
                place = min(set(range(args.workers)) - {p for _, p in busy.values()})
                environment = dict(os.environ)
                if args.devices:
                    environment["CUDA_VISIBLE_DEVICES"] = str(place % args.devices)
                minutes = f"{max(0.001, (until - time.time()) / 60)}"
                own = ["--workers", "1", "--minutes", minutes, "--text", text]  # the last of a flag counts
                own += ["--only", *(run.key for run in group)]
                command = [sys.executable, __file__, *args.argv, *own]
                busy[subprocess.Popen(command, env=environment)] = group[0], place
            elif time.time() > until + 30:
                break
            else:
                time.sleep(0.1)
    finally:
        for process in busy:
            process.terminate()
            process.wait()


def line(name: str, results: list[dict]) -> str:
    """A row of the table: the mean and the deviation over seeds, and what does not depend on them."""
    nats = [r["nats_per_byte"] for r in results if r["nats_per_byte"] is not None]
    spread = f" ± {stdev(nats):.4f}" if len(nats) > 1 else ""
    value = f"{mean(nats):.4f}{spread}" if nats else "diverged"
    last = results[-1]
    return (
        f"{name:40} {value:>17} nats/byte  {len(nats)}/{len(results)} seeds  "
        f"{last['tokens_per_second']:>11,.0f} tokens/s  {last['peak_memory'] / 1e9:6.2f} GB  "
        f"{last['parameters']:>11,} parameters  "
        f"{last['state_bytes']:>11,} bytes of state"
    )


def table(results: dict[str, dict]) -> list[str]:
    groups: dict[str, list[dict]] = {}
    for r in results.values():
        name = Run(*(r[f] for f in Run._fields)).key.replace(f"-s{r['seed']}-", "-")
        groups.setdefault(name, []).append(r)
    return [line(name, group) for name, group in groups.items()]


def make_parser() -> argparse.ArgumentParser:
    about, _, more = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    names = ", ".join(ARMS)
    add(
        "--arms",
        nargs="+",
        default=["hla2", "softmax"],
        help=f"all, {names}, or NAME=JSON (default: hla2 softmax)",
    )
    add("--size", choices=SIZES, default="small", help="of the models (default: small)")
    add("--context", nargs="+", type=int, default=[1024], help="tokens of a window (default: 1024)")
    add("--steps", type=int, default=1600, help="optimiser steps (default: 1600)")
    add("--tokens", type=int, default=32768, help="tokens of a step (default: 32768)")
    add("--accumulate", type=int, default=1, help="batches that a step is cut into (default: 1)")
    add("--seeds", nargs="+", type=int, default=[0], help="of weights and batches (default: 0)")
    add("--lrs", nargs="+", type=float, default=[1.5e-3], help="learning rates (default: 1.5e-3)")
    add("--choose", action="store_true", help="seeds after the first at their arm's best rate alone")
    add("--dropout", type=float, default=0.0, help="rate (default: 0)")
    add("--dtype", default="auto", help="bfloat16, float32 or auto, by the device (default: auto)")
    add("--checkpoint-blocks", action="store_true", help="compute blocks again in the backward pass")
    add("--data", help="folder or file of text; by default the Python standard library")
    add("--extra", help="more text to train on; none of it validates")
    add("--repeat", type=int, default=1, help="times that --data stands in the training text (default: 1)")
    add("--max-bytes", type=int, help="read no more of --data than this")
    add("--tokenizer", help="a tokenizer.model; by default one is learnt and kept in --out")
    add("--text", help="text-*.npz of an earlier --out, in the place of all that")
    add("--out", default="runs/language", help="folder of the results (default: runs/language)")
    add("--bundle", help="write all results of --out into this file too")
    add("--minutes", type=float, default=float("inf"), help="end by then (default: no limit)")
    add("--workers", type=int, default=1, help="runs at a time (default: 1)")
    add("--devices", type=int, default=0, help="CUDA devices for the workers; 0: as it is (default: 0)")
    add("--only", nargs="+", help="only the runs of these names, of those asked for")
    return parser


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = make_parser().parse_args(argv, argparse.Namespace(argv=argv))
    until = time.time() + 60 * args.minutes
    try:
        for name in ("steps", "tokens", "accumulate", "workers"):
            if getattr(args, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(args, name)}")
        if runs := plan(args):
            folder(Path(args.out))  # before hours of training, not after them
            (side_by_side if args.workers > 1 else alone)(runs, args, until)
        results = read(Path(args.out))
        if args.bundle:
            write(Path(args.bundle), results)
        if args.only is None:
            print(*table(results), sep="\n")
    except InputError as e:
        sys.stderr.write(f"language.py: error: {e}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
