"""The study's synthetic half: the labels of its tasks, the gated delta rule, its own operators."""

import sys
from itertools import permutations
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import assert_close, normal, to_numpy

STUDY = Path(__file__).resolve().parent.parent / "examples" / "study"
sys.path.insert(0, str(STUDY))

import arms  # noqa: E402
import gdn  # noqa: E402
import operators  # noqa: E402
import tasks  # noqa: E402

import mlx_hla  # noqa: E402
from mlx_hla.ops.backend import sequence  # noqa: E402
from mlx_hla.ops.operator import choices  # noqa: E402

# ---- the tasks, by solvers that know nothing of how they were made


def solve_pairs(row, task):
    """Follow the names of the questions to their values, through all pairs that were shown."""
    names, row = task.about["names"], [x for x in row if x]
    P = len(row) * task.about["pairs"] // task.T
    told, answers = row[:-P], []
    pairs = list(zip(told[::2], told[1::2], strict=True))
    for asked in row[-P:]:
        seen, known = set(), [asked]
        while known:
            name = known.pop()
            seen.add(name)
            known += [x for p in pairs if name in p for x in p if x not in seen and x <= names]
        values = {b - 1 - names for a, b in pairs if a in seen and b > names}
        (value,) = values
        answers.append(value)
    return answers


@pytest.mark.parametrize("name", ["recall", "alias", "join", "hop3"])
@pytest.mark.parametrize("size", [None, 2])
def test_pairs_lead_to_their_values(name, size):
    task = tasks.TASKS[name](P=4)
    batch = task.make(np.random.default_rng(0), 20, size)
    assert batch.x.shape == batch.y.shape == batch.w.shape == (20, task.T)
    assert batch.x.max() < task.inputs
    assert batch.y.max() < task.outputs
    for x, y, w in zip(batch.x, batch.y, batch.w, strict=True):
        want = solve_pairs(x.tolist(), task)
        assert len(want) == w.sum() == w[-len(want) :].sum() == (size or w.sum())
        assert want == y[-len(want) :].tolist()
    assert 0 < task.baselines(batch)["seen"] <= 1


def test_join_cannot_be_read_off_one_list():
    """The question's name stands beside no value."""
    task = tasks.TASKS["join"]()
    x = task.make(np.random.default_rng(1), 5, task.about["pairs"]).x
    P = task.about["pairs"]
    for row in x:
        beside_values = set(row[2 * P : 4 * P : 2])
        assert not beside_values & set(row[-P:])


def test_match3():
    task = tasks.TASKS["match3"](T=9, M=13)
    batch = task.make(np.random.default_rng(2), 30)
    for x, y in zip(batch.x.tolist(), batch.y, strict=True):
        for t in range(9):
            found = any((x[i] + x[j] + x[t]) % 13 == 0 for j in range(t + 1) for i in range(j))
            assert found == y[t]
    assert 0.5 < task.baselines(batch)["chance"] < 0.95


def test_parity_and_permutations():
    batch = tasks.TASKS["parity"]().make(np.random.default_rng(3), 9)
    np.testing.assert_array_equal(batch.y, batch.x.cumsum(1) % 2)
    for name, n in {"s3": 3, "s5": 5}.items():
        group = list(permutations(range(n)))
        batch = tasks.TASKS[name](T=12).make(np.random.default_rng(4), 9)
        for x, y in zip(batch.x, batch.y, strict=True):
            things = list(range(n))
            for i, j in zip(x, y, strict=True):
                # p before q: what stood at place i of the arrangement moves to p[i]
                things = [group[i][thing] for thing in things]
                assert tuple(things) == group[j]


def test_copy():
    batch = tasks.TASKS["copy"](L=7).make(np.random.default_rng(5), 6)
    for x, y, w in zip(batch.x.tolist(), batch.y, batch.w, strict=True):
        assert x[7] == 0
        assert [v - 1 for v in x[:7]] == y[w == 1].tolist()
        assert x[8:] == x[:6]


def test_regression_is_solved_by_ridge_alone():
    task = tasks.TASKS["regress"](d=4, N=24, noise=0.0)
    batch = task.make(np.random.default_rng(6), 12)
    for x, y in zip(batch.x.astype(np.float64), batch.y[..., 0], strict=True):
        told = np.array([(*x[2 * i, :4], x[2 * i + 1, 4]) for i in range(12)])
        w = np.linalg.lstsq(told[:, :4], told[:, 4], rcond=None)[0]
        np.testing.assert_allclose(x[24::2, :4] @ w, y[24::2], atol=1e-4)
        np.testing.assert_array_equal(x[::2, 4], 0)
    noisy = tasks.TASKS["regress"]()
    said = noisy.baselines(noisy.make(np.random.default_rng(7), 400))
    assert said["ridge"] < said["least_squares"] < said["first"] < said["zero"]
    assert 0.01 < said["ridge"] < 0.03  # σ² and a little
    assert abs(said["zero"] - 1.01) < 0.1


# ---- the gated delta rule


def delta_steps(q, k, v, beta, g, S):
    """The recurrence token by token in float64."""
    out = []
    for t in range(len(q)):
        S = g[t] * S
        S = S + beta[t] * np.outer(k[t], v[t] - S.T @ k[t])
        out.append(S.T @ q[t])
    return np.array(out), S


def delta_inputs(B, T, H, D, V):
    q, k, v = normal(0, B, T, H, D), normal(1, B, T, H, D), normal(2, B, T, H, V)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    beta, g = (1 / (1 + np.exp(-normal(i, B, T, H))) for i in (3, 4))
    return q, k, v, beta, 0.8 + 0.2 * g, normal(5, B, H, D, V)


def delta_reference(q, k, v, beta, g, S):
    o, last = np.zeros_like(v), np.zeros_like(S)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            one = [x[b, :, h] for x in (q, k, v, beta, g)]
            o[b, :, h], last[b, h] = delta_steps(*one, S[b, h])
    return o, last


@pytest.mark.parametrize(("T", "width"), [(1, 64), (13, 64), (37, 16), (64, 64)])
def test_delta_rule_is_its_recurrence(T, width):
    arrays = delta_inputs(2, T, 2, 6, 5)
    *a, S = (mx.array(x.astype(np.float32)) for x in arrays)
    o, state = gdn.gated_delta(*a, gdn.GDNState(S), width)
    want_o, want_S = delta_reference(*arrays)
    assert_close("o", o, want_o, 2e-6)
    assert_close("S", state.S, want_S, 2e-6)
    o, _ = gdn.gated_delta(*a, width=width)
    assert_close("o from 0", o, delta_reference(*arrays[:-1], 0 * arrays[-1])[0], 2e-6)


def test_delta_rule_gradient():
    """Against central differences of the recurrence in float64, along two directions for every input."""
    arrays = delta_inputs(1, 21, 1, 4, 3)
    d_o, d_S = normal(6, *arrays[2].shape), normal(7, *arrays[5].shape)

    def loss(*arrays):
        *a, S = arrays
        o, state = gdn.gated_delta(*a, gdn.GDNState(S), 8)
        return (o * mx.array(d_o.astype(np.float32))).sum() + (
            state.S * mx.array(d_S.astype(np.float32))
        ).sum()

    def exact(arrays):
        o, S = delta_reference(*arrays)
        return (o * d_o).sum() + (S * d_S).sum()

    grads = mx.grad(loss, argnums=tuple(range(6)))(*(mx.array(x.astype(np.float32)) for x in arrays))
    for i, grad in enumerate(grads):
        for seed in range(2):
            along = normal(10 + seed, *arrays[i].shape)
            ends = [
                exact([x + s * 1e-5 * along if j == i else x for j, x in enumerate(arrays)]) for s in (1, -1)
            ]
            want = (ends[0] - ends[1]) / 2e-5
            got = (to_numpy(grad) * along).sum()
            assert abs(got - want) <= 1e-4 * np.linalg.norm(to_numpy(grad)) * np.linalg.norm(along)


def test_delta_rule_with_equal_keys_stays_exact():
    """The worst case of powers of N: all keys the same, β = 1."""
    T, D = 64, 8
    q, v = normal(0, 1, T, 1, D), normal(2, 1, T, 1, D)
    k = np.zeros((1, T, 1, D))
    k[..., 0] = 1
    one = np.ones((1, T, 1))
    arrays = (q, k, v, one, one, np.zeros((1, 1, D, D)))
    o, _ = gdn.gated_delta(*(mx.array(x.astype(np.float32)) for x in arrays[:5]))
    assert_close("o", o, delta_reference(*arrays)[0], 1e-6)


# ---- the operators


def test_mesa_solves_and_is_its_steps():
    rng, T, D = np.random.default_rng(8), 20, 6
    q, k, v = (rng.normal(size=(1, T, 1, D)) for _ in range(3))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    g = 0.9 + 0.1 * rng.random((1, T, 1))
    a = [mx.array(x.astype(np.float32)) for x in (q, k, v)]
    decay = mx.array(g.astype(np.float32))
    want, S, P, n = [], np.zeros((D, D)), np.zeros((D, D)), 0.0
    for t in range(T):
        kt, vt, gt = k[0, t, 0], v[0, t, 0], g[0, t, 0]
        S, P, n = gt * S + np.outer(kt, kt), gt * P + np.outer(kt, vt), gt * n + 1
        want.append(0.2 * P.T @ np.linalg.solve(S / n + 0.2 * np.eye(D), q[0, t, 0]))
    record = operators.mesa(steps=24, ridge=0.2)
    o, state = sequence(record, *a, None, {}, decay=decay)
    assert_close("mesa", o[0, :, 0], np.array(want), 1e-5)
    # With few steps the error is within Chebyshev's bound, in two calls as in one.
    bound = 1 / np.cosh(5 * np.arccosh(1.4))
    few = operators.mesa(steps=5, ridge=0.2)
    o, state = sequence(few, *a, None, {}, decay=decay)
    assert np.linalg.norm(to_numpy(o[0, :, 0]) - want) < 4 * bound * np.linalg.norm(want)
    first, half = sequence(few, *(x[:, :9] for x in a), None, {}, decay=decay[:, :9])
    rest, last = sequence(few, *(x[:, 9:] for x in a), half, {}, decay=decay[:, 9:])
    assert_close("two calls", mx.concatenate([first, rest], axis=1), o, 1e-5)
    assert_close("S", last.S, state.S, 1e-6)


def test_first_ahla_is_a_of_v_plus_beta_a_v():
    q, k, v = (mx.array(normal(i, 2, 17, 2, 4).astype(np.float32)) for i in range(3))
    got, _ = sequence(operators.FIRST_AHLA, q, k, v, None, {"beta": 0.3}, scale=0.5)
    first, second = (f(q, k, v, scale=0.5)[0] for f in (mlx_hla.linear_attention, mlx_hla.ahla))
    assert_close("A (V + β A V)", got, first + 0.3 * second, 1e-5)


def test_the_library_keeps_its_own_operators():
    before = choices()
    arms.mixer("mesa", 32, 16)
    assert choices() == before
