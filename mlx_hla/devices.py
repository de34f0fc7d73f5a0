"""What depends on the device that MLX runs on."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx


def on_cpu() -> bool:
    return mx.default_device() == mx.cpu


def compute_dtype(name: str = "auto") -> mx.Dtype:
    """The dtype named, or what is fast here: bfloat16 on a GPU, float32 on a CPU."""
    if name == "auto":
        name = "float32" if on_cpu() else "bfloat16"
    return getattr(mx, name)


def compiled(function: Callable) -> Callable:
    """`mx.compile` on a GPU. On a CPU it would run the system's C++ compiler for seconds, for little."""
    return function if on_cpu() else mx.compile(function)
