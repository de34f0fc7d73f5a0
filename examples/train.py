"""Train a small model on the Python standard library, on a CPU in under a minute, and let it write.

python examples/train.py runs/mine          the same as  mlx-hla train --preset tiny --out runs/mine
"""

import sys

from mlx_hla.generate import generate
from mlx_hla.models import load
from mlx_hla.train import preset, train

out = sys.argv[1] if len(sys.argv) > 1 else "runs/example"
result = train(*preset("tiny", {"operator": "hla2"}, {"out": out}))
if result.finished:
    print(repr(generate(*load(out), "def ", max_tokens=60)))
