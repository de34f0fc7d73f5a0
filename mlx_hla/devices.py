"""What depends on the device that MLX runs on."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import mlx.core as mx


def on_gpu() -> bool:
    return mx.default_device() == mx.gpu


def compute_dtype(name: str = "auto") -> mx.Dtype:
    """The dtype named, or what is fast here: bfloat16 on a GPU, float32 on a CPU."""
    if name == "auto":
        name = "bfloat16" if on_gpu() else "float32"
    return getattr(mx, name)


def compiled(function: Callable, *, shapeless: bool = False) -> Callable:
    """`mx.compile` wherever a call runs on a GPU. A CPU's would run the system's C++ compiler, for little."""
    on_a_gpu = mx.compile(function, shapeless=shapeless)

    @wraps(function)
    def call(*args):
        return (on_a_gpu if on_gpu() else function)(*args)

    return call
