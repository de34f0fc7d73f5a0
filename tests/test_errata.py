"""What the errata table says of the paper's formulas: each fails as printed and holds as mended."""

import importlib.util
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from mlx_hla import monoid, reference
from mlx_hla.reference import paper, paper_third

ROOT = Path(__file__).resolve().parents[1]


def load_script():
    spec = importlib.util.spec_from_file_location("errata_script", ROOT / "examples" / "errata.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


errata = load_script()
FINDINGS = {f.key: f for f in errata.measure()}


def sequence(seed):
    rng = np.random.default_rng(seed)
    q, k = rng.normal(size=(2, 40, 6)) / np.sqrt(6)
    return q, k, rng.normal(size=(40, 5))


@pytest.mark.parametrize("key", ["E1", "E2", "E3", "E4", "E5", "E6", "E7", "E8"])
def test_fails_as_printed_holds_as_mended(key):
    finding = FINDINGS[key]
    assert all(error > 0.05 for _, error in finding.printed), finding.printed
    assert finding.mended, key
    assert all(error < 1e-12 for _, error in finding.mended), finding.mended


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_findings_do_not_hang_on_one_sequence(seed):
    """E1, E3, E4, E6, E7, E8 on other sequences and shapes."""
    q, k, v = sequence(seed)
    for row in (
        errata.e1_decayed_monoid,
        errata.e3_ahla_decay,
        errata.e4_third_order,
        errata.e8_third_order_decay,
    ):
        finding = row(q, k, v)
        assert all(error > 0.05 for _, error in finding.printed), finding
        assert all(error < 1e-9 for _, error in finding.mended if finding.key != "E5"), finding


def test_without_decay_the_printed_monoids_hold():
    """E1, E3 and E8 are about decay: at γ = 1, Eqs. 4.1, 6.2 and 7.6-7.7 are associative."""
    q, k, v = sequence(4)
    for token, combine, field in (
        (paper.masked_token, paper.combine_masked, "G"),
        (paper.ahla_token, paper.combine_ahla, "E"),
        (paper_third.third_token, paper_third.combine_third, "F"),
    ):
        left, right = errata.bracketings([token(*x) for x in zip(q, k, v, strict=True)], combine)
        assert errata.distance(getattr(left, field), getattr(right, field)) < 1e-12


def test_e1_only_the_cross_summaries_break():
    """S, C and m of ⊕_γ are associative as printed; h fails with G."""
    q, k, v = sequence(5)
    tokens = [paper.masked_token(*x, 0.9) for x in zip(q, k, v, strict=True)]
    left, right = errata.bracketings(tokens, paper.combine_masked)
    for field in ("S", "C", "m"):
        assert errata.distance(getattr(left, field), getattr(right, field)) < 1e-12
    assert errata.distance(left.h, right.h) > 0.05
    good = errata.bracketings(tokens, partial(paper.combine_masked, attenuation=2))
    assert errata.distance(good[0].h, good[1].h) < 1e-12


def test_e2_the_mended_weights():
    """F_t = γ² F + S q v^T weights γ^{(t-i)+(t-j)} on i ≤ j ≤ t."""
    q, k, v = (x[:9] for x in sequence(6))
    A, want = q @ k.T, np.zeros((9, 5))
    for t in range(9):
        for j in range(t + 1):
            for i in range(j + 1):
                want[t] += 0.9 ** (2 * t - i - j) * A[t, i] * A[j, i] * v[j]
    assert errata.distance(errata.run("hla2", q, k, v, decay=0.9), want) < 1e-12


def test_e4_what_algorithm_3_computes():
    """The terms of (A A^T A) V in which the largest of the three indices is shared by two of them."""
    q, k, v = (x[:8] for x in sequence(7))
    A, want = q @ k.T, np.zeros((8, 5))
    for t in range(8):
        for i in range(t + 1):
            for u in range(t + 1):
                for j in range(t + 1):
                    if [i, u, j].count(max(i, u, j)) >= 2:
                        want[t] += A[t, i] * A[u, i] * A[u, j] * v[j]
    assert errata.distance(paper_third.algorithm_3(q, k, v), want) < 1e-11


def test_e5_sizes():
    """The exact scan's segment against the paper's, at d = d_v = 64."""
    d = 64
    exact = monoid.identity("hla3", d, d)
    assert sum(x.size for x in exact if isinstance(x, np.ndarray)) == 24_576
    printed = paper_third.third_identity(4, 4)
    assert printed.M_p.size == 4**3 * 4
    assert d**3 * d == 16_777_216


def test_algorithm_3_as_printed_does_not_reset_at_a_zero_decay():
    """Why convention='paper' clears its state at a segment border in place of setting g to 0."""
    q, k, v = (x[None, :, None] for x in sequence(8))
    g = np.ones((1, 40, 1))
    g[0, 20] = 0.0
    alone = reference.serial_hla3(q[:, 20:], k[:, 20:], v[:, 20:], convention="paper")[0]
    printed = reference.serial_hla3(q, k, v, decay=g, convention="paper")[0][:, 20:]
    ids = np.arange(40)[None] >= 20
    cut = reference.serial_hla3(q, k, v, segment_ids=ids, convention="paper")[0][:, 20:]
    assert errata.distance(printed, alone) > 0.05
    assert errata.distance(cut, alone) < 1e-12


def test_script_writes_and_checks_a_readme(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{errata.BEGIN}\nstale table\n{errata.END}\nafter\n", encoding="utf-8")
    assert errata.main(["--readme", str(readme), "--check"]) == 1
    assert errata.main(["--readme", str(readme)]) == 0
    assert errata.main(["--readme", str(readme), "--check"]) == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{errata.BEGIN}\n|")
    assert text.endswith(f"\n{errata.END}\nafter\n")
    assert "stale table" not in text
    assert errata.main([]) == 0
    assert "| E8 |" in capsys.readouterr().out


def test_script_refuses_a_readme_without_the_block(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("nothing here\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="no <!-- errata:begin -->"):
        errata.main(["--readme", str(readme)])
    with pytest.raises(SystemExit, match="no such file"):
        errata.main(["--readme", str(tmp_path / "absent.md")])


def test_the_page_holds_these_numbers():
    assert errata.PAGE.parent == Path(reference.__file__).parent
    assert errata.main(["--check"]) == 0
