"""The study's language models: arms, what a run keeps, and runs that go on where they were ended."""

import json
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_hla.errors import InputError
from mlx_hla.models import LanguageModel, ModelConfig
from mlx_hla.nn import HLAttention

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "study"))
import language
import language_run
import texts
import throughput


@pytest.fixture(scope="module")
def folder(corpus):
    return corpus


def flags(folder, out, *more):
    own = ["--size", "tiny", "--context", "100", "--steps", "6", "--tokens", "200", "--lrs", "0.01"]
    return [*own, "--data", str(folder), "--out", str(out), *more]


def results(out):
    return {file.stem: json.loads(file.read_text()) for file in out.glob("tiny-*.json")}


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    more = ("--arms", "hla2", "softmax", "--seeds", "0", "1", "--bundle", str(out / "bundle.json"))
    assert language.main(flags(folder, out, *more)) == 0
    return out


def test_a_run_keeps_what_it_learnt_and_cost(whole):
    found = results(whole)
    assert sorted(found) == [f"tiny-{a}-s{s}-lr0.01-c100-n6" for a in ("hla2", "softmax") for s in (0, 1)]
    for result in found.values():
        assert [n for n, _ in result["losses"]] == [1, 2, 3, 4, 5, 6]
        assert result["losses"][-1][1] < result["losses"][0][1]
        assert 1 < result["nats_per_byte"] < 7
        assert [end for end, *_ in result["positions"]] == [64, 100]
        assert result["tokens_per_second"] > 0
        assert result["peak_memory"] > 4 * result["parameters"]
        assert result["tokens_per_step"] == 200
        assert result["config"]["vocab_size"] <= 512
    hla2, softmax = (found[f"tiny-{a}-s0-lr0.01-c100-n6"] for a in ("hla2", "softmax"))
    assert softmax["state_bytes"] > 2 * 2 * 100 * 32 * 4  # keys and values of two layers
    assert hla2["state_bytes"] < softmax["state_bytes"]
    assert json.loads((whole / "bundle.json").read_text()) == found


def test_positions_and_nats_per_byte_are_of_the_same_losses(whole, folder):
    result = results(whole)["tiny-hla2-s0-lr0.01-c100-n6"]
    args = language.make_parser().parse_args(flags(folder, whole))
    text = language.prepare(args)
    nats = sum(mean * count for _, mean, count in result["positions"])
    assert sum(count for *_, count in result["positions"]) == len(text.valid) - 1
    assert nats / text.sizes[text.valid[1:]].sum() == pytest.approx(result["nats_per_byte"], rel=1e-4)


def test_runs_that_are_there_are_not_repeated(whole, folder, monkeypatch, capsys):
    before = results(whole)
    monkeypatch.setattr(language, "take", None)
    assert language.main(flags(folder, whole, "--arms", "softmax", "hla2")) == 0
    assert results(whole) == before
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == ["tiny-hla2-lr0.01-c100-n6", "tiny-softmax-lr0.01-c100-n6"]
    assert all("±" in row and "2/2 seeds" in row for row in rows)


def test_a_text_that_is_there_serves_other_folders(whole, folder, tmp_path):
    (text,) = whole.glob("text-*.npz")
    out = tmp_path / "new" / "folder"
    assert language.main(flags(folder, out, "--arms", "softmax", "--text", str(text))) == 0
    assert list(results(out)) == ["tiny-softmax-s0-lr0.01-c100-n6"]


def test_a_folder_that_cannot_be_is_refused_before_training(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(language, "take", None)
    (tmp_path / "file").touch()
    assert language.main(flags(folder, tmp_path / "file" / "out")) == 1
    assert "cannot write into it" in capsys.readouterr().err


def test_a_run_that_is_out_of_time_leaves_nothing(folder, tmp_path, capsys):
    assert language.main(flags(folder, tmp_path, "--arms", "first", "ahla", "--minutes", "1e-9")) == 0
    assert not results(tmp_path)
    assert "no time left" in capsys.readouterr().out


def test_a_run_that_diverges_says_so(folder, tmp_path, capsys):
    more = ("--arms", "first", "--lrs", "1e30", "--bundle", str(tmp_path / "bundle"))
    assert language.main(flags(folder, tmp_path, *more)) == 0
    (result,) = results(tmp_path).values()
    assert result["diverged"]
    assert result["nats_per_byte"] is None
    assert "diverged" in capsys.readouterr().out
    assert "NaN" not in (tmp_path / "bundle").read_text()


def test_equal_seeds_begin_equal_and_others_do_not(folder, whole):
    found = results(whole)
    losses = {key: result["losses"][0][1] for key, result in found.items()}
    assert len(set(losses.values())) == 4
    args = language.make_parser().parse_args(flags(folder, whole))
    again = language.take(
        language.Run("tiny", "hla2", 1, 0.01, 100, 6),
        {"operator": "hla2"},
        language.prepare(args),
        args,
        1e12,
    )
    assert again["losses"] == found["tiny-hla2-s1-lr0.01-c100-n6"]["losses"]


def test_other_seeds_train_at_the_best_rate_alone(whole, folder, tmp_path):
    (text,) = whole.glob("text-*.npz")
    more = ("--arms", "first", "--lrs", "1e-4", "1e-2", "--seeds", "3", "4", "--choose", "--text", str(text))
    for lrs, seeds in (((1e-4,), (3,)), ((1e-4, 1e-2), (3, 4))):  # ended early, then gone on with
        own = ("--lrs", *map(str, lrs), "--seeds", *map(str, seeds))
        assert language.main([*flags(folder, tmp_path, *more), *own]) == 0
    found = {(r["seed"], r["lr"]): r["nats_per_byte"] for r in results(tmp_path).values()}
    assert found.keys() == {(3, 1e-4), (3, 1e-2), (4, 1e-2)}
    assert found[3, 1e-2] < found[3, 1e-4]


def test_throughput_times_steps_of_each_arm(tmp_path, capsys):
    path = tmp_path / "times.json"
    sizes = ["--size", "tiny", "--context", "16", "--tokens", "32", "--steps", "1", "--repeats", "2"]
    assert throughput.main([*sizes, "--arms", "softmax", "first", "--json", str(path)]) == 0
    assert throughput.main([*sizes, "--arms", "gdn", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert list(found) == [f"tiny-{arm}-c16" for arm in ("softmax", "first", "gdn")]
    for r in found.values():
        assert r["tokens_per_second"] == pytest.approx(32 / r["seconds_per_step"])
        assert r["parameters"] > 30_000
    assert "1.00x" in capsys.readouterr().out
    assert throughput.main([*sizes, "--arms", "nothing"]) == 1


def test_workers_give_what_one_process_gives(whole, folder, tmp_path, monkeypatch):
    """Each takes an arm, and begins again with what was compiled for the first seed."""
    monkeypatch.setenv("MLX_HLA_OPENBLAS", "0")  # the BLAS of this process, whichever that is
    more = ("--arms", "hla2", "softmax", "--seeds", "0", "1", "--workers", "2", "--minutes", "2")
    assert language.main(flags(folder, tmp_path, *more)) == 0
    found, alone = results(tmp_path), results(whole)
    assert len(found) == 4
    assert all(result["losses"] == alone[key]["losses"] for key, result in found.items())


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ("--arms hla9", "arms must be all, hla2"),
        ("--arms x=3", "must be NAME=JSON object"),
        ("--arms x={", "x: not valid JSON"),
        ('--arms x={"stacks":1}', r"this mlx_hla has no ModelConfig\.stacks"),
        ('--arms x={"operator":"hla9"}', "operator must be"),
        ("--steps 0", "steps must be at least 1"),
        ("--context 300", "tokens must be at least the context, 300, got 200"),
    ],
)
def test_bad_flags(folder, tmp_path, capsys, more, match):
    assert language.main(flags(folder, tmp_path, *more.split())) == 1
    assert match.replace("\\", "") in capsys.readouterr().err


@pytest.mark.parametrize(("one", "two"), [("first", "hla2"), ("gdn", "ahla"), ("window+gdn", "window+hla2")])
def test_the_arms_have_equal_states_and_parameters(one, two):
    models, states = [], []
    for arm in (language.ARMS[one], language.ARMS[two]):
        models.append(language_run.build(language_run.configure("mini", arm), arm, 0))
        states.append(language_run.state_bytes(models[-1], models[-1].parameters(), 300))
    assert states[0] == pytest.approx(states[1], rel=0.05)
    assert models[0].num_parameters == pytest.approx(models[1].num_parameters, rel=0.01)


def test_arms_by_name_and_json():
    assert "hla2" in language_run.arms_of(["all"])
    wide = language_run.arms_of(['wide={"operator": "hla2", "layers": ["window", "hla2"]}'])
    assert wide == {"wide": {"operator": "hla2", "layers": ("window", "hla2")}}


def test_the_delta_rule_takes_the_place_of_every_layer_with_its_weights():
    arm = language.ARMS["gdn"]
    config = language_run.configure("tiny", arm)
    model, plain = (language_run.build(config, a, 3) for a in (arm, {"matrices": 1}))
    new, old, first = (dict(tree_flatten(m.parameters())) for m in (model, plain, LanguageModel(config, 3)))
    assert not any(type(layer.mixer) is HLAttention for layer in model.layers)
    assert all(mx.array_equal(new[name], old[name]) for name in new.keys() & old.keys())
    matrices = [name for name in new.keys() & first.keys() if name.endswith("proj.weight")]
    assert len(matrices) > 8
    assert all(mx.array_equal(new[name], first[name]) for name in matrices)
    assert {name.split(".")[-1] for name in new.keys() - old.keys()} == {"beta_weight", "beta_bias"}
    logits = model(mx.zeros((1, 9), mx.int32))
    cache = model.make_cache()
    parts = [model(mx.zeros((1, n), mx.int32), cache) for n in (4, 5)]
    assert mx.allclose(mx.concatenate(parts, 1), logits, atol=1e-4)


def test_another_mixer_is_refused():
    with pytest.raises(InputError, match="mixer must be gdn"):
        language_run.build(ModelConfig(**language_run.SIZES["tiny"]), {"mixer": "rnn"}, 0)


def test_the_report_says_what_the_results_say(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["texts.py"])
    texts.main()
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    rows = [r for r in rows if len(r) > 2 and r[1][:1].isdigit()]
    told = {r[0]: float(r[1]) for r in rows[:9]}  # of 5.9 million parameters
    assert told["window+hla2"] < told["window"] < told["window+first"]
    report = (Path(texts.__file__).parent / "README.md").read_text(encoding="utf-8")
    swept = [r for r in rows[9:] if len(r) == 5 and "one seed" not in r]
    assert len(swept) >= 11
    for name, loss, *_ in [*rows[:9], *swept]:
        assert loss in report or f"{float(loss):.3f}" in report, name


def test_the_best_rate_is_the_first_seeds():
    runs = [
        {"seed": seed, "lr": lr, "nats_per_byte": loss}
        for seed, lr, loss in [(0, 1, 2.0), (0, 3, 1.5), (1, 3, 1.7), (1, 1, 1.0)]
    ]
    assert [r["nats_per_byte"] for r in texts.best_rate(runs)] == [1.5, 1.7]
