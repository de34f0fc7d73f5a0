"""The study's synthetic half: arms of equal size, the ensemble, results on disk, tables and pictures."""

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import assert_close, to_numpy

STUDY = Path(__file__).resolve().parent.parent / "examples" / "study"
sys.path.insert(0, str(STUDY))

import arms  # noqa: E402
import regression  # noqa: E402
import results  # noqa: E402
import run as runner  # noqa: E402
import tables  # noqa: E402
import tasks  # noqa: E402
from ensemble import Ensemble, Settings, class_loss, square_loss  # noqa: E402

ALONE = list(arms.ARMS)
RECURRENT = [name for name in ALONE if name not in ("softmax", "window")]


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
