"""Train a small model on the Python standard library, in about a minute on two CPU cores; then let it write.

    python examples/train.py                        the tiny preset, into runs/example
    python examples/train.py --preset small --out runs/mine --operator ahla

Takes every option of `mlx-hla train`; from Python the same is `mlx_hla.train.train(*preset("tiny", {}, {}))`.
"""

import sys

from mlx_hla.cli import main

if __name__ == "__main__":
    # Options given on the command line come later and win.
    sys.exit(main(["train", "--preset", "tiny", "--out", "runs/example", *sys.argv[1:]]))
