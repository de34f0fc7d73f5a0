"""`python -m mlx_hla` is `mlx-hla`."""

import sys

from mlx_hla.cli import main

sys.exit(main())
