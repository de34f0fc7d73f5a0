"""What the dense, serial and gradient oracles do to their inputs before any operator runs.

All conventions of the public contract meet here, once: float64, `scale` on the queries, one decay per token
and key-value head, masked tokens as no-ops, resets at segment borders.
"""

from typing import NamedTuple

import numpy as np


class Inputs(NamedTuple):
    """q [B, T, Hq, D], k [B, T, Hkv, D], v [B, T, Hkv, V] (V + 1 if normalising), g [B, T, Hkv],
    real and reset [B, T] bool."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    g: np.ndarray
    real: np.ndarray
    reset: np.ndarray


def prepare(q, k, v, *, scale=1.0, decay=None, mask=None, segment_ids=None, normalize=False) -> Inputs:
    """Bring the public arguments to the form that every oracle runs on.

    `scale` multiplies the queries: op(q, k, v, scale=s) = op(s q, k, v).  A masked token gets q = k = v = 0
    and g = 1.  At a reset, g = 0.  With `normalize`, a column of ones joins v: the denominator.
    """
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
    if not (q.ndim == k.ndim == v.ndim == 4):
        raise ValueError(f"[reference] q, k, v must be [B, T, H, D], got {q.shape}, {k.shape}, {v.shape}")
    B, T, Hq, D = q.shape
    Hkv = k.shape[2]
    if k.shape != (B, T, Hkv, D) or v.shape[:3] != (B, T, Hkv) or Hq % Hkv:
        raise ValueError(f"[reference] q, k, v do not fit together: {q.shape}, {k.shape}, {v.shape}")
    real = np.ones((B, T), bool) if mask is None else np.asarray(mask).astype(bool)
    reset = reset_points(real, segment_ids)
    g = np.broadcast_to(1.0 if decay is None else np.asarray(decay, np.float64), (B, T, Hkv))
    if normalize:
        v = np.concatenate([v, np.ones((B, T, Hkv, 1))], axis=-1)
    keep = real[..., None]
    q, k, v = (np.where(keep[..., None], x, 0.0) for x in (scale * q, k, v))
    g = np.where(reset[..., None], 0.0, np.where(keep, g, 1.0))
    return Inputs(q, k, v, g, real, reset)


def reset_points(real, segment_ids):
    """[B, T] bool: real tokens whose id differs from that of the previous real token of this call.

    The first real token never resets: it continues the initial state.
    """
    reset = np.zeros(real.shape, bool)
    if segment_ids is None:
        return reset
    ids = np.asarray(segment_ids)
    for b in range(real.shape[0]):
        (tokens,) = np.nonzero(real[b])
        reset[b, tokens[1:]] = ids[b, tokens[1:]] != ids[b, tokens[:-1]]
    return reset


def expand_heads(x, Hq, axis=2):
    """Repeat each key-value head for the query heads that share it: query head h reads h // (Hq / Hkv)."""
    return np.repeat(x, Hq // x.shape[axis], axis=axis)


def finish(o, real, normalize, eps):
    """o [B, T, Hq, V (+1)] -> the public output: num / (den + ε) if normalising, 0 at masked tokens."""
    if normalize:
        keep = real[..., None, None]
        # A masked token has num = den = 0: with ε = 0 it must still give 0, not 0/0.
        o = o[..., :-1] / np.where(keep, o[..., -1:] + eps, 1.0)
    return np.where(real[..., None, None], o, 0.0)


def join(matrix, vector):
    """[.., D, V] and [.., D] | None -> [.., D, V (+1)]: the vector is the matrix's column for v = 1."""
    matrix = np.asarray(matrix, np.float64)
    return (
        matrix if vector is None else np.concatenate([matrix, np.asarray(vector, np.float64)[..., None]], -1)
    )


def part(x, normalize):
    """The inverse of `join`: (matrix, vector) when normalising, else (matrix, None)."""
    return (x[..., :-1], x[..., -1]) if normalize else (x, None)


def carried(state, matrix, vector, shape, normalize):
    """The [B, H, D, V (+1)] accumulator to start from: zeros, or two fields of an initial state joined."""
    if state is None:
        return np.zeros(shape)
    vec = getattr(state, vector) if vector and normalize else None
    if vector and normalize and vec is None:
        raise ValueError(f"[reference] normalize=True needs {vector!r} in the initial state")
    x = join(getattr(state, matrix), vec)
    if x.shape != tuple(shape):
        raise ValueError(f"[reference] initial state {matrix!r} must be {tuple(shape)}, got {x.shape}")
    return x.copy()
