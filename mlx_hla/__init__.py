"""Higher-order Linear Attention (arXiv 2510.27258) for Apple MLX."""

from __future__ import annotations

import importlib

TYPE_CHECKING = False  # as in `typing`, whose import would be a third of this package's
if TYPE_CHECKING:
    from typing import Any

    from . import ops  # noqa: F401
    from .ops import *  # noqa: F403

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The operators and modules, at their first use.

    MLX may be what is missing, or has to wait for a choice of BLAS: the command line starts without it.
    """
    if name.startswith("_") and name != "__all__":
        raise AttributeError(f"module 'mlx_hla' has no attribute {name!r}")
    from importlib.util import find_spec

    if find_spec(f"mlx_hla.{name}"):
        return importlib.import_module(f"mlx_hla.{name}")
    try:
        ops = importlib.import_module("mlx_hla.ops")
    except ImportError as e:
        from mlx_hla.errors import about_import

        raise ImportError(about_import(e)) from e
    if name == "__all__":
        return ["__version__", *ops.__all__]
    if name not in ops.__all__:
        raise AttributeError(f"module 'mlx_hla' has no attribute {name!r}")
    globals()[name] = value = getattr(ops, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
