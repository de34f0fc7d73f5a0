"""The scan over chunk states against a plain loop, and the running sums of log decays under it."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import assert_close, normal, to_numpy

from mlx_hla.ops import scan

B, H, W, F = 2, 3, 4, 5
EPS = 2.0**-24


@pytest.fixture(params=[2, 3, 64], ids=lambda size: f"group{size}")
def group(request, monkeypatch):
    """Chunks in one group: 37 chunks take six levels of 2, four of 3, and one of 64."""
    monkeypatch.setattr(scan, "GROUP_CPU", request.param)
    return request.param


def decays(N, seed=0):
    """g [B, H, N, W] with zeros, neighbouring zeros, ones and values down to 1e-30."""
    rng = np.random.default_rng(seed)
    g = rng.uniform(0.7, 1.0, (B, H, N, W))
    g[0, 0] = 1.0
    for n, value in ((0, 0.0), (N // 3, 1e-30), (N // 2, 0.0), (N // 2 + 1, 1e-12), (N - 1, 0.0)):
        g[0, 1, min(n, N - 1), n % W] = value
    return mx.array(g.astype(np.float32))


def loop(x, rho, first, reverse):
    """s_{n+1} = ρ_n s_n + x_n: states before their chunks, and the last; or from the far end."""
    s = np.zeros((B, H, F)) if first is None else to_numpy(first)
    states = np.zeros(x.shape)
    for n in reversed(range(x.shape[2])) if reverse else range(x.shape[2]):
        states[:, :, n] = s
        s = rho[:, :, n, None] * s + x[:, :, n]
    return states, s


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("started", [False, True], ids=["fresh", "carried"])
@pytest.mark.parametrize("decayed", [False, True], ids=["plain", "decayed"])
@pytest.mark.parametrize("N", [1, 2, 7, 37])
def test_scan_is_the_loop(N, decayed, started, reverse, group):
    x = mx.array(normal(1, B, H, N, F).astype(np.float32))
    first = mx.array(normal(2, B, H, F).astype(np.float32)) if started else None
    g, power, factor = decays(N), 2, 0.7
    edges = scan.make_decay(g).edges if decayed else None
    got = scan.ChunkScan(x, edges, power, first, factor, reverse)
    rho = to_numpy(g).prod(axis=-1) ** power if decayed else np.ones((B, H, N))
    want, end = loop(factor * to_numpy(x), rho, first, reverse)
    # N terms, each with a weight that is a float32 exponential, a few roundings off.
    tol = 8 * EPS * np.sqrt(N + 8)
    assert_close("states", got.inner(), want, tol)
    assert_close("last", got.last(), end, tol)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_a_zero_cuts_exactly(reverse, group):
    """Behind a decay of 0 nothing is left of what came before, however large: not its rounding either."""
    N, cut = 23, 9
    g = np.full((1, 1, N, W), 0.9, np.float32)
    g[..., cut, 2] = 0.0
    before = (np.arange(N) >= cut + 1) if reverse else (np.arange(N) < cut)
    x = np.where(before, 1e30, 1.0)[None, None, :, None].astype(np.float32)
    edges = scan.make_decay(mx.array(g)).edges
    got = scan.ChunkScan(mx.array(x), edges, 1, None, 1.0, reverse)
    beyond = slice(0, cut) if reverse else slice(cut + 1, N)
    assert to_numpy(got.inner()[:, :, beyond]).max() < 1e3
    assert to_numpy(got.last()).max() < 1e3


def test_bfloat16_states_keep_a_float32_end(monkeypatch):
    monkeypatch.setattr(scan, "GROUP_CPU", 3)
    x = mx.array(normal(3, B, H, 20, F)).astype(mx.bfloat16)
    edges = scan.make_decay(decays(20)).edges
    got = scan.ChunkScan(x, edges, 1, None)
    states, last = got.inner(), got.last()
    want, end = loop(to_numpy(x), to_numpy(decays(20)).prod(axis=-1), None, False)
    assert states.dtype == mx.bfloat16
    assert last.dtype == mx.float32
    assert_close("states", states, want, 2 * 2.0**-8)  # one rounding of the weights, one of the sum
    assert_close("last", last, end, 8 * EPS * np.sqrt(28))


@pytest.mark.parametrize("length", [1, 3, 64, 500])
def test_differences_of_running_sums_do_not_cancel(length):
    """The log of what is left between two tokens, after a long sum of far larger logs before them."""
    rng = np.random.default_rng(4)
    l = -rng.uniform(0, 0.05, length)
    l[: length // 2] = -rng.uniform(60, 128, length // 2)
    l = l.astype(np.float32)
    sums = scan.running_sums(mx.array(l))
    exact = np.cumsum(l.astype(np.float64))
    hi, lo = to_numpy(sums.hi), to_numpy(sums.lo)
    got = (hi[:, None] - hi[None]) + (lo[:, None] - lo[None])
    want = exact[:, None] - exact[None]
    # hi adds up without error; what lo holds per number is below half a step of the grid, 2^-17 · span.
    assert np.abs(got - want).max() <= EPS * length * (2.0**-17 * 2 * length) + 1e-12
    late = slice(length // 2, None)
    assert np.abs(got - want)[late, late].max() < 1e-7


def test_log_decay_of_the_extremes():
    g = mx.array([0.0, 1e-45, 1e-38, 1e-30, 0.5, 1.0])
    got = to_numpy(scan.log_decay(g))
    assert got[0] == scan.LOG_ZERO
    assert np.exp(np.float32(got[0])) == 0
    assert np.allclose(got[2:], np.log([1e-38, 1e-30, 0.5, 1.0]), rtol=1e-6, atol=1e-9)
    assert np.isfinite(got).all()


def test_groups_cover_the_chunks(group):
    for N in range(1, 200):
        groups, span = scan._groups(N)
        assert groups * span >= N > (groups - 1) * span
        assert span <= group


def test_triangle_is_shared():
    assert scan.triangle(3, 3, -1, mx.float32) is scan.triangle(3, 3, -1, mx.float32)
    assert scan.triangle(2, 3, 0, mx.float32, 2.0).tolist() == [[2, 0, 0], [2, 2, 0]]
