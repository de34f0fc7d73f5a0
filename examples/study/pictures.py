"""Draw the study's results.

    python examples/study/pictures.py                        # of examples/study/results, into .../pictures
    python examples/study/pictures.py results.json --out pictures

Two pictures of each task: the score of every arm with the range of its seeds and the baselines, and learning
curves (held-out score at the chosen learning rate, mean over the seeds). Where the number of pairs varies, a
third one has the score over it. Results of one task should come from one setting: see tables.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import results
from tables import ordered

HERE = Path(__file__).resolve().parent


def style(arm: str) -> dict[str, Any]:
    """The same colour for an arm in every picture, another dash for its options."""
    from arms import ARMS

    base, *options = arm.split("+")
    dashes = ["-", "--", ":", "-."]
    return {
        "color": plt.get_cmap("tab20")(list(ARMS).index(base)),
        "linestyle": dashes[len(options) % 4],
        "label": arm,
    }


def bars(ax: Any, found: list[dict[str, Any]]) -> None:
    found = ordered(found)[::-1]
    for i, r in enumerate(found):
        each, mean = r["test"]["each"], r["test"]["mean"]
        ax.barh(i, mean, color=style(r["arm"])["color"], alpha=0.6)
        ax.plot([min(each), max(each)], [i, i], color="black", linewidth=1)
        ax.plot(each, [i] * len(each), "k|", markersize=6)
    ax.set_yticks(range(len(found)), [r["arm"] for r in found])
    lines = {name: v for name, v in found[0]["baselines"].items() if isinstance(v, float)}
    for (name, value), dash in zip(lines.items(), ("-", "--", ":", "-."), strict=False):
        ax.axvline(value, color="grey", linestyle=dash, linewidth=1, label=f"{name} {value:.3g}")
    ax.set_xlabel(found[0]["metric"])
    ax.legend(fontsize=7, loc="lower right")


def curves(ax: Any, found: list[dict[str, Any]]) -> None:
    for r in ordered(found):
        chosen = r["lrs"].index(r["lr"])
        rows = [point[chosen] for point in r["curve"]["held_out"]]
        mean = [sum(x) / len(x) if None not in x else float("nan") for x in rows]
        ax.plot(r["curve"]["step"], mean, **style(r["arm"]))
    ax.set_xlabel("step")
    ax.set_ylabel(f"held-out {found[0]['metric']}")
    if found[0]["metric"] == "mse":
        ax.set_yscale("log")
    ax.legend(fontsize=7)


def by_size(ax: Any, found: list[dict[str, Any]]) -> None:
    for r in ordered(found):
        sizes = [int(s) for s in r["by_size"]]
        ax.plot(sizes, [v["mean"] for v in r["by_size"].values()], marker=".", **style(r["arm"]))
        low, high = ([f(v["each"]) for v in r["by_size"].values()] for f in (min, max))
        ax.fill_between(sizes, low, high, color=style(r["arm"])["color"], alpha=0.12)
    seen = [v["baselines"]["seen"] for v in found[0]["by_size"].values()]
    ax.plot([int(s) for s in found[0]["by_size"]], seen, ":", color="grey", label="most frequent value seen")
    ax.set_xlabel("pairs")
    ax.set_ylabel("accuracy")
    ax.set_ylim(0, 1.02)
    ax.legend(fontsize=7)


def draw(found: dict[str, Any], out: Path) -> list[Path]:
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for r in found.values():
        groups.setdefault((r["task"], r["model"]["head_dim"]), []).append(r)
    paths = []
    out.mkdir(parents=True, exist_ok=True)
    for (task, head_dim), members in groups.items():
        kinds = {"score": bars, "curves": curves}
        if len(members[0]["by_size"]) > 1:
            kinds["pairs"] = by_size
        for kind, plot in kinds.items():
            height = 4.2 if kind != "score" else 1.6 + 0.26 * len(members)
            fig, ax = plt.subplots(figsize=(6.4, height), layout="constrained")
            plot(ax, members)
            ax.set_title(f"{task}, D = {head_dim}", fontsize=10)
            paths.append(out / f"{task}-d{head_dim}-{kind}.png")
            fig.savefig(paths[-1], dpi=110)
            plt.close(fig)
    return paths


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("paths", type=Path, nargs="*", default=[HERE / "results"], help="folders and bundles")
    p.add_argument("--out", type=Path, default=HERE / "pictures", help="folder (default: %(default)s)")
    args = p.parse_args()
    found = results.read(*args.paths)
    if not found:
        p.error(f"no results in {' '.join(map(str, args.paths))}")
    print("\n".join(map(str, draw(found, args.out))))


if __name__ == "__main__":
    main()
