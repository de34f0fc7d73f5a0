"""What tests share: random inputs, comparisons that say how far off a result is, texts to train on."""

import os
import signal

import mlx.core as mx
import numpy as np
import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A job in the background ignores Ctrl-C, and so would every command that the tests start and stop.
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Tests say themselves when kernels are to be proved first; nothing is kept in a user's folder.
os.environ["MLX_HLA_PROOF"] = "0"
# On CUDA a kernel takes seconds to compile, and tests have hundreds of shapes: there, kernels are asked for.
if mx.cuda.is_available():
    os.environ["MLX_HLA_BACKEND"] = "mlx"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder of small texts to train on."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(30):
        (folder / f"f{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n\n\nprint(f{i}(2))\n" * 8)
    return folder


def to_numpy(x):
    """An MLX or NumPy array in float64; bfloat16 has no NumPy type of its own."""
    return np.array(x.astype(mx.float32) if isinstance(x, mx.array) else x, np.float64)


def relative(got, want):
    """‖got − want‖ / ‖want‖ in the Frobenius norm; ‖got‖ where want is zero or beyond float32's range."""
    got, want = to_numpy(got), to_numpy(want)
    norm = np.linalg.norm(want)
    return np.linalg.norm(got - want) / (norm if norm > 1e-37 else 1.0)


def assert_close(name, got, want, tol):
    """Same shape, finite, and a relative Frobenius distance of at most tol."""
    got, want = to_numpy(got), to_numpy(want)
    assert got.shape == want.shape, f"{name}: shape {got.shape}, expected {want.shape}"
    assert np.isfinite(got).all(), f"{name}: {(~np.isfinite(got)).sum()} of {got.size} are not finite"
    error, distance = np.abs(got - want), relative(got, want)
    assert distance <= tol, (
        f"{name}: relative error {distance:.2e} > {tol:.1e}; max error {error.max():.2e}, "
        f"mean {error.mean():.2e}, largest value {np.abs(want).max():.2e}"
    )


def normal(seed, *shape):
    """Standard normal numbers, float64."""
    return np.random.default_rng(seed).normal(size=shape)
