"""In-context linear regression: pairs of a vector and its value, and what linear algebra makes of them.

    x_i = C^½ z_i ,  y_i = w·x_i + σ e_i ,  z, w, e standard normal,  tr C = 1

C has eigenvalues spread evenly in log over the factor `condition`, in axes of their own for each sequence, so
no constant can undo it. Tokens alternate: (x_i, 0, 1) asks for y_i, (0, y_i, 0) tells it. Errors are squares,
the answer's variance being 1: to say 0 has the error 1 + σ². Ridge at λ = σ² is the best possible. The score
is the error in the second half, where least squares is sane.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from generators import Batch, Task


def regress(d: int = 8, N: int = 32, condition: float = 10.0, noise: float = 0.1, name="regress") -> Task:
    T, F = 2 * N, d + 2

    def make(rng: np.random.Generator, n: int, size: Any = None) -> Batch:
        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape, dtype=np.float32)

        spread = condition ** (-np.arange(d) / max(d - 1, 1))
        xs = normal(n, N, d) * np.sqrt(spread / spread.sum()).astype(np.float32)
        if condition != 1:
            xs = xs @ _reflections(normal(d, n, d))
        ys = (xs @ normal(n, d, 1))[..., 0] + np.float32(noise) * normal(n, N)
        x = np.zeros((n, T, F), np.float32)
        x[:, ::2, :d], x[:, 1::2, d], x[:, ::2, d + 1] = xs * np.sqrt(d), ys, 1
        y, w = np.zeros((n, T, 1), np.float32), np.zeros((n, T), np.float32)
        y[:, ::2, 0], w[:, ::2] = ys, 1
        return Batch(x, y, w, w * (np.arange(T) >= N))

    def baselines(batch: Batch) -> dict[str, Any]:
        return scores(batch, d, noise)

    about = {"dims": d, "pairs": N, "condition": condition, "noise": noise}
    return Task(name, T, F, 1, make, baselines, real=True, about=about)


def _reflections(u: np.ndarray) -> np.ndarray:
    """Products `[n, d, d]` of reflections along u `[m, n, d]`."""
    out = np.broadcast_to(np.eye(u.shape[-1], dtype=u.dtype), (*u.shape[1:], u.shape[-1]))
    for one in u / np.linalg.norm(u, axis=-1, keepdims=True):
        out = out - 2 * (out @ one[..., None]) * one[:, None]
    return out


def scores(batch: Batch, d: int, noise: float) -> dict[str, Any]:
    """Mean squared errors of ridge, least squares, one step of gradient descent (first order), and 0.

    first: η_t Σ y_j x_j·x, with the η_t that is best on this very batch.
    """
    xs = batch.x[:, ::2, :d].astype(np.float64) / np.sqrt(d)
    ys = batch.y[:, ::2, 0].astype(np.float64)
    N = xs.shape[1]
    outer = np.cumsum(xs[..., :, None] * xs[..., None, :], axis=1)
    moment = np.cumsum(xs * ys[..., None], axis=1)
    error = {name: np.zeros((N, len(xs))) for name in ("ridge", "least_squares", "first", "zero")}
    for t in range(N):
        x, y = xs[:, t], ys[:, t]
        S, m = (
            (outer[:, t - 1], moment[:, t - 1]) if t else (np.zeros((len(xs), d, d)), np.zeros((len(xs), d)))
        )
        ridge = np.linalg.solve(S + noise**2 * np.eye(d), m[..., None])[..., 0]
        shortest = (np.linalg.pinv(S, rcond=1e-9, hermitian=True) @ m[..., None])[..., 0]
        one = (m * x).sum(-1)
        one = one * ((one @ y) / max(one @ one, 1e-30))
        for name, said in {
            "ridge": (ridge * x).sum(-1),
            "least_squares": (shortest * x).sum(-1),
            "first": one,
            "zero": np.zeros_like(y),
        }.items():
            error[name][t] = (said - y) ** 2
    out: dict[str, Any] = {name: float(e[N // 2 :].mean()) for name, e in error.items()}
    out["by_place"] = {name: [float(v) for v in e.mean(1)] for name, e in error.items()}
    return out
