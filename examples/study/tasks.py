"""Train arms on a synthetic task and keep what they reach, one small JSON file for each arm.

    python examples/study/tasks.py recall                                  # every arm; hours on a CPU
    python examples/study/tasks.py alias --arms first gdn ahla hla2+curriculum
    python examples/study/tasks.py regress --arms readout --steps 3 --batch 2     # does it run at all

An arm is one of arms.ARMS with options after a `+`, see arms.py. Every arm is trained from `--seeds` starts
at each of `--lrs`, all of them at once in one graph; the learning rate is chosen by the mean over the seeds
on held-out sequences, and the score is that of fresh ones. A result that is there is not computed again.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import generators
import mlx.core as mx
import numpy as np
import results
from arms import ARMS, Model, parse, sizes
from ensemble import Ensemble, Settings, class_loss, square_loss
from generators import Batch, Task
from regression import regress

TASKS = {
    "regress": regress,
    "regress_iso": partial(regress, condition=1.0, name="regress_iso"),
    "alias": generators.alias,
    "join": generators.join,
    "recall": generators.recall,
    "hop3": generators.hop3,
    "match3": generators.match3,
    "copy": generators.copy,
    "parity": generators.parity,
    "s3": generators.s3,
    "s5": generators.s5,
}
# Streams of random numbers: training, held-out and test sequences never come from the same one.
TRAIN, HELD_OUT, TEST = 1, 2, 3
BLOCK = 25  # steps whose sequences are drawn at once
LEARNT = 0.3  # nats: a curriculum goes on


def score(outputs: mx.array, batch: Batch, real: bool) -> np.ndarray:
    """`[K]`: accuracy, or the mean squared error, of outputs `[K, n, T, O]` at the places of the score."""
    y, s = mx.array(batch.y), mx.array(batch.s)
    right = ((outputs - y) ** 2).mean(axis=-1) if real else outputs.argmax(axis=-1) == y
    return np.array((right * s).sum(axis=(1, 2)) / s.sum())


def evaluate(
    ensemble: Ensemble,
    task: Task,
    stream: tuple[int, ...],
    n: int,
    at_once: int,
    size: int | None = None,
    members: slice = slice(None),
) -> tuple[np.ndarray, dict[str, Any]]:
    """(scores `[K]` on n sequences of a stream, the baselines on the same ones)."""
    batch = task.make(np.random.default_rng(stream), n, size)
    weights, scores = [], []
    for i in range(0, n, at_once):
        part = Batch(*(a[i : i + at_once] for a in batch))
        scores.append(score(ensemble.outputs(mx.array(part.x), members), part, task.real))
        weights.append(part.s.sum())
    return np.average(scores, axis=0, weights=weights), task.baselines(batch)


class Pairs:
    """How many pairs the lists of the members' training sequences have.

    None: as the task draws them. `fixed`: all. `curriculum`: from 1 to a member's own limit, which starts at
    2 and grows by one whenever its loss over a block of steps is below LEARNT.
    """

    def __init__(self, task: Task, options: frozenset[str], members: int):
        if options & {"curriculum", "fixed"} and "pairs" not in task.about:
            raise ValueError(f"{task.name} has no number of pairs to choose")
        self.most = task.about.get("pairs")
        self.fixed = "fixed" in options
        self.limits = np.full(members, min(2, self.most)) if "curriculum" in options else None

    def draw(self, rng: np.random.Generator, shape: tuple[int, int, int]) -> Any:
        """Numbers for BLOCK × members × batch sequences, one after the other."""
        if self.limits is not None:
            return rng.integers(1, self.limits[None, :, None] + 1, shape).reshape(-1)
        return self.most if self.fixed else None

    def learn(self, losses: list[mx.array]) -> None:
        if self.limits is not None and losses:
            learnt = np.mean([np.array(x) for x in losses], axis=0) < LEARNT
            self.limits = np.minimum(self.limits + learnt, self.most)


def spread(values: np.ndarray) -> dict[str, Any]:
    each = [float(v) for v in values]
    return {
        "mean": float(np.mean(each)),
        "std": float(np.std(each, ddof=1)) if len(each) > 1 else 0.0,
        "each": each,
    }


def run(task: Task, arm: str, args: argparse.Namespace) -> dict[str, Any]:
    """One job: train, choose the learning rate, test."""
    started, options = time.perf_counter(), parse(arm)[1]
    layers = args.layers or max(task.layers, 2 if "window" in options else 1)
    steps = args.steps * (2 if "steps" in options else 1)
    form = {"inputs": task.inputs, "outputs": task.outputs, "real": task.real}
    form |= {"layers": layers, "dims": args.dims, "head_dim": args.head_dim}
    members = [(lr, seed) for lr in args.lrs for seed in range(args.seeds)]
    K, (lrs, seeds) = len(members), zip(*members, strict=True)
    settings = Settings(steps, weight_decay=args.weight_decay, clip=args.clip)
    ensemble = Ensemble(
        lambda: Model(arm, **form), seeds, lrs, square_loss if task.real else class_loss, settings,
        mapped=not args.loop, compiled=args.compile,
    )  # fmt: skip
    measured = sizes(ensemble.model)

    best = np.nanargmin if task.real else np.nanargmax
    pairs, recent = Pairs(task, options, K), []
    curve: dict[str, list] = {"step": [], "loss": [], "held_out": []}
    rng = np.random.default_rng((TRAIN, args.data_seed))
    for t in range(1, steps + 1):
        if (t - 1) % BLOCK == 0:
            mx.eval(recent)  # so that no more than a block of steps is ever under way
            pairs.learn(recent)
            shape, recent = (BLOCK, K, args.batch), []
            drawn = task.make(rng, BLOCK * K * args.batch, pairs.draw(rng, shape))
            block = [a.reshape(*shape, *a.shape[1:]) for a in drawn[:3]]
        losses = ensemble.train(t, *(mx.array(a[(t - 1) % BLOCK]) for a in block))
        recent.append(losses)
        if t % max(1, steps // args.points) == 0 or t == steps:
            held, _ = evaluate(ensemble, task, (HELD_OUT, args.data_seed), args.held_out, args.at_once)
            curve["step"].append(t)
            curve["loss"].append(_table(np.array(losses), args))
            curve["held_out"].append(_table(held, args))
    trained = time.perf_counter() - started

    held_out = np.array(curve["held_out"][-1], np.float64)
    means = np.array([np.mean(row) if np.isfinite(row).all() else np.nan for row in held_out])
    if np.isnan(means).all():
        raise ValueError(f"{arm} on {task.name}: every learning rate diverged")
    chosen = int(best(means))
    mine = slice(chosen * args.seeds, (chosen + 1) * args.seeds)
    stream = (TEST, args.data_seed)
    test, baselines = evaluate(ensemble, task, stream, args.test, args.at_once, None, mine)
    by_size = {}
    for size in task.sizes:
        values, other = evaluate(
            ensemble, task, (*stream, size), max(1, args.test // 2), args.at_once, size, mine
        )
        by_size[size] = spread(values) | {"baselines": other}
    return {
        "task": task.name,
        "arm": arm,
        "metric": "mse" if task.real else "accuracy",
        "test": spread(test),
        "baselines": baselines,
        "by_size": by_size,
        "curriculum": None if pairs.limits is None else pairs.limits[mine].tolist(),
        "lr": args.lrs[chosen],
        "lrs": args.lrs,
        "held_out": curve["held_out"][-1],
        "curve": curve,
        "about": task.about | {"T": task.T, "classes": None if task.real else task.outputs},
        "model": form | measured,
        "training": {"steps": steps, "batch": args.batch, "seeds": args.seeds} | vars(settings),
        "seconds": {"train": round(trained, 2), "all": round(time.perf_counter() - started, 2)},
        "device": f"{mx.device_info().get('device_name', 'CPU')}" if _gpu() else "CPU",
        "mlx": mx.__version__,
    }


def _gpu() -> bool:
    return mx.default_device() == mx.gpu


def _table(members: np.ndarray, args: argparse.Namespace) -> list[list[float | None]]:
    """[K] as learning rates by seeds, None where a member is no number any more."""
    rows = members.reshape(len(args.lrs), args.seeds).astype(np.float64)
    return [[float(f"{v:.5g}") if math.isfinite(v) else None for v in row] for row in rows]


def task_of(name: str) -> Task:
    """`recall`, or with numbers of its own `recall,P=16,names=48`: the arguments of the function in TASKS."""
    base, *given = name.split(",")
    if base not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {base!r}")
    pairs = (one.partition("=") for one in given)
    try:
        options = {key: float(value) if "." in value else int(value) for key, _, value in pairs}
        return replace(TASKS[base](**options), name=name)
    except TypeError as e:
        raise ValueError(f"task {name!r}: {e}") from None


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("task", help=f"{', '.join(TASKS)}; with numbers of its own: recall,P=16,names=48 or regress,d=4")
    add("--arms", nargs="+", default=list(ARMS), help="default: all of arms.ARMS, without options")
    add("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    add("--again", action="store_true", help="compute also what is there")
    add("--dims", type=int, default=64, help="width (default: %(default)s)")
    add("--head-dim", type=int, default=16, help="D of an arm with two matrices (default: %(default)s)")
    add("--layers", type=int, help="default: the task's own: 1 for alias and join, else 2; hybrids 2")
    add("--steps", type=int, default=2000, help="default: %(default)s")
    add("--batch", type=int, default=64, help="sequences of each member and step (default: %(default)s)")
    add("--lrs", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2], help="default: %(default)s")
    add("--seeds", type=int, default=3, help="of each learning rate (default: %(default)s)")
    add("--data-seed", type=int, default=0, help="default: %(default)s")
    add("--weight-decay", type=float, default=0.01, help="default: %(default)s")
    add("--clip", type=float, default=1.0, help="norm of a member's gradient (default: %(default)s)")
    add("--held-out", type=int, default=256, help="sequences that choose the rate (default: %(default)s)")
    add("--test", type=int, default=1024, help="fresh sequences of the score (default: %(default)s)")
    add("--at-once", type=int, default=128, help="sequences of one evaluation (default: %(default)s)")
    add("--points", type=int, default=10, help="of the learning curve (default: %(default)s)")
    add("--compile", action="store_true", help="mx.compile the step: fewer launches, seconds to compile")
    add("--loop", action="store_true", help="one member after the other, not mx.vmap")
    return p


def main() -> None:
    p = parser()
    args = p.parse_args()
    try:
        for arm in args.arms:
            parse(arm)
        task = task_of(args.task)
    except ValueError as e:
        p.error(str(e))
    mx.set_cache_limit(4 << 30)  # several processes share a GPU
    for arm in args.arms:
        path = args.out / f"{results.key(task.name, arm, args.head_dim)}.json"
        if path.exists() and not args.again:
            print(f"{path.stem}: is there", flush=True)
            continue
        try:
            result = run(task, arm, args)
        except ValueError as e:
            if len(args.arms) == 1:
                raise SystemExit(f"{path.stem}: {e}") from None
            print(f"{path.stem}: left out: {e}", flush=True)
            continue
        results.write(path, result)
        test, seconds = result["test"], result["seconds"]["all"]
        print(
            f"{path.stem}: {result['metric']} {test['mean']:.4f} ± {test['std']:.4f} at lr {result['lr']:g}, "
            f"{seconds:.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
