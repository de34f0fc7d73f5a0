"""The cost table: counts are proportional to the heads, and the report says what was counted."""

import sys
from pathlib import Path

import mlx.core as mx
import pytest
from standin import metal

from mlx_hla.kernels import plan

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import cost_table

pytestmark = pytest.mark.skipif(metal.why_not() is not None, reason=str(metal.why_not()))


def counts(family, heads, T=1024, D=16):
    arrays, state, _ = cost_table.inputs(family, T, D, mx.bfloat16, heads=heads)
    with metal.counters() as c:
        mx.eval(cost_table.run_sequence(family, *arrays, *state))
    return cost_table.moved(c), c.matrix_macs, c.launches


@pytest.mark.parametrize("family", cost_table.FAMILIES)
def test_one_head_counts_for_all(monkeypatch, family):
    metal.install(monkeypatch)
    monkeypatch.setattr(plan, "fill", lambda: 4)
    both = counts(family, 2)
    with cost_table.one_of(2):
        one = counts(family, 1)
    alone = counts(family, 1)
    assert both[0] == pytest.approx(2 * one[0], abs=16)  # placeholders of one element
    assert both[1:] == (2 * one[1], one[2])
    assert alone[0] > one[0]  # a head alone is cut into more blocks
    assert plan.fill() == 4


def test_rows_and_report(monkeypatch, tmp_path):
    metal.install(monkeypatch)
    rows = [
        *cost_table.sequence_rows(metal, "hla2", 64, 16, 64),
        cost_table.step_row(metal, "hla2", 64),
        cost_table.step_row(metal, "hla2", 64, "packed step"),
        cost_table.step_row(metal, "hla2", 64, "normalised step"),
    ]
    forward, _, step, packed, normalised = rows
    # One walk reads and writes all once; with whole blocks on the diagonal a token has 20 pairs, not 16.5.
    assert forward.launches == 1
    assert forward.traffic == pytest.approx(1, abs=0.01)
    assert forward.arithmetic == pytest.approx((20 * 4 * 16 + 4 * 256) / (16.5 * 4 * 16 + 4 * 256))
    assert step.traffic <= 1.05
    assert packed.traffic <= 1.05
    assert normalised.traffic <= 1.05
    assert normalised.launches == 1
    assert packed.bytes / step.bytes == pytest.approx(0.75, abs=0.01)

    text = cost_table.report(rows, 64)
    assert text.count("| hla2 ") == 5
    assert "A packed S saves 24.4% of the hla2 step's bytes at D = 64" in text
    assert "reached" not in text  # the targets are for 4,096 tokens
    lines = list(cost_table.targets([step, forward._replace(D=64, arithmetic=1.4)], 4096))
    assert lines == [
        "missed: hla2 forward (walk, 64 heads), traffic 1.00 of 2.5, arithmetic 1.40 of 1.3",
        "reached: hla2 step (one token), traffic 1.00 of 1.05",
    ]

    cut = cost_table.chips(metal, 64).splitlines()
    assert len(cut) == 4 + len(cost_table.CHIPS)
    assert cut[4].startswith("| M1 | 8 | 1 | 16 | 1.00 |")

    readme = tmp_path / "README.md"
    readme.write_text(f"a\n{cost_table.BEGIN}\nold\n{cost_table.END}\nb\n")
    cost_table.into_readme(readme, text)
    cost_table.into_readme(readme, text)
    assert readme.read_text() == f"a\n{cost_table.BEGIN}\n{text}\n{cost_table.END}\nb\n"
    readme.write_text("none")
    with pytest.raises(SystemExit, match="once each"):
        cost_table.into_readme(readme, text)


def test_the_page_has_a_place_for_it():
    text = (Path(__file__).parent.parent / "metal" / "README.md").read_text(encoding="utf-8")
    assert text.count(cost_table.BEGIN) == text.count(cost_table.END) == 1
    assert text.index(cost_table.BEGIN) < text.index(cost_table.END)
