"""Where mlx-lm finds this model: pip install 'mlx-hla[lm]'."""

from mlx_hla.mlx_lm import Model, ModelArgs  # noqa: F401
