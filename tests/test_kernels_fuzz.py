"""Random shapes, dtypes, layouts and options through the kernels: `pytest -m fuzz`. Fixed seeds."""

from dataclasses import replace

import numpy as np
import pytest
from kernel_problems import (
    COMPOSED,
    FAMILIES,
    Case,
    KernelProblem,
    needs_standin,
    through_kernels,
    through_steps,
)
from standin import metal

pytestmark = [needs_standin, pytest.mark.fuzz]
WIDTHS = (8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 96, 104, 120, 128)


def draw(seed):
    """An operator, a case, and how it is run."""
    rng = np.random.default_rng(seed)

    def pick(*choices):
        return choices[rng.integers(len(choices))]

    stepping = rng.random() < 0.2
    D, V = int(rng.choice(WIDTHS)), int(rng.choice(WIDTHS))
    most = 5 if stepping else 40 if max(D, V) > 64 else 200
    Hkv, groups = pick(1, 2, 3), pick(1, 1, 2, 5)
    normalize = bool(rng.random() < 0.3)
    case = Case(
        T=int(rng.integers(1, most + 1)),
        B=pick(1, 2, 3),
        Hq=Hkv * groups,
        Hkv=Hkv,
        D=D,
        V=V,
        dtype=pick("f32", "f32", "f16", "bf16"),
        decay=pick(None, "float", "heads", "gates", "half"),
        mask=None if stepping else pick(None, None, "holes"),
        segments=bool(not stepping and rng.random() < 0.3),
        normalize=normalize,
        scale=pick(1.0, 0.3),
        carried=bool(rng.random() < 0.5),
    )
    plan = {"min_block": int(32 * rng.integers(1, 9)), "fill": int(rng.integers(1, 65))}
    threads = ({"schedule": "random", "seed": seed}, {"schedule": pick("forward", "reverse", "interleave")})
    op, make = pick(*FAMILIES, *FAMILIES, *COMPOSED), through_steps if stepping else through_kernels
    if op in COMPOSED and case.dtype != "f32":
        # Their terms may cancel, q̃ = q − S q / n among them: more than any bound of a rounding foresees.
        case = replace(case, dtype="f32")
    return op, case, plan, threads, make


@pytest.mark.parametrize("seed", range(120))
def test_random_calls(monkeypatch, seed):
    metal.install(monkeypatch)
    op, case, plan, threads, make = draw(seed)
    print(op, case, plan, make.__name__)
    monkeypatch.setattr("mlx_hla.kernels.plan.min_block", lambda: plan["min_block"])
    monkeypatch.setattr("mlx_hla.kernels.plan.fill", lambda: plan["fill"])
    KernelProblem(op, case, seed=seed, make=make).check(threads=threads)
