"""What the tests of the ground truth share: its operators, inputs, comparisons."""

import numpy as np
import pytest

from mlx_hla import reference as R

OPERATORS = {
    "first": ("linear_attention", {}),
    "hla2": ("hla2", {}),
    "hla2-ridge": ("hla2", {"ridge": 0.3}),
    "hla2-unmasked": ("hla2", {"masked": False, "ridge": 0.3}),
    "ahla": ("ahla", {}),
    "hla3": ("hla3", {}),
    "hla3-unmasked": ("hla3", {"masked": False}),
    "hla3-paper": ("hla3", {"convention": "paper"}),
    "order1": ("hla", {"order": 1}),
    "order2": ("hla", {"order": 2}),
    "order3": ("hla", {"order": 3}),
    "order4": ("hla", {"order": 4}),
    "order5": ("hla", {"order": 5}),
    "order6": ("hla", {"order": 6}),
    "mixed": ("mixed", {}),
    "mixed-numbers": ("mixed", {"alpha": 0.4, "beta": 0.7}),
    "readout": ("readout", {}),
    "readout-numbers": ("readout", {"alpha": 1.2, "beta": 0.7}),
}
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
