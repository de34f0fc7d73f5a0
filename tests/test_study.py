"""The study's synthetic half: labels, the delta rule, the ensemble, equal states, results on disk."""

import json
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
import regression  # noqa: E402
import results  # noqa: E402
import run as runner  # noqa: E402
import tables  # noqa: E402
import tasks  # noqa: E402
from ensemble import Ensemble, Settings, class_loss, square_loss  # noqa: E402

import mlx_hla  # noqa: E402
from mlx_hla.ops.backend import sequence  # noqa: E402
from mlx_hla.ops.operator import choices  # noqa: E402

ALONE = [name for name in arms.ARMS if name != "window" or hasattr(mlx_hla.nn, "WindowAttention")]
RECURRENT = [name for name in ALONE if name not in ("softmax", "window")]


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


# ---- arms


def model(arm, task, **changes):
    shape = {"layers": 2, "dims": 32, "head_dim": 8} | changes
    return arms.Model(arm, inputs=task.inputs, outputs=task.outputs, real=task.real, **shape)


@pytest.mark.parametrize("head_dim", [16, 32])
def test_arms_have_equal_parameters_and_states(head_dim):
    task = tasks.TASKS["alias"]()
    sizes = {arm: arms.sizes(model(arm, task, dims=64, head_dim=head_dim)) for arm in ALONE}
    want = sizes["hla2"]
    for arm, got in sizes.items():
        assert got["parameters"] == pytest.approx(want["parameters"], rel=0.02), arm
        if arm != "softmax":
            bytes_, tolerance = got["mixers"][0]["state_bytes"], 0.07 if arm == "hla3" else 0.003
            assert bytes_ == pytest.approx(2 * 64 * head_dim * 4, rel=tolerance), arm


@pytest.mark.parametrize("arm", [*RECURRENT, "hla2+long+gate", "gdn+nodecay"])
def test_arms_go_on_from_their_cache(arm):
    mx.random.seed(0)
    task = tasks.TASKS["alias"](P=2)
    m = model(arm, task)
    x = mx.array(task.make(np.random.default_rng(0), 3).x)
    cache = [layer.mixer.make_cache() for layer in m.layers]
    parts = [m(x[:, :4], cache), m(x[:, 4:5], cache), m(x[:, 5:], cache)]
    assert_close(arm, mx.concatenate(parts, axis=1), m(x), 2e-5)


def test_arm_names():
    assert arms.parse("hla2+long+curriculum") == ("hla2", {"long", "curriculum"})
    for wrong in ("hla9", "hla2+fast"):
        with pytest.raises(ValueError, match="got"):
            arms.parse(wrong)
    long = model("hla2+long", tasks.TASKS["alias"]())
    gate = long.layers[0].mixer.decay_gate(mx.zeros((1, 1, 32)))
    assert gate.min().item() > 1 - 1 / 250


# ---- the ensemble


@pytest.mark.parametrize("arm", ALONE)
def test_members_train_as_they_would_alone(arm):
    """K members mapped at once, against one after the other, and against each in an ensemble of its own."""
    regress = arm in ("readout", "softmax")
    task = regression.regress(d=3, N=5) if regress else tasks.TASKS["alias"](P=2)
    loss = square_loss if regress else class_loss
    seeds, rates = [0, 1, 1], [1e-2, 1e-2, 3e-2]

    def ensemble(members, **options):
        picked = [seeds[i] for i in members], [rates[i] for i in members]
        return Ensemble(lambda: model(arm, task, layers=1), *picked, loss, Settings(4), **options)

    together, looped = ensemble([0, 1, 2]), ensemble([0, 1, 2], mapped=False)
    alone = [ensemble([i]) for i in range(3)]
    start = together.rows.params
    rng = np.random.default_rng(0)
    for t in range(1, 4):
        batch = [mx.array(a.reshape(3, 2, *a.shape[1:])) for a in task.make(rng, 6)[:3]]
        together.train(t, *batch)
        looped.train(t, *batch)
        for i, one in enumerate(alone):
            one.train(t, *(x[i : i + 1] for x in batch))
    moved = to_numpy(together.rows.params - start)
    assert (np.abs(moved).max(axis=1) > 1e-3).all()
    assert_close("one after the other", looped.rows.params - start, moved, 1e-3)
    each = mx.concatenate([one.rows.params for one in alone])
    assert_close("alone", each - start, moved, 1e-3)
    x = batch[0][0]
    assert_close("outputs", together.outputs(x, slice(1, 2)), alone[1].outputs(x), 1e-3)


def test_ensemble_learns():
    """Recall of two pairs, from chance to near certainty."""
    task = tasks.TASKS["recall"](P=2, names=4, values=4)
    e = Ensemble(lambda: model("first", task, layers=1), [0, 1], [3e-2, 1e-2], class_loss, Settings(120))
    rng = np.random.default_rng(0)
    for t in range(1, 121):
        batch = [mx.array(a.reshape(2, 16, *a.shape[1:])) for a in task.make(rng, 32)[:3]]
        losses = e.train(t, *batch)
    assert (to_numpy(losses) < 0.4).all(), losses


def test_curriculum_goes_on_for_those_who_have_learnt():
    task, rng = tasks.TASKS["alias"](P=3), np.random.default_rng(0)
    pairs = tasks.Pairs(task, frozenset(["curriculum"]), 2)
    drawn = pairs.draw(rng, (50, 2, 4)).reshape(50, 2, 4)
    assert (drawn.min(), drawn.max()) == (1, 2)
    for _ in range(3):
        pairs.learn([mx.array([0.1, 2.0]), mx.array([0.2, 0.0])])
    assert pairs.limits.tolist() == [3, 2]
    assert pairs.draw(rng, (50, 2, 4)).reshape(50, 2, 4).max(axis=(0, 2)).tolist() == [3, 2]
    assert tasks.Pairs(task, frozenset(["fixed"]), 2).draw(rng, (1, 2, 4)) == 3
    with pytest.raises(ValueError, match="no number of pairs"):
        tasks.Pairs(tasks.TASKS["copy"](), frozenset(["fixed"]), 2)


# ---- jobs, results, tables

SMALL = ["--steps=3", "--batch=2", "--test=8", "--held-out=8", "--dims=32", "--points=2"]
TINY = [*SMALL, "--head-dim=8", "--lrs", "1e-3", "1e-2"]


def command(monkeypatch, capsys, module, *args):
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, args)])
    module.main()
    return capsys.readouterr().out


def test_results_resume_and_make_tables(tmp_path, monkeypatch, capsys):
    args = ["alias", "--arms", "first", "hla2+curriculum+long", "--out", tmp_path, *TINY]
    said = command(monkeypatch, capsys, tasks, *args)
    assert said.count("accuracy") == 2
    files = sorted(tmp_path.iterdir())
    assert [f.stem for f in files] == ["alias-d8-first", "alias-d8-hla2+curriculum+long"]
    times = [f.stat().st_mtime_ns for f in files]
    one = json.loads(files[0].read_text())
    assert len(one["test"]["each"]) == 3
    assert np.shape(one["held_out"]) == np.shape(one["curve"]["loss"][0]) == (2, 3)
    assert one["model"]["parameters"] > 0 < one["model"]["mixers"][0]["state_bytes"]
    # What is there stays; what is not is computed; --again computes it once more, the same.
    files[1].unlink()
    said = command(monkeypatch, capsys, tasks, *args)
    assert "alias-d8-first: is there" in said
    assert said.count("accuracy") == 1
    assert files[0].stat().st_mtime_ns == times[0]
    command(monkeypatch, capsys, tasks, *args, "--again")
    assert files[0].stat().st_mtime_ns > times[0]
    assert {**json.loads(files[0].read_text()), "seconds": 0} == {**one, "seconds": 0}

    command(monkeypatch, capsys, tasks, "regress", "--arms", "gdn", "--out", tmp_path, *TINY)
    results.bundle(tmp_path, tmp_path / "all.json")
    found = results.read(tmp_path / "all.json")
    assert found == {f.stem: json.loads(f.read_text()) for f in tmp_path.glob("*-d8-*.json")}
    said = command(monkeypatch, capsys, tables, tmp_path / "all.json")
    for part in (
        "### alias, D = 8",
        "| `hla2+curriculum+long` |",
        "| pairs | 1 | 2 | 3 | 4 |",
        "| *ridge* |",
    ):
        assert part in said
    pytest.importorskip("matplotlib")
    import pictures

    said = command(monkeypatch, capsys, pictures, tmp_path, "--out", tmp_path / "pictures")
    assert len(said.split()) == 5
    assert all(Path(path).stat().st_size > 5000 for path in said.split())


def test_the_runner_keeps_whole_files(tmp_path, monkeypatch, capsys):
    out, bundle = tmp_path / "out", tmp_path / "all.json"
    args = ["--out", out, "--bundle", bundle, "--only", "alias-d16-first", "parity-d16-gdn", "--workers", 2]
    more = ["--", *SMALL, "--lrs=1e-3", "--seeds=1"]
    said = command(monkeypatch, capsys, runner, *args, "--minutes", 1, *more)
    assert "2 done, 0 failed, 0 left" in said
    assert set(results.read(bundle)) == {"alias-d16-first", "parity-d16-gdn"}
    said = command(monkeypatch, capsys, runner, *args, "--minutes", 1, *more)
    assert "0 done, 0 failed, 0 left" in said
    # Time that is over before a job can end leaves nothing behind.
    late = tmp_path / "late"
    said = command(
        monkeypatch,
        capsys,
        runner,
        "--out",
        late,
        "--only",
        "alias-d16-*",
        "--workers",
        1,
        "--minutes",
        0.002,
    )
    assert "ended before its time: alias-d16-first" in said
    assert not list(late.glob("*.json"))


def test_jobs_are_known_and_once():
    jobs = runner.jobs()
    assert len({j.key for j in jobs}) == len(jobs)
    for job in jobs:
        arms.parse(job.arm)
        assert job.task in tasks.TASKS
    assert [j.arm for j in jobs[:3]] == ["first", "gdn", "hla2"]
