"""Higher-order Linear Attention for Apple MLX."""

__version__ = "0.1.0"
