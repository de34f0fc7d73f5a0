"""How well models predict a token by how far into the text it stands, also beyond the length they trained on.

    python examples/study/positions.py runs/mine runs/twin --names hybrid softmax
    python examples/study/positions.py --draw            # the picture again, from the numbers that are kept

A model is a folder; without one, the model that ships. The text is the validation part of the standard
library of the Python that runs this, in windows of `--context` tokens. The numbers, nats per token in bins
whose ends double, go to text/positions.json and the picture to pictures/positions.png.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from language_run import state_bytes

from mlx_hla import data
from mlx_hla.losses import token_losses, windows
from mlx_hla.models import LanguageModel, load
from mlx_hla.progress import progress

HERE = Path(__file__).resolve().parent


def edges(context: int) -> list[int]:
    """Ends of the bins: 32, 64, 128, ... up to the context."""
    ends = [32]
    while ends[-1] * 2 < context:
        ends.append(ends[-1] * 2)
    return [*ends, context] if ends[-1] < context else [context]


def by_position(model: LanguageModel, stream: np.ndarray, context: int) -> list[list[float]]:
    """[end of the bin, mean nats per token, tokens]; of whole windows: all bins see the same texts."""
    nats, rows = np.zeros(context), 0
    whole = len(stream) // context * context + 1
    parts = list(windows(stream[: min(whole, len(stream))], 1, context))
    with progress(len(parts), "window") as one_more:
        for tokens, real in parts:
            if real.all():
                nats += np.array(token_losses(model, model.parameters(), mx.array(tokens)))[0]
                rows += 1
            one_more()
    out, start = [], 0
    for end in edges(context):
        out.append([end, float(nats[start:end].mean() / rows), rows * (end - start)])
        start = end
    return out


def measure(folder: str | None, name: str | None, context: int) -> dict[str, Any]:
    model, tokenizer = load(folder)
    corpus = data.load_corpus()
    bins = by_position(model, data.encode_texts(tokenizer, corpus.valid), context)
    return {
        "name": name or model.config.mixer_name,
        "parameters": model.num_parameters,
        "trained_on": model.config.context,
        "state_bytes": {
            n: state_bytes(model, model.parameters(), n) for n in (model.config.context, context)
        },
        "bins": bins,
    }


def draw(kept: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for m, colour in zip(kept["models"], ("#c2571a", "#2563a8", "#2f8559", "#7a3e9d"), strict=False):
        last = list(m["state_bytes"].items())[-1]
        label = f"{m['name']}: {last[1] / 1e6:.1f} MB after {int(last[0]):,} tokens"
        ends = [b[0] for b in m["bins"]]
        ax.plot(ends, [b[1] for b in m["bins"]], "o-", color=colour, label=label, markersize=4)
    ax.axvline(kept["models"][0]["trained_on"], color="#8a91a0", linestyle=":", linewidth=1)
    ax.text(
        kept["models"][0]["trained_on"],
        ax.get_ylim()[1],
        " trained on",
        va="top",
        color="#5d6472",
        fontsize=8,
    )
    ax.set_xscale("log", base=2)
    ax.set_xticks(ends, [f"{e:,}" for e in ends])
    ax.set_xlabel("tokens read, up to")
    ax.set_ylabel("nats per token")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("models", nargs="*", help="folders of models; none: the one that ships")
    p.add_argument("--names", nargs="+", default=[], help="what to call them")
    p.add_argument("--context", type=int, default=4096, help="tokens of a window (default: %(default)s)")
    p.add_argument("--out", type=Path, default=HERE, help="folder of text/ and pictures/")
    p.add_argument("--draw", action="store_true", help="measure nothing")
    args = p.parse_args()
    path = args.out / "text" / "positions.json"
    if not args.draw:
        names = [*args.names, *[None] * len(args.models or [None])]
        found = [measure(m, n, args.context) for m, n in zip(args.models or [None], names, strict=False)]
        text = f"validation part of the standard library of Python {platform.python_version()}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": text, "models": found}, indent=1) + "\n")
    kept = json.loads(path.read_text())
    for m in kept["models"]:
        print(m["name"], ", ".join(f"to {end}: {nats:.3f}" for end, nats, _ in m["bins"]), m["state_bytes"])
    draw(kept, args.out / "pictures" / "positions.png")


if __name__ == "__main__":
    main()
