"""Stream a continuation of a prompt; takes every option of `mlx-hla generate`.

    python examples/generate.py --prompt "def fibonacci(n):" --temperature 0.6 --max-tokens 150
    echo "class Stack:" | python examples/generate.py --json

From Python: `mlx_hla.models.load` and `mlx_hla.generate.stream_generate`, as the README shows.
"""

import sys

from mlx_hla.cli import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
