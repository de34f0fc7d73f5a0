"""Higher-order Linear Attention (arXiv 2510.27258) for Apple MLX."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import ops  # noqa: F401
    from .ops import *  # noqa: F403

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The operators, at their first use: MLX may be what is missing, and the command line has to say so."""
    if name.startswith("__") and name != "__all__":
        raise AttributeError(f"module 'mlx_hla' has no attribute {name!r}")
    try:
        public = list(getattr(importlib.import_module("mlx_hla.ops"), "__all__", ()))
    except ImportError as e:
        from mlx_hla.errors import about_import

        raise ImportError(about_import(e)) from e
    if name == "__all__":
        return ["__version__", *public]
    if name in public:
        globals()[name] = getattr(globals()["ops"], name)
    if name in globals():
        return globals()[name]
    raise AttributeError(f"module 'mlx_hla' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
