"""Higher-order Linear Attention (arXiv 2510.27258) for Apple MLX."""

from . import ops
from .ops import *  # noqa: F403

__version__ = "0.1.0"
__all__ = ["__version__", *ops.__all__]
