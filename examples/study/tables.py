"""Print the study's results as Markdown tables.

    python examples/study/tables.py                                   # of examples/study/results
    python examples/study/tables.py more/results.json --tasks alias join

The first table of a task has a row for each arm: the score of fresh test sequences at the learning rate that
the held-out ones chose, mean ± standard deviation over the seeds and the range, parameters, bytes of state in
all layers, and how the learning rates did. A second one has the score by the number of pairs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import results

HERE = Path(__file__).resolve().parent
DIGITS = 3


def score(said: dict[str, Any]) -> str:
    return f"{said['mean']:.{DIGITS}f} ± {said['std']:.{DIGITS}f}"


def rates(one: dict[str, Any]) -> str:
    """The held-out mean over the seeds at every learning rate."""

    def mean(row: list[float | None]) -> str:
        return "–" if None in row else f"{sum(row) / len(row):.{DIGITS}f}"

    return ", ".join(f"{lr:g}: {mean(row)}" for lr, row in zip(one["lrs"], one["held_out"], strict=True))


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def ordered(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Best first."""
    return sorted(found, key=lambda r: r["test"]["mean"] * (1 if r["metric"] == "mse" else -1))


def heads(one: dict[str, Any]) -> str:
    return ", ".join(dict.fromkeys(f"{m['heads']}×{m['head_dim']}" for m in one["model"]["mixers"]))


def main_table(found: list[dict[str, Any]]) -> list[str]:
    metric = found[0]["metric"]
    columns = ["arm", metric, "range", "lr", "heads", "parameters", "state bytes", "held-out by lr"]
    lines = [row(columns), row(["---"] * len(columns))]
    for r in ordered(found):
        each = r["test"]["each"]
        lines.append(
            row(
                [
                    f"`{r['arm']}`",
                    score(r["test"]),
                    f"{min(each):.{DIGITS}f}–{max(each):.{DIGITS}f}",
                    f"{r['lr']:g}",
                    heads(r),
                    f"{r['model']['parameters']:,}",
                    f"{sum(m['state_bytes'] for m in r['model']['mixers']):,}",
                    rates(r),
                ]
            )
        )
    for name, value in found[0]["baselines"].items():
        if isinstance(value, float):
            lines.append(row([f"*{name}*", f"{value:.{DIGITS}f}", *[""] * (len(columns) - 2)]))
    return lines


def size_table(found: list[dict[str, Any]]) -> list[str]:
    sizes = [s for s in found[0]["by_size"] if all(s in r["by_size"] for r in found)]
    lines = [row(["pairs", *sizes]), row(["---"] * (len(sizes) + 1))]
    for r in ordered(found):
        lines.append(row([f"`{r['arm']}`", *(score(r["by_size"][s]) for s in sizes)]))
    for name in ("chance", "seen"):
        values = [found[0]["by_size"][s]["baselines"][name] for s in sizes]
        lines.append(row([f"*{name}*", *(f"{v:.{DIGITS}f}" for v in values)]))
    return lines


def tables(found: dict[str, Any], tasks: list[str] | None = None) -> str:
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for r in found.values():
        if not tasks or r["task"] in tasks:
            groups.setdefault((r["task"], r["model"]["head_dim"]), []).append(r)
    out = []
    for (task, head_dim), members in groups.items():
        one = members[0]
        shape, training = one["model"], one["training"]
        steps = " or ".join(sorted({str(r["training"]["steps"]) for r in members}))
        about = ", ".join(f"{k} {v}" for k, v in one["about"].items() if v is not None)
        out.append(f"### {task}, D = {head_dim}\n")
        out.append(
            f"{about}; width {shape['dims']}; {training['batch']} sequences a step; {steps} steps; "
            f"{training['seeds']} seeds; MLX {one['mlx']} on {one['device']}.\n"
        )
        out += [*main_table(members), ""]
        if one["by_size"]:
            out += [*size_table(members), ""]
    return "\n".join(out)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("paths", type=Path, nargs="*", default=[HERE / "results"], help="folders and bundles")
    p.add_argument("--tasks", nargs="+", help="default: all")
    args = p.parse_args()
    found = results.read(*args.paths)
    if not found:
        p.error(f"no results in {' '.join(map(str, args.paths))}")
    print(tables(found, args.tasks))


if __name__ == "__main__":
    main()
