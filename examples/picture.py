"""Draw the README's picture: what second-order HLA keeps of a sequence, beside what softmax attention keeps.

    python examples/picture.py                     writes examples/assets/hla.png
    python examples/picture.py --out picture.svg   any format that matplotlib knows

Needs matplotlib. The matrices on the left are real: the state of `mlx_hla.hla2` after 24 random tokens, and
the keys and values of the same tokens. The bytes on the right are those of arrays that MLX and the operators
return.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import mlx.core as mx
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import FancyBboxPatch
from mlx.utils import tree_flatten

import mlx_hla

Q, K, V, O, INK, FAINT = "#c2571a", "#2563a8", "#2f8559", "#7a3e9d", "#1f2430", "#8a91a0"
CELLS, SEEN = 6, 24  # width of the drawn heads, tokens they have read
HEAD = 64  # width of the heads that the plot is about
FORMULA = {"fontsize": 12, "color": INK}
SMALL = {"fontsize": 9.5, "color": "#5d6472"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    here = Path(__file__).resolve().parent
    parser.add_argument(
        "--out", type=Path, default=here / "assets" / "hla.png", help="(default: %(default)s)"
    )
    out = parser.parse_args().out
    plt.rcParams.update(
        {"font.family": "DejaVu Sans", "mathtext.fontset": "dejavusans", "svg.hashsalt": "hla"}
    )
    figure, (left, right) = plt.subplots(1, 2, figsize=(13.2, 5), width_ratios=(1.75, 1))
    draw_states(left)
    draw_bytes(right)
    figure.tight_layout(w_pad=1.5)
    figure.savefig(out, dpi=110, facecolor="white", metadata={"Date": None} if out.suffix == ".svg" else None)
    print(f"{out}: {out.stat().st_size:,} bytes")


# --- left: the state picture


def draw_states(ax) -> None:
    ax.set(xlim=(0.4, 20), ylim=(0.2, 12.6), aspect="equal", anchor="NW")
    ax.axis("off")
    q, k, v = tokens()
    S, F = (np.array(a[0, 0]) for a in mlx_hla.hla2(q, k, v, decay=0.9)[1] if a is not None)

    title(ax, 12.1, "Second-order HLA keeps two matrices, whatever it has read")
    matrix(ax, S, (5.0, 6.9, 3.2, 3.2), K)
    matrix(ax, F, (12.7, 6.9, 3.2, 3.2), O)
    ax.text(6.6, 10.5, r"$S \leftarrow g\,S + k\,k^{\top}$", ha="center", **FORMULA)
    ax.text(14.3, 10.5, r"$F \leftarrow g^2 F + \tilde{k}\,v^{\top}$", ha="center", **FORMULA)
    ax.text(6.6, 6.3, r"$d \times d$, symmetric", ha="center", **SMALL)
    ax.text(14.3, 6.3, r"$d \times d_v$", ha="center", **SMALL)
    token(ax, (1.5, 9.5), "$k$", K, "key")
    token(ax, (1.5, 7.1), "$q$", Q, "query")
    token(ax, (10.4, 9.5), r"$\tilde{k}$", O, r"$S\,q$")
    token(ax, (10.4, 7.1), "$v$", V, "value")
    token(ax, (17.35, 10.4), "$q$", Q, None)
    token(ax, (19.1, 8.5), "$o$", INK, r"$F^{\top} q$")
    arrow(ax, (2.1, 9.5), (4.85, 9.0), K)
    arrow(ax, (2.1, 7.1), (4.85, 8.0), Q)
    arrow(ax, (8.35, 8.7), (9.75, 9.3), O)
    arrow(ax, (11.0, 9.5), (12.55, 9.0), O)
    arrow(ax, (11.0, 7.1), (12.55, 8.0), V)
    arrow(ax, (17.35, 9.75), (17.35, 8.65), Q)
    arrow(ax, (16.05, 8.5), (18.45, 8.5), INK)

    title(ax, 5.0, "Softmax attention keeps every key and every value")
    for row, (name, values, color) in enumerate((("$k$", k, K), ("$v$", v, V))):
        y = 2.7 - 2.0 * row
        token(ax, (1.5, y + 0.75), name, color, None)
        arrow(ax, (2.1, y + 0.75), (3.1, y + 0.75), color)
        matrix(ax, np.array(values[0, :, 0]).T, (3.3, y, 12.6, 1.5), color)
        ax.text(16.2, y + 0.75, "one column more\nfor every token", va="center", **SMALL)


def tokens():
    """q, k [1, T, 1, d], v [1, T, 1, d_v]."""
    mx.random.seed(4)
    return tuple(mx.random.normal((1, SEEN, 1, CELLS)) for _ in range(3))


def title(ax, y, text) -> None:
    ax.text(0.6, y, text, fontsize=12.5, fontweight="bold", color=INK, va="center")


def token(ax, at, name, color, below) -> None:
    x, y = at
    ax.add_patch(
        FancyBboxPatch(
            (x - 0.5, y - 0.5), 1, 1, boxstyle="round,pad=0.1,rounding_size=0.3", fc=color, ec="none"
        )
    )
    ax.text(x, y - 0.04, name, color="white", fontsize=14, ha="center", va="center")
    if below:
        ax.text(x, y - 1.0, below, color=color, fontsize=10, ha="center", va="center")


def arrow(ax, start, end, color) -> None:
    style = {"arrowstyle": "-|>", "color": color, "lw": 1.8, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", xy=end, xytext=start, arrowprops=style)


def matrix(ax, values, box, color) -> None:
    """The magnitudes of a matrix as shades of one colour."""
    x, y, width, height = box
    shades = LinearSegmentedColormap.from_list("shades", ["#f3f5f9", color])
    rows, columns = values.shape
    ax.pcolormesh(
        np.linspace(x, x + width, columns + 1),
        np.linspace(y + height, y, rows + 1),
        np.abs(values) / np.abs(values).max(),
        cmap=shades,
        edgecolors="white",
        linewidth=0.8,
    )


# --- right: bytes per head


def draw_bytes(ax) -> None:
    lengths = 2 ** np.arange(4, 18)
    ax.plot(lengths, [kv_bytes(int(T)) for T in lengths], color=INK, lw=2.2)
    states = {"1st order": mlx_hla.linear_attention, "2nd order": mlx_hla.hla2, "3rd order": mlx_hla.hla3}
    for (name, operator), color in zip(states.items(), (FAINT, O, K), strict=True):
        bytes_of = [state_bytes(operator, T) for T in (1, 64)]
        assert len(set(bytes_of)) == 1, "a state that grew"
        ax.plot(lengths, [bytes_of[0]] * len(lengths), color=color, lw=2.2)
        ax.text(lengths[-1] * 1.25, bytes_of[0], f"{name}, {size(bytes_of[0])}", color=color, va="center")
    last = kv_bytes(int(lengths[-1]))
    ax.text(lengths[-1] * 1.25, last, f"softmax, {size(last)}", color=INK, va="center")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set_xticks([16, 128, 1024, 8192, 131072], ["16", "128", "1k", "8k", "128k"])
    ticks = [2**e for e in range(12, 26, 3)]
    ax.set_yticks(ticks, [size(t) for t in ticks])
    ax.minorticks_off()
    ax.set_title("Bytes kept per head", fontsize=12.5, fontweight="bold", color=INK, loc="left", pad=12)
    note = f"heads of {HEAD}, float32 states, bfloat16 keys and values"
    ax.set_xlabel(f"tokens read\n({note})", color=INK)
    ax.grid(color="#e6e9ef", lw=0.8)
    ax.spines[["top", "right"]].set_visible(False)


def kv_bytes(T: int) -> int:
    """Keys and values of T tokens in bfloat16."""
    return 2 * mx.zeros((T, HEAD), mx.bfloat16).nbytes


def state_bytes(operator, T: int) -> int:
    """What an operator returns as its state after T tokens."""
    x = mx.zeros((1, T, 1, HEAD), mx.bfloat16)
    return sum(a.nbytes for _, a in tree_flatten(operator(x, x, x)[1]) if a is not None)


def size(n: int) -> str:
    return f"{n >> 20} MiB" if n >= 1 << 20 else f"{n >> 10} KiB"


if __name__ == "__main__":
    main()
