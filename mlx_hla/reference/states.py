"""The streaming states of every operator, as NamedTuples of NumPy float64 arrays.

Field names are the paper's symbols and the same as those of the MLX operators' own states, so that a test
compares field by field.  Fields that only `normalize=True` needs are None otherwise.

# B batch, T time, Hq query heads, Hkv key-value heads, D key dim, V value dim
"""

from typing import NamedTuple

import numpy as np

Array = np.ndarray


class LinearState(NamedTuple):
    """First order: P_t = Σ k v^T [B, Hkv, D, V] and m_t = Σ k [B, Hkv, D] (§2.2)."""

    P: Array
    m: Array | None = None


class HLA2State(NamedTuple):
    """Masked second order: S_t = Σ k k^T [B, Hkv, D, D], F = S C − G [B, Hq, D, V], η likewise [B, Hq, D]."""

    S: Array
    F: Array
    eta: Array | None = None


class HLA2UnmaskedState(NamedTuple):
    """Unmasked second order: S [B, Hkv, D, D], C = Σ q v^T [B, Hq, D, V], m = Σ q [B, Hq, D] (Eq. 3.1)."""

    S: Array
    C: Array
    m: Array | None = None


class AHLAState(NamedTuple):
    """AHLA: P [B, Hkv, D, V], E_t = Σ k (q^T P) [B, Hq, D, V], m [B, Hkv, D], n [B, Hq, D] (Thm 6.1)."""

    P: Array
    E: Array
    m: Array | None = None
    n: Array | None = None


class HLA3State(NamedTuple):
    """Masked third order: S, P per key-value head; F [B, Hq, D, V]; m [B, Hkv, D] and η [B, Hq, D]."""

    S: Array
    P: Array
    F: Array
    m: Array | None = None
    eta: Array | None = None


class HLA3UnmaskedState(NamedTuple):
    """Unmasked third order: S^K [B, Hkv, D, D], S^Q [B, Hq, D, D], P [B, Hkv, D, V], m (§7.1)."""

    SK: Array
    SQ: Array
    P: Array
    m: Array | None = None


class HLA3PaperState(NamedTuple):
    """What Algorithm 3 keeps: S^K, P, m per key-value head; S^Q, G⁽¹⁾..G⁽³⁾, h⁽¹⁾..h⁽³⁾ per query head."""

    SK: Array
    SQ: Array
    P: Array
    G1: Array
    G2: Array
    G3: Array
    m: Array | None = None
    h1: Array | None = None
    h2: Array | None = None
    h3: Array | None = None


class HLAState(NamedTuple):
    """Order n ≥ 4: S [B, Hkv, D, D]; F a tuple of n // 2 [B, Hq, D, V], innermost first; P, m when n is odd;
    η a tuple beside F."""

    S: Array
    F: tuple[Array, ...]
    P: Array | None = None
    m: Array | None = None
    eta: tuple[Array, ...] | None = None


class MixedState(NamedTuple):
    """Both orders in one F: S = Σ k k^T [B, Hkv, D, D], F = Σ k̃ v^T [B, Hq, D, V], η = Σ k̃ [B, Hq, D]."""

    S: Array
    F: Array
    eta: Array | None = None


class ReadoutState(NamedTuple):
    """S = Σ k k^T [B, Hkv, D, D], P = Σ k v^T [B, Hkv, D, V], the count n [B, Hkv], m = Σ k [B, Hkv, D]."""

    S: Array
    P: Array
    n: Array
    m: Array | None = None
