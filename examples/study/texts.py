"""Print the language models' results as Markdown tables, and draw some of them.

    python examples/study/texts.py                  # of text/runs.json and text/small-runs.json
    python examples/study/texts.py --draw           # and pictures/small-models.png, long-context.png

A row is an arm: nats per byte of held-out text, mean and range over the seeds at the learning rate that the
first seed chose, and bytes of state after a text as long as the context.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean, median
from typing import Any

HERE = Path(__file__).resolve().parent


def read(name: str) -> list[dict[str, Any]]:
    return json.loads((HERE / "text" / name).read_text(encoding="utf-8"))


def best_rate(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs at the rate at which the first seed ended lowest."""
    first = min(r["seed"] for r in runs)
    lr = min((r for r in runs if r["seed"] == first), key=lambda r: r["nats_per_byte"])["lr"]
    return [r for r in runs if r["lr"] == lr]


def groups(runs: list[dict[str, Any]], *keys: str) -> dict[tuple, list[dict[str, Any]]]:
    out: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for r in runs:
        out[tuple(r[k] for k in keys)].append(r)
    return out


def loss(runs: list[dict[str, Any]]) -> float:
    return mean(r["nats_per_byte"] for r in runs)


def row(name: str, runs: list[dict[str, Any]], *more: str) -> str:
    each = sorted(r["nats_per_byte"] for r in runs)
    spread = f"{each[0]:.4f}–{each[-1]:.4f}" if len(each) > 1 else "one seed"
    return f"| {' | '.join([name, f'{loss(runs):.4f}', spread, *more])} |"


def small_table(runs: list[dict[str, Any]]) -> list[str]:
    lines = []
    for (size, context, steps), members in groups(runs, "size", "context", "steps").items():
        by_arm = {arm: best_rate(own) for (arm,), own in groups(members, "arm").items()}
        lines += [f"### {size}, context {context:,}, {steps:,} steps", ""]
        lines += ["| mixers | loss | range | rate | state, bytes |", "|---|---|---|---|---|"]
        for arm, own in sorted(by_arm.items(), key=lambda item: loss(item[1])):
            lines.append(row(arm, own, f"{own[0]['lr']:g}", f"{own[0]['state_bytes']:,}"))
        lines.append("")
    return lines


def mix_table(runs: list[dict[str, Any]]) -> list[str]:
    """Arms with two heads of 128, on the library and the packages."""
    names = {"shipped": "window+hla2", "win256-hla2-D128": "window+hla2", "twin": "softmax"}
    same = [r for r in runs if r["text"] == "mix" and r["model"].get("num_heads") == 2]
    by_arm = defaultdict(list)
    for r in same:
        by_arm[names.get(r["arm"], r["arm"])].append(r)
    lines = ["### small, context 1,024, 1,600 steps", "", "| mixers | loss | range |", "|---|---|---|"]
    return lines + [row(arm, own) for arm, own in sorted(by_arm.items(), key=lambda item: loss(item[1]))]


def plots() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def colour(arm: str) -> str:
    return "tab:grey" if "softmax" in arm else "tab:blue" if "window" in arm else "tab:orange"


def draw_small(runs: list[dict[str, Any]], path: Path, context: int = 1024, steps: int = 300) -> None:
    members = [r for r in runs if (r["size"], r["context"], r["steps"]) == ("mini", context, steps)]
    by_arm = {arm: best_rate(own) for (arm,), own in groups(members, "arm").items()}
    found = sorted(((arm, own) for arm, own in by_arm.items() if len(own) > 1), key=lambda x: -loss(x[1]))
    kept = {arm: own[0]["state_bytes"] / 1e3 for arm, own in found}
    usual = median(kept.values())
    figure, ax = plots().subplots(figsize=(6.4, 1.4 + 0.26 * len(found)), layout="constrained")
    names = []
    for i, (arm, own) in enumerate(found):
        each = [r["nats_per_byte"] for r in own]
        ax.barh(i, loss(own), color=colour(arm), alpha=0.6)
        ax.plot([min(each), max(each)], [i, i], "k-", linewidth=1)
        ax.plot(each, [i] * len(each), "k|", markersize=6)
        names.append(arm if abs(kept[arm] / usual - 1) < 0.05 else f"{arm}, {kept[arm]:,.0f} kB")
    ax.set_yticks(range(len(found)), names)
    ax.set_xlim(left=1.1)
    ax.set_xlabel("nats per byte; three seeds")
    title = f"0.94 million parameters, context {context:,}; {usual:.0f} kB of state but where it is said"
    ax.set_title(title, fontsize=9)
    figure.savefig(path, dpi=110)


def draw_long(runs: list[dict[str, Any]], path: Path, context: int = 16384, steps: int = 1600) -> None:
    """Nats per token in the stretch of tokens that ends at each power of two; an arm's other rates dashed."""
    members = [r for r in runs if (r["size"], r["context"], r["steps"]) == ("small", context, steps)]
    figure, ax = plots().subplots(figsize=(6.4, 3.4), layout="constrained")
    styles = {"softmax": "tab:grey", "window": "tab:orange", "window+hla2": "tab:blue"}
    best = [r for (_,), own in groups(members, "arm").items() for r in best_rate(own)]
    for r in sorted(members, key=lambda r: r["nats_per_byte"]):
        ends = [int(end) for end in r["nats_per_token_to"]]
        ax.plot(ends, list(r["nats_per_token_to"].values()), "o-" if r in best else "--", ms=4,
                color=styles.get(r["arm"]),
                label=f"{r['arm']}, rate {r['lr']:g}: {r['nats_per_byte']:.3f} nats per byte")  # fmt: skip
    ax.set_xscale("log", base=2)
    ax.set_xticks(ends, [f"{end:,}" for end in ends])
    ax.set_xlabel("tokens read, to")
    ax.set_ylabel("nats per token")
    ax.legend(fontsize=7)
    ax.set_ylim(top=ax.get_ylim()[1] + 0.7)  # room for the legend
    ax.set_title(f"5.9 million parameters, context {context:,}, {steps:,} steps, one seed", fontsize=9)
    figure.savefig(path, dpi=110)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--draw", action="store_true", help="draw the pictures; needs matplotlib")
    args = p.parse_args()
    small = read("small-runs.json")
    print("\n".join([*mix_table(read("runs.json")), "", *small_table(small)]))
    if args.draw:
        draw_small(small, HERE / "pictures" / "small-models.png")
        draw_long(small, HERE / "pictures" / "long-context.png")


if __name__ == "__main__":
    main()
