"""Attention over a window: against the dense definition in float64, with every gradient, at any length."""

import mlx.core as mx
import numpy as np
import pytest
from nn_reference import assert_close

from mlx_hla.nn import WindowAttention, WindowState
from mlx_hla.nn.window import window_attention

BASE = 100.0
# An angle of 320 in float32 is exact to 2e-5, of which a score has a part in √D directions.
TOLERANCE = 6e-6
LENGTHS = [(1, 4), (3, 4), (4, 4), (5, 4), (8, 4), (9, 1), (63, 16), (257, 32), (20, 300)]
sizes = pytest.mark.parametrize(("T", "W"), LENGTHS, ids=[f"T{T}-W{W}" for T, W in LENGTHS])


def rotate(a, position):
    return mx.fast.rope(a, a.shape[-1], traditional=False, base=BASE, scale=1.0, offset=position)


def problem(T, W, carried, seed=0):
    """Queries and keys of 4 and 2 heads; with `carried` a state that is not full in one row."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: mx.array(rng.normal(size=shape).astype(np.float32))  # noqa: E731
    q, k, v = draw(2, 4, T, 8), draw(2, 2, T, 8), draw(2, 2, T, 6)
    state = None
    if carried:
        held = mx.array([min(W, 3), W])
        state = WindowState(draw(2, 2, W, 8), draw(2, 2, W, 6), held)
    return q, k, v, state


def dense(q, k, v, state, W, lengths=None, ids=None):
    """A softmax over explicit scores for each query, float64; positions count from the state's first key."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    B, H, T, D = q.shape
    n = [0] * B
    if state is not None:
        k, v = (
            np.concatenate([np.asarray(a, np.float64), b], 2) for a, b in ((state.keys, k), (state.values, v))
        )
        n = np.asarray(state.n)
    before = k.shape[2] - T
    angle = np.arange(before + T)[:, None] * BASE ** (-np.arange(0, D, 2) / D)

    def turned(x, angle):
        a, b = x[..., : D // 2], x[..., D // 2 :]
        return np.concatenate(
            [a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)], -1
        )

    q, k = turned(q, angle[before:]), turned(k, angle)
    out = np.zeros((B, H, T, v.shape[-1]))
    for b in range(B):
        for t in range(T if lengths is None else lengths[b]):
            first = max(before + t - W + 1, before - n[b])
            if ids is not None:
                same = [u for u in range(t + 1) if (ids[b][u : t + 1] == ids[b][t]).all()]
                first = max(first, before + min(same) if min(same) > 0 else first)
            for h in range(H):
                j = h * k.shape[1] // H
                keys, values = k[b, j, first : before + t + 1], v[b, j, first : before + t + 1]
                w = np.exp(keys @ q[b, h, t] / np.sqrt(D))
                out[b, h, t] = w @ values / w.sum()
    return out


@pytest.mark.parametrize("carried", [False, True], ids=["fresh", "carried"])
@sizes
def test_values(T, W, carried):
    q, k, v, state = problem(T, W, carried)
    o, new = window_attention(q, k, v, state, None, None, window=W, rotate=rotate)
    assert_close("o", o, dense(q, k, v, state, W), TOLERANCE)
    assert new.keys.shape == (2, 2, W, 8)
    before = [min(W, 3), W] if carried else [0, 0]
    assert new.n.tolist() == [min(W, n + T) for n in before]
    for b, n in enumerate(new.n.tolist()):
        seen = k if state is None else mx.concatenate([state.keys, k], axis=2)
        assert mx.array_equal(new.keys[b, :, W - n :], seen[b, :, seen.shape[2] - n :])


@pytest.mark.parametrize("carried", [False, True], ids=["fresh", "carried"])
@sizes
def test_padding_and_segments(T, W, carried):
    q, k, v, state = problem(T, W, carried, seed=1)
    lengths = [T, (T + 1) // 2]
    ids = np.sort(np.random.default_rng(2).integers(0, 1 + T // 6, (2, T)))
    o, _ = window_attention(q, k, v, state, mx.array(lengths), mx.array(ids), window=W, rotate=rotate)
    want = dense(q, k, v, state, W, lengths, ids)
    for b in range(2):
        assert_close(f"o[{b}]", o[b, :, : lengths[b]], want[b, :, : lengths[b]], TOLERANCE)


@pytest.mark.parametrize("T", [1, 5, 23])
@pytest.mark.parametrize("carried", [False, True], ids=["fresh", "carried"])
@pytest.mark.parametrize("segments", [False, True], ids=["one", "segments"])
def test_gradients(T, carried, segments):
    """Of the output and of the final state, by q, k, v and the carried state, against float64 differences."""
    W = 4
    q, k, v, state = problem(T, W, carried, seed=3)
    rng = np.random.default_rng(4)
    ids = np.sort(rng.integers(0, 3, (2, T))) if segments else None
    target = rng.normal(size=(2, 4, T, 6))
    arrays = [q, k, v, *([state.keys, state.values] if carried else [])]

    def loss(q, k, v, keys=None, values=None):
        held = None if keys is None else WindowState(keys, values, state.n)
        segment_ids = None if ids is None else mx.array(ids)
        o, new = window_attention(q, k, v, held, None, segment_ids, window=W, rotate=rotate)
        return (o * mx.array(target.astype(np.float32))).sum() + (new.keys**2).sum() + new.values.sum()

    def reference(q, k, v, keys=None, values=None):
        held = None if keys is None else WindowState(keys, values, np.asarray(state.n))
        o = dense(q, k, v, held, W, None, ids)
        kept = [np.zeros((2, 2, W, 1)) if keys is None else keys, k], [np.zeros((2, 2, W, 1)), v]
        if values is not None:
            kept[1][0] = values
        last = []
        for carry, new in kept:
            carry = np.broadcast_to(carry, (2, 2, W, new.shape[-1]))
            last.append(np.concatenate([carry, new], 2)[:, :, -W:])
        return (o * target).sum() + (last[0] ** 2).sum() + last[1].sum()

    grads = mx.grad(loss, argnums=tuple(range(len(arrays))))(*arrays)
    exact = [np.asarray(a, np.float64) for a in arrays]
    for i, (name, grad) in enumerate(zip(("q", "k", "v", "keys", "values"), grads, strict=False)):
        direction = rng.choice([-1e-6, 1e-6], size=grad.shape)
        ends = [[*exact[:i], exact[i] + s * direction, *exact[i + 1 :]] for s in (1, -1)]
        want = (reference(*ends[0]) - reference(*ends[1])) / 2e-6
        assert_close(f"d{name}", (np.asarray(grad, np.float64) * direction).sum() / 1e-6, want, 1e-4)


def test_no_gradient_is_nan_where_padding_sees_no_key():
    q, k, v, _ = problem(9, 4, False)
    ids = mx.array([[0] * 8 + [1], [0] * 9])

    def loss(q, k, v):
        o, _ = window_attention(q, k, v, None, mx.array([9, 1]), ids, window=4, rotate=rotate)
        return o[0].sum() + o[1, :, 0].sum()

    for name, grad in zip("qkv", mx.grad(loss, argnums=(0, 1, 2))(q, k, v), strict=True):
        assert mx.isfinite(grad).all().item(), name


def test_memory_grows_with_the_length_and_not_with_its_square():
    attention = WindowAttention(16, 2, window=32)

    def peak(T):
        x = mx.random.normal((1, T, 16))
        mx.eval(x, attention.parameters())
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(mx.grad(lambda x: attention(x).sum())(x))
        return mx.get_peak_memory() - before

    peak(2048)  # what the first call allocates stays
    assert peak(8192) < 6 * peak(2048)


def test_the_state_has_constant_size_and_decoding_compiles_once():
    attention = WindowAttention(16, 2, window=8, conv_size=4)
    cache = attention.make_cache()
    attention(mx.random.normal((1, 1, 16)), cache=cache)
    held = cache.nbytes
    assert held == 4 * (2 * 2 * 8 * 8 + 3 * 48 + 1)
    traced = []

    @mx.compile
    def step(x, keys, values, n, conv):
        traced.append(x.shape)
        work = type(cache).from_state(((keys, values, n), conv, None))
        y = attention(x, cache=work)
        return y, *work.memory, work.conv

    xs = mx.random.normal((1, 30, 16))
    state = (*cache.memory, cache.conv)
    for t in range(30):
        y, *state = step(xs[:, t : t + 1], *state)
    plain = [attention(xs[:, t : t + 1], cache=cache) for t in range(30)]
    assert_close("y", y, plain[-1], 1e-5)
    assert len(traced) == 1
    assert cache.nbytes == held


def test_positions_do_not_lose_precision_far_from_the_start():
    """The same last tokens say the same after any number of others: nothing counts from the beginning."""
    attention = WindowAttention(16, 2, window=8, conv_size=None)
    x = mx.random.normal((1, 8, 16))
    want = attention(x)[:, -1]
    cache = attention.make_cache()
    attention(mx.random.normal((1, 5000, 16)), cache=cache)
    assert_close("y", attention(x, cache=cache)[:, -1], want, 1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be a positive integer, got 0"),
        ({"window": 2.0}, "window must be a positive integer, got 2.0"),
        ({"window": True}, "window must be a positive integer, got True"),
        ({"window": 4, "qk_norm": "l2"}, "qk_norm must be one of 'rms', None, got 'l2'"),
        ({"window": 4, "num_kv_heads": 3}, "num_kv_heads must divide num_heads=2, got 3"),
        ({"window": 4, "head_dim": 5}, "rope needs an even head_dim, got 5"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=rf"\[WindowAttention\] {message}"):
        WindowAttention(16, 2, **options)


def test_a_cache_of_another_layer_is_refused():
    x = mx.random.normal((1, 3, 16))
    cache = WindowAttention(16, 2, window=8).make_cache()
    WindowAttention(16, 2, window=8)(x, cache=cache)
    with pytest.raises(ValueError, match=r"\[WindowAttention\] cache must be of this layer"):
        WindowAttention(16, 2, window=6)(x, cache=cache)
