"""Measure where the formulas of "Higher-order Linear Attention" (arXiv 2510.27258) do not hold.

    python examples/errata.py                      print the table
    python examples/errata.py --readme FILE        rewrite the table between the file's errata markers
    python examples/errata.py --check              exit 1 if the table of mlx_hla/reference/README.md (or of
                                                   FILE) is not the one measured here

Every number is the relative Frobenius distance ‖printed − true‖ / ‖true‖ in float64 on one fixed random
sequence. The left one is the paper's formula as printed, the right one the form that this package runs.
"""

import argparse
import sys
from functools import partial, reduce
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlx_hla import monoid, reference
from mlx_hla.reference import paper, paper_third

PAGE = Path(__file__).resolve().parents[1] / "mlx_hla" / "reference" / "README.md"
BEGIN, END = "<!-- errata:begin -->", "<!-- errata:end -->"
T, D, V, CHUNK, GAMMA, SEED = 64, 8, 8, 16, 0.9, 0
EXACT = 1e-12


class Finding(NamedTuple):
    """One row. `printed`: (what, distance) pairs of the paper's formula; `mended`: the same of the repair."""

    key: str
    where: str
    claim: str
    printed: tuple[tuple[str, float], ...]
    remedy: str
    mended: tuple[tuple[str, float], ...]


def measure() -> list[Finding]:
    """All findings, on a fresh copy of the fixed sequence."""
    rng = np.random.default_rng(SEED)
    q, k = rng.normal(size=(2, T, D)) / np.sqrt(D)
    v = rng.normal(size=(T, V))
    rows = (e1_decayed_monoid, e2_serial_decay, e3_ahla_decay, e4_third_order, e5_segment_maps)
    rows += (e6_figure_1, e7_figure_2, e8_third_order_decay)
    return [row(q, k, v) for row in rows]


def e1_decayed_monoid(q, k, v):
    tokens = [paper.masked_token(*x, GAMMA) for x in zip(q, k, v, strict=True)]
    scan, serial = (f(q, k, v, gamma=GAMMA) for f in (paper.algorithm_1, paper.serial_section_4_3))
    left, right = bracketings(tokens, partial(paper.combine_masked, attenuation=2))
    o = np.stack([paper.read_masked(x, s) for x, s in zip(q, prefixes(tokens, 2), strict=True)])
    return Finding(
        "E1",
        "§4.2 with decay, Thm 4.1",
        "G_AB = ρ_B G_A + G_B + S_B(ρ_B C_A) is associative, and scans to the serial states",
        (
            ("two bracketings of G", distance(*(s.G for s in bracketings(tokens, paper.combine_masked)))),
            ("Alg. 1 (scan) against §4.3 (serial)", distance(scan, serial)),
        ),
        "G, and so F = SC − G, attenuates by ρ_B²",
        (
            ("two bracketings", distance(left.G, right.G)),
            ("outputs against the dense operator", distance(o, dense("hla2", q, k, v, decay=GAMMA))),
        ),
    )


def e2_serial_decay(q, k, v):
    tokens = [paper.masked_token(*x, GAMMA) for x in zip(q, k, v, strict=True)]
    folded = np.stack([paper.read_masked(x, s) for x, s in zip(q, prefixes(tokens, 1), strict=True)])
    serial = paper.serial_section_4_3(q, k, v, gamma=GAMMA)
    A, decay = np.tril(q @ k.T), reference.decay_matrix(np.full(T, GAMMA))
    want = dense("hla2", q, k, v, decay=GAMMA)
    return Finding(
        "E2",
        "§4.3, serial decay",
        "G_t = γG_{t−1} + k_t k_tᵀ C_{t−1} is the decayed analogue",
        (
            ("against the printed ⊕_γ, folded token by token", distance(serial, folded)),
            ("against (AAᵀ ⊙ L) weighted by γ^{t−j}", distance(serial, (decay * (A @ A.T)) @ v)),
            ("against S_tC_t restricted to the causal set", distance(serial, want)),
        ),
        "F_t = γ²F_{t−1} + S_t q_t v_tᵀ: weights γ^{(t−i)+(t−j)} on i ≤ j ≤ t",
        (("against the dense operator", distance(run("hla2", q, k, v, decay=GAMMA), want)),),
    )


def e3_ahla_decay(q, k, v):
    tokens = [paper.ahla_token(*x, GAMMA) for x in zip(q, k, v, strict=True)]
    left, right = bracketings(tokens, paper.combine_ahla)
    good_left, good_right = bracketings(tokens, partial(paper.combine_ahla, decay_r=False))
    serial = paper.algorithm_2(q, k, v, gamma=GAMMA)
    return Finding(
        "E3",
        "§6.2 with decay",
        "R decays (ρ_B R_A + R_B) and the concatenation is associative",
        (("two bracketings of E", distance(left.E, right.E)),),
        "R does not decay; Alg. 2, the serial form, is right as printed",
        (
            ("two bracketings", distance(good_left.E, good_right.E)),
            ("Alg. 2 against the dense operator", distance(serial, dense("ahla", q, k, v, decay=GAMMA))),
        ),
    )


def e4_third_order(q, k, v):
    want = dense("hla3", q, k, v)
    as_printed = paper_third.algorithm_3(q, k, v)
    repaired = paper_third.algorithm_3(q, k, v, repaired=True)
    return Finding(
        "E4",
        "Thm 7.1, Eq. 7.5, Algs. 3 and 4",
        "S S^Q P − G⁽¹⁾ − G⁽²⁾ − G⁽³⁾ is the masked (AAᵀA)V",
        (
            ("Alg. 3 against it", distance(as_printed, want)),
            ("Alg. 4 against it", distance(paper_third.algorithm_4(q, k, v, chunk=CHUNK), want)),
        ),
        'default `exact`; `convention="paper"` keeps Alg. 3. In the paper\'s own shape: G⁽²⁾ gains '
        "k kᵀ S^Q_{t−1} k vᵀ instead",
        (
            ("`exact`", distance(run("hla3", q, k, v), want)),
            ("Alg. 3 with that G⁽²⁾", distance(repaired, want)),
            ("`paper` against Alg. 3", distance(run("hla3", q, k, v, convention="paper"), as_printed)),
        ),
    )


def e5_segment_maps(q, k, v):
    segments = [monoid.from_token("hla3", *x) for x in zip(q, k, v, strict=True)]
    scanned = monoid.associative_scan(segments, monoid.combine, monoid.identity("hla3", D, V))
    o = np.stack([monoid.output(s, x) for s, x in zip(scanned, q, strict=True)])
    composed = paper_third.algorithm_3_composed(q, k, v)
    return Finding(
        "E5",
        "§7.3",
        "an exact third-order scan needs segment maps of d³d_v numbers",
        (),
        "no maps: the exact operator scans with three d×d and three d×d_v moments, and Alg. 3 is first-order "
        "passes in a row (at d = d_v = 64: 24,576 numbers a segment instead of 17 million)",
        (
            ("exact, scanned", distance(o, dense("hla3", q, k, v))),
            ("Alg. 3, composed", distance(composed, paper_third.algorithm_3(q, k, v))),
        ),
    )


def e6_figure_1(q, k, v):
    want = dense("hla2", q, k, v)
    return Finding(
        "E6",
        "Fig. 1 C",
        "a chunk's output is q_tᵀ(SC − G)_carry plus the chunk's own",
        ((f"chunks of {CHUNK}", distance(paper.figure_1c(q, k, v, CHUNK), want)),),
        "add the cross term q_tᵀ S_carry C_t, C_t of the chunk up to t",
        (("with it", distance(paper.figure_1c(q, k, v, CHUNK, cross_term=True), want)),),
    )


def e7_figure_2(q, k, v):
    want = dense("ahla", q, k, v)
    return Finding(
        "E7",
        "Fig. 2 C",
        "the carry enters as q_tᵀ(E + R_{<t} P)",
        ((f"chunks of {CHUNK}", distance(paper.figure_2c(q, k, v, CHUNK), want)),),
        "R_{≤t}: the token itself routes the carry",
        (("with it", distance(paper.figure_2c(q, k, v, CHUNK, include_token=True), want)),),
    )


def e8_third_order_decay(q, k, v):
    want = dense("hla3", q, k, v, decay=GAMMA)
    tokens = [paper_third.third_token(*x, GAMMA) for x in zip(q, k, v, strict=True)]
    left, right = bracketings(tokens, paper_third.combine_third)
    segments = [monoid.from_token("hla3", *x, GAMMA) for x in zip(q, k, v, strict=True)]
    good_left, good_right = bracketings(segments, monoid.combine)
    repaired = paper_third.algorithm_3(q, k, v, gamma=GAMMA, repaired=True)
    return Finding(
        "E8",
        "§7.3's last remark, Alg. 3 with decay",
        "decay comes in by scaling the carry once, as at second order; G⁽¹⁾..G⁽³⁾ decay by γ",
        (
            ("two bracketings of F", distance(left.F, right.F)),
            ("Alg. 3 with E4 mended against S_tS^Q_tP_t on the causal set", distance(repaired, want)),
        ),
        "F_t = γ³F_{t−1} + S_t q_t (q_tᵀP_t); in a scan F attenuates by ρ³, R and U by ρ²",
        (
            ("two bracketings", distance(good_left.F, good_right.F)),
            ("against the dense operator", distance(run("hla3", q, k, v, decay=GAMMA), want)),
        ),
    )


def bracketings(tokens, combine):
    """The sequence combined from the left, ((ab)c).., and from the right, a(b(c..))."""
    return reduce(combine, tokens), reduce(lambda right, left: combine(left, right), tokens[::-1])


def prefixes(tokens, attenuation):
    """Inclusive prefixes of ⊕_γ, folded from the left."""
    out = tokens[:1]
    for token in tokens[1:]:
        out.append(paper.combine_masked(out[-1], token, attenuation))
    return out


def distance(got, want):
    """‖got − want‖ / ‖want‖, Frobenius."""
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def dense(name, *qkv, **options):
    """A dense operator on one head: [T, d] in and out."""
    return getattr(reference, f"dense_{name}")(*(x[None, :, None] for x in qkv), **options)[0, :, 0]


def run(name, *qkv, **options):
    """A serial recurrence on one head: [T, d] in and out."""
    return getattr(reference, f"serial_{name}")(*(x[None, :, None] for x in qkv), **options)[0][0, :, 0]


def markdown(findings) -> str:
    """The table, with every distance that is zero to rounding written as a bound."""
    lines = ["| | where | printed | measured | what is true, and done here | measured |", "|" + "---|" * 6]
    for f in findings:
        cells = (f.key, f.where, f.claim, cell(f.printed), f.remedy, cell(f.mended))
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    lines.append(
        f"Relative Frobenius distance in float64: one head, T = {T}, d = d_v = {D}, seed {SEED}, q and k of "
        f"N(0, 1/d), v of N(0, 1), γ = {GAMMA} where there is decay. From `python examples/errata.py`."
    )
    return "\n".join(lines)


def cell(pairs):
    return "; ".join(f"{what}: {number(x)}" for what, x in pairs) or "–"


def number(x):
    return f"< {EXACT:.0e}".replace("e-", "e−") if x < EXACT else f"**{100 * x:.0f} %**"


def replace_block(text, table):
    """The page with its block between the markers replaced."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"errata: the page has no {BEGIN} .. {END} block")
    return f"{head}{begin}\n{table}\n{end}{tail}"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--readme", type=Path, help="rewrite the errata block of this file in place")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if the file's block differs"
    )
    args = parser.parse_args(argv)
    table = markdown(measure())
    if args.readme is None and not args.check:
        print(table)
        return 0
    path = args.readme or PAGE
    if not path.is_file():
        raise SystemExit(f"errata: no such file: {path}")
    text = path.read_text(encoding="utf-8")
    new = replace_block(text, table)
    if args.check:
        print(f"{path}: the errata table {'is up to date' if new == text else 'differs: run with --readme'}")
        return int(new != text)
    path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
