"""What the Metal kernels move and compute, counted on a CPU, and the time that no GPU can beat.

    python examples/cost_table.py                             # about a minute; prints Markdown
    python examples/cost_table.py --readme metal/README.md    # and puts it between that file's cost markers

Needs the development extra, `pip install -e ".[dev]"`: the kernels run on the tests' stand-in for Metal,
which counts. bfloat16, B = 1, one query head per key-value head, a decay per token, first states,
normalisation only where a row says so.

traffic     device bytes that the threads ask for, no cache helping, over the compulsory bytes: each input
            and output of the operation once. Forward: q, k, v, g, first state, o, last state. Backward: q,
            k, v, g, first state and the gradients of o and the last state; those of q, k, v, g and the first
            state. Step: the token's q, k, v, g and o, and the state twice. Left out: shapes, strides and the
            few numbers that a kernel gets as arguments.
arithmetic  multiply-accumulates over the minimum. Sequences: those of the 8 x 8 x 8 matrix products (a block
            on the diagonal counts in full) over those of one fused walk in chunks of W = 32 tokens from the
            inputs alone: per token, `a` products of (W + 1) / 2 causal pairs by D and `b` products of D by
            D, with a and b in PRODUCTS. That S is symmetric makes the minimum no smaller. Steps: scalar
            products over three for each element of the whole state (decay, update, read).
loads       loads and stores of a simdgroup from and to device memory, and threadgroup memory, for each 8 x 8
            x 8 product; of a step, for each 32 multiply-accumulates. A vector counts once.
in flight   accumulators that the products work on in turn, on average: a product waits for the last one with
            its accumulator. At most 8 are seen.
barriers    of one threadgroup, summed over the launches.
bound       for 16 heads, the larger of bytes / bandwidth and issue / peak, and which of them it is (b or f).
            A multiply-accumulate is two flops, and a load or store takes the place of one for 32 lanes, 64
            flops. No forecast: launches, occupancy and waits come on top.

What is counted is one head, run as one of several: blocks are cut as the schedule rule cuts them for that
many heads, and every count is proportional to the heads (tests/test_cost_table.py shows it). Threadgroup
bytes are the largest kernel's.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from mlx_hla import kernels
from mlx_hla.kernels import gpu, plan
from mlx_hla.ops import on_kernels
from mlx_hla.ops.checks import Call, Dims
from mlx_hla.ops.operator import OPERATORS, Held

W = 32
SHOWN_HEADS = 16
# Operators with kernels of their own, lowest order first.
FAMILIES = [o.label for o in sorted(OPERATORS.values(), key=lambda o: o.order) if o.family]
PACKED = [name for name in FAMILIES if any(slot.symmetric for slot in OPERATORS[name].slots)]

# (a triangular products, b square products) per token of one fused walk; a backward recomputes what its
# forward held. P = QK' is formed once per decay power, and products that share an operand are added first:
# hla2 backward: QK', PK, QK~', dO V', dP2 K~, dP2' Q, P2' dO, dK~ K', dP1 K, dP1' Q, P' dK~ are its eleven.
PRODUCTS = {
    "first": {"forward": (2, 2), "backward": (5, 5)},
    "hla2": {"forward": (4, 4), "backward": (11, 10)},
    "ahla": {"forward": (3, 4), "backward": (8, 11)},
    "hla3": {"forward": (5, 6), "backward": (14, 16)},
}


class Chip(NamedTuple):
    name: str
    gbytes: float  # memory bandwidth, GB/s
    tflops: float  # float32


# Bandwidth: Apple's technical specifications (M1: 128 bits of LPDDR4X-4266). Float32 rates: M1 as Apple
# announced it in November 2020; the others are third-party figures, from the table of Hugging Face's
# huggingface.js (packages/tasks/src/hardware.ts). On M1 to M4 float16 is no faster and simdgroup_matrix uses
# the same units (github.com/philipturner/metal-benchmarks); the M5's matrix units in each core are not
# counted. A fanless M5 was measured at 3.8 TFLOP/s and 122 GB/s
# (michaelstinkerings.org/apple-m5-gpu-roofline-analysis), so take every bound here as optimistic.
CHIPS = (
    Chip("M1", 68.25, 2.6),
    Chip("M3 Max", 400, 14.2),  # 40 cores
    Chip("M4 Max", 546, 18.4),  # 40 cores
    Chip("M5", 153, 5.7),  # 10 cores
)


class Row(NamedTuple):
    family: str
    kind: str  # forward, backward, or a step: plain, packed, normalised
    D: int
    heads: int
    traffic: float
    arithmetic: float
    threadgroup_bytes: int
    launches: int
    device: float  # loads and stores for each product
    threadgroup: float
    in_flight: float
    barriers: int
    bytes: int  # of one head
    flops: int  # and what loads and stores take the place of


class Target(NamedTuple):
    family: str
    kind: str
    heads: int
    traffic: float
    arithmetic: float | None


# At D = 64 and T = 4,096.
TARGETS = (
    Target("hla2", "forward", 64, 2.5, 1.3),
    Target("hla2", "forward", 16, 2.5, 1.3),
    Target("hla2", "forward", 1, 2.5, 1.3),
    Target("hla2", "backward", 16, 4, None),
    Target("ahla", "forward", 16, 2.5, None),
    Target("hla3", "forward", 16, 3, None),
    *(Target(family, "step", 16, 1.05, None) for family in FAMILIES),
    *(Target(family, "packed step", 16, 1.05, None) for family in PACKED),
    Target("hla2", "normalised step", 16, 1.05, None),
)


def stand_in():
    """The stand-in for Metal of the tests, installed, or an error that says what is missing."""
    tests = Path(__file__).resolve().parent.parent / "tests"
    if not (tests / "standin" / "metal.py").is_file():
        sys.exit(f"cost_table: needs a checkout of the repository: there is no {tests / 'standin'}")
    sys.path.insert(0, str(tests))
    try:
        from standin import metal
    except ImportError as e:
        sys.exit(f'cost_table: the stand-in for Metal cannot run ({e}); pip install -e ".[dev]"')
    if metal.why_not():
        sys.exit(f'cost_table: the stand-in for Metal cannot run: {metal.why_not()}; pip install -e ".[dev]"')
    mx.fast.metal_kernel = metal.metal_kernel
    mx.compile = lambda f=None, **_: f if f is not None else (lambda g: g)
    return metal


@contextlib.contextmanager
def wanting(threadgroups: int):
    """Plan for a GPU that so many threadgroups fill."""
    fill, plan.fill = plan.fill, lambda: threadgroups
    try:
        yield
    finally:
        plan.fill = fill


def one_of(heads: int):
    """Plan for one head as if it were one of `heads`: the rule wants so many threadgroups of all together."""
    return wanting(plan.ceil_div(plan.fill(), heads))


ASIDE = ("_shape", "_strides", "ints", "floats")


def moved(counters) -> int:
    """Bytes asked for, but for shapes, strides and scalar arguments."""
    tables = (counters.read, counters.written)
    return sum(n for table in tables for name, n in table.items() if not name.endswith(ASIDE))


def inputs(family: str, T: int, D: int, dtype: mx.Dtype, seed: int = 0, heads: int = 1):
    mx.random.seed(seed)
    q, k, v, do = (0.3 * mx.random.normal((1, T, heads, D)).astype(dtype) for _ in range(4))
    g = mx.random.uniform(0.9, 1, (1, T, heads))
    state = []
    for slot in OPERATORS[family].slots:
        x = 0.1 * mx.random.normal(slot.shape(Dims(1, heads, heads, D, D)))
        state.append(x + x.swapaxes(2, 3) if slot.symmetric else x)
    mx.eval(q, k, v, do, g, state)
    return (q, k, v, g), tuple(state), do


def call(family: str, q, k, v, g, eps: float | None = None) -> Call:
    """A call as the operator's checks leave it."""
    options = {option.name: option.default for option in OPERATORS[family].options}
    return Call(family, q, k, v, g, q.shape[-1] ** -0.5, eps is not None, eps or 0.0, options=options)


def state_of(family: str, matrices, vectors=()):
    """The operator's state of its arrays, with their normalisers where there are any."""
    slots, vectors = OPERATORS[family].slots, iter(vectors)
    return OPERATORS[family].state_of(
        {
            s.key: Held(x, next(vectors, None) if s.normaliser else None)
            for s, x in zip(slots, matrices, strict=True)
        }
    )


def run_sequence(family: str, q, k, v, g, *state):
    """[o, the last state's arrays] by the kernels."""
    place = on_kernels.KernelSequence(OPERATORS[family], call(family, q, k, v, g), state_of(family, state))
    o, last = place.run()
    return o, *(x.matrix for x in OPERATORS[family].held(last).values())


def row(family, kind, D, heads, c, macs, compulsory, minimum) -> Row:
    data = moved(c)
    ratios = (data / compulsory, macs / minimum)
    device, threadgroup = c.device_loads + c.device_stores, c.threadgroup_loads + c.threadgroup_stores
    products = 32 * (c.matrix_multiplies or macs / 32)  # a simdgroup's 32 lanes load side by side
    moves = (device / products, threadgroup / products)
    barriers = sum(one.barriers // one.threadgroups for one in c.each)
    flops = 2 * macs + 2 * (device + threadgroup)
    return Row(
        family,
        kind,
        D,
        heads,
        *ratios,
        c.threadgroup_bytes,
        c.launches,
        *moves,
        c.in_flight,
        barriers,
        data,
        flops,
    )


def sequence_rows(metal, family: str, T: int, D: int, heads: int, dtype=mx.bfloat16, backward=True):
    """The rows of the forward and the backward over a sequence."""
    arrays, state, do = inputs(family, T, D, dtype)
    tokens, states = sum(x.nbytes for x in arrays), sum(x.nbytes for x in state)
    least = {
        "forward": tokens + do.nbytes + 2 * states,
        "backward": 2 * tokens + do.nbytes + 3 * states,
    }

    run = partial(run_sequence, family)
    with one_of(heads), metal.counters() as c:
        mx.eval(run(*arrays, *state))
    yield sequence_row(family, "forward", T, D, heads, c, least["forward"])
    if not backward:
        return

    def forgotten(*args):  # kernels run when they are called, so the counters start anew after the forward
        out = run(*args)
        c.__init__()
        return out

    with one_of(heads), metal.counters() as c:
        mx.eval(mx.vjp(forgotten, [*arrays, *state], [do, *(x + 1 for x in state)])[1])
    yield sequence_row(family, "backward", T, D, heads, c, least["backward"])


def sequence_row(family, kind, T, D, heads, c, compulsory) -> Row:
    minimum = minimum_macs(family, kind, T, D)
    return row(family, kind, D, heads, c, c.matrix_macs, compulsory, minimum)


def minimum_macs(family: str, kind: str, T: int, D: int) -> float:
    triangles, squares = PRODUCTS[family][kind]
    return T * (triangles * (W + 1) / 2 * D + squares * D * D)


def step_row(metal, family: str, D: int, kind: str = "step", dtype=mx.bfloat16) -> Row:
    arrays, state, o = inputs(family, 1, D, dtype)
    q, k, v, g = (x[:, 0] for x in arrays)
    packed, eps, vectors = kind == "packed step", 1e-6 if kind == "normalised step" else None, []
    if eps:  # a vector beside each matrix that holds values
        slots = zip(OPERATORS[family].slots, state, strict=True)
        vectors = [x[..., 0] for slot, x in slots if slot.normaliser]
    elements = sum(x.size for x in (*state, *vectors))
    if packed:
        state = (kernels.pack(state[0]), *state[1:])
        mx.eval(state)
    with metal.counters() as c:
        before = state_of(family, state, vectors)
        mx.eval(on_kernels.step(OPERATORS[family], call(family, q, k, v, g, eps), before, packed))
    token = sum(x.nbytes for x in (q, k, v, g, o))
    compulsory = token + 2 * sum(x.nbytes for x in (*state, *vectors))
    return row(family, kind, D, SHOWN_HEADS, c, c.scalar_macs, compulsory, 3 * elements)


def measure(metal, T: int, dims: list[int]) -> list[Row]:
    rows, start = [], time.perf_counter()

    def add(*new):
        rows.extend(new)
        print(f"{time.perf_counter() - start:5.0f} s  {' '.join(map(str, new[-1][:4]))}", file=sys.stderr)

    for D in dims:
        for family in FAMILIES:
            add(*sequence_rows(metal, family, T, D, 16))
            if family in kernels.FUSED:  # the rule: 64 heads are walked from end to end
                add(*sequence_rows(metal, family, T, D, 64, backward=False))
            if family == "hla2":  # and one head is cut the finest
                add(*sequence_rows(metal, family, T, D, 1, backward=False))
            add(step_row(metal, family, D))
            if family in PACKED:
                add(step_row(metal, family, D, "packed step"))
            if family == "hla2":
                add(step_row(metal, family, D, "normalised step"))
    return rows


# ---- the report


def bound(r: Row, chip: Chip) -> str:
    bandwidth = SHOWN_HEADS * r.bytes / chip.gbytes / 1e3  # microseconds
    arithmetic = SHOWN_HEADS * r.flops / chip.tflops / 1e6
    which = "b" if bandwidth >= arithmetic else "f"
    most = max(bandwidth, arithmetic)
    return f"{most:.1f} {which}" if most < 100 else f"{most:,.0f} {which}"


def head_count(n: int) -> str:
    return f"{n} head{'s' * (n > 1)}"


def schedule(r: Row, T: int) -> str:
    if "step" in r.kind:
        return "one token"
    with one_of(r.heads):
        n = plan.blocks(T, 1).count
    return "walk" if n == 1 else f"{n} blocks"


NOTES = {
    "a": "Fused up to D = 96, HLA3 up to 80. At 128 two states of 64 KiB overrun the registers: passes run "
    "one after the other; each reads its operands, forms its own scores and writes its result for the next.",
    "b": "Cut into blocks, so that few heads fill a GPU: what the blocks' sums are made of is read again (k, "
    "and in AHLA and HLA3 v), what comes between the passes is written and read again (K̃, r), and float32 "
    "states go through memory at every border: one is as many bytes as 32 tokens of q, k, v and o at D = 64, "
    "as 64 tokens at D = 128. Shorter blocks cost more. By the second read of v AHLA misses its target.",
    "c": "Each first-order pass goes back in two walks, one for the queries' gradient and one for the keys', "
    "values' and decay's; each reads its operands and forms its own scores. For the decay's gradient the "
    "state before every eighth chunk goes through memory, in float32 before every chunk. A chunk with a "
    "decay below 1/4 among slow ones (here there is none) reads up to seven chunks' keys and values again.",
}


def notes(r: Row, T: int) -> list[str]:
    """The letters of NOTES that say what a row takes beyond the minimum."""
    if "step" in r.kind:
        return []
    if r.kind == "backward":
        return ["c"]
    letters = "" if r.family == "first" or plan.fused(r.family, r.D) else "a"
    return list(letters + ("" if schedule(r, T) == "walk" else "b"))


def targets(rows: list[Row], T: int):
    """One line for each target: the number, and whether it is reached."""
    for t in TARGETS:
        r = next((r for r in rows if (*r[:2], r.D, r.heads) == (t.family, t.kind, 64, t.heads)), None)
        if r is None or T != 4096:
            continue
        parts, missed = [], False
        for name, got, most in (
            ("traffic", r.traffic, t.traffic),
            ("arithmetic", r.arithmetic, t.arithmetic),
        ):
            if most is not None:
                missed |= got > most
                parts.append(f"{name} {got:.2f} of {most:g}")
        why = "".join(f" ({x})" for x in notes(r, T)) if missed else ""
        where = schedule(r, T) + ("" if "step" in t.kind else f", {head_count(t.heads)}")
        verdict = "missed" if missed else "reached"
        yield f"{verdict}: {t.family} {t.kind} ({where}), {', '.join(parts)}{why}"


def report(rows: list[Row], T: int) -> str:
    chips = " | ".join(f"{c.name}, µs" for c in CHIPS)
    lines = [
        f"Counted on the CPU stand-in, bfloat16, T = {T:,} tokens a sequence; bounds for {SHOWN_HEADS} heads "
        "(b: by bytes, f: by what is issued).",
        "",
        f"| kernel | D | schedule | traffic | arithmetic | loads, device and threadgroup | in flight | "
        f"barriers | threadgroup bytes | launches | {chips} |",
        "|---|--:|---|--:|--:|--:|--:|--:|--:|--:|" + "--:|" * len(CHIPS),
    ]
    used = set()
    for r in rows:
        used.update(notes(r, T))
        marks = "".join(f" ({x})" for x in notes(r, T))
        walked = schedule(r, T) + ("" if "step" in r.kind else f", {head_count(r.heads)}")
        bounds = " | ".join(bound(r, c) for c in CHIPS)
        lines.append(
            f"| {r.family} {r.kind}{marks} | {r.D} | {walked} | {r.traffic:.2f} | {r.arithmetic:.2f} | "
            f"{r.device:.2f}, {r.threadgroup:.2f} | {r.in_flight:.1f} | {r.barriers:,} | "
            f"{r.threadgroup_bytes:,} | {r.launches} | {bounds} |"
        )
    lines += [f"\n({letter}) {text}" for letter, text in NOTES.items() if letter in used]
    lines += ["", *saving(rows)]
    reached = [f"- {line}" for line in targets(rows, T)]
    lines += ["", "Targets at D = 64 and T = 4,096:", "", *reached] if reached else []
    return "\n".join(lines)


def saving(rows: list[Row]):
    """What the upper triangle of S saves in a step, of all the bytes it asks for."""
    by = {(r.family, r.kind, r.D): r.bytes for r in rows}
    for (family, kind, D), packed in by.items():
        if kind == "packed step":
            whole = by[family, "step", D]
            yield (
                f"- A packed S saves {1 - packed / whole:.1%} of the {family} step's bytes at D = {D} "
                f"({whole:,} to {packed:,} for a head and token)."
            )


def chips(metal, T: int) -> str:
    """How one call is cut for each chip, and what that costs."""
    lines = [
        f"HLA2 forward of {head_count(SHOWN_HEADS)} of 64, cut for {gpu.METAL.per_core} threadgroups a core."
        f" The table above is cut for {gpu.METAL.fill}, as for an Apple GPU of unknown cores.",
        "",
        "| chip | cores | blocks | threadgroups | traffic | arithmetic | bound, µs |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for chip in CHIPS:
        cores = gpu.CORES[chip.name]
        with wanting(gpu.METAL.per_core * cores):
            (r,) = sequence_rows(metal, "hla2", T, 64, SHOWN_HEADS, backward=False)
            n = plan.blocks(T, SHOWN_HEADS).count
        lines.append(
            f"| {chip.name} | {cores} | {n} | {n * SHOWN_HEADS} | {r.traffic:.2f} | {r.arithmetic:.2f} | "
            f"{bound(r, chip)} |"
        )
    return "\n".join(lines)


BEGIN, END = "<!-- cost:begin -->", "<!-- cost:end -->"


def into_readme(path: Path, text: str) -> None:
    whole = path.read_text(encoding="utf-8")
    if whole.count(BEGIN) != 1 or whole.count(END) != 1 or whole.index(BEGIN) > whole.index(END):
        sys.exit(f"cost_table: {path} must have {BEGIN} and, after it, {END}, once each")
    before, rest = whole.split(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=4096, help="length of a sequence (default: 4096)")
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128], help="head dimensions")
    parser.add_argument(
        "--readme", type=Path, metavar="FILE", help=f"write between {BEGIN} and {END} here too"
    )
    args = parser.parse_args()
    metal = stand_in()
    text = report(measure(metal, args.tokens, args.dims), args.tokens) + "\n\n" + chips(metal, args.tokens)
    print(text)
    if args.readme:
        into_readme(args.readme, text)


if __name__ == "__main__":
    main()
