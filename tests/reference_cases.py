"""What the tests of the ground truth share: its operators, inputs, comparisons."""

import numpy as np
import pytest
from ops_reference import OPERATORS as CASES

from mlx_hla import reference as R

# By a name of its own: (name of the public function, its options), from the operators' records.
OPERATORS = {key: (tested.name, tested.options) for key, tested in CASES.items() if not tested.arrays}
OPERATORS |= {f"order{n}": ("hla", {"order": n}) for n in range(1, 7)}
each_operator = pytest.mark.parametrize("op", OPERATORS)


def assert_close(name, got, want, tol=1e-12):
    """Relative Frobenius distance, reported with the largest error."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape, f"{name}: shape {got.shape}, expected {want.shape}"
    error = np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-300)
    worst = np.abs(got - want).max(initial=0.0)
    assert error <= tol, f"{name}: relative error {error:.2e} > {tol:.0e}, largest {worst:.2e}"


def serial(op, *qkv, **options):
    name, fixed = OPERATORS[op]
    return getattr(R, f"serial_{name}")(*qkv, **fixed, **options)


def dense(op, *qkv, **options):
    name, fixed = OPERATORS[op]
    return getattr(R, f"dense_{name}")(*qkv, **fixed, **options)


def vjp(op, *args, **options):
    name, fixed = OPERATORS[op]
    return getattr(R, f"vjp_{name}")(*args, **fixed, **options)


def inputs(seed=0, B=2, T=19, Hq=4, Hkv=2, D=5, V=3, positive=False):
    """q, k, v; positive ones where a denominator must stay away from 0."""
    rng = np.random.default_rng(seed)
    draw = (
        (lambda shape: rng.uniform(0.3, 1.0, shape)) if positive else (lambda shape: rng.normal(size=shape))
    )
    return draw((B, T, Hq, D)), draw((B, T, Hkv, D)), rng.normal(size=(B, T, Hkv, V))


def gates(seed=0, B=2, T=19, Hkv=2, zeros=True):
    """A decay per token with values down to 1e-30 and, if asked, exact zeros."""
    rng = np.random.default_rng(seed + 1)
    g = rng.uniform(0.5, 1.0, (B, T, Hkv))
    g[0, 3] = 1e-30
    if zeros:
        g[0, T // 2], g[-1, T // 3, 0] = 0.0, 0.0
    return g


def leaves(state):
    """The arrays of a state, tuples opened."""
    for field in state:
        if isinstance(field, tuple):
            yield from field
        elif field is not None:
            yield field


def rebuild(state, arrays):
    """A state of the same structure with other arrays."""
    arrays = iter(arrays)

    def one(field):
        if isinstance(field, tuple):
            return tuple(next(arrays) for _ in field)
        return None if field is None else next(arrays)

    return type(state)(*(one(field) for field in state))


DECAYS = {
    "none": None,
    "float": 0.9,
    "heads": np.array([0.9, 0.7]),
    "gates": gates(),
}


def attenuation(g, s, t):
    """Π_{s<r≤t} g_r."""
    return np.prod(g[s + 1 : t + 1])
