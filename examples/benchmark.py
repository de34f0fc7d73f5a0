"""Time the operators against softmax attention on this machine, forward and forward + backward.

    python examples/benchmark.py                      # sizes that suit the device
    python examples/benchmark.py --lengths 4096 65536 --heads 16 --dtype bfloat16 --compile
    python examples/benchmark.py --operators hla2 ahla --decay gate --json times.json --picture times.png

Each row is one length and decay: "gate", one per token and head as the layer has it by default, or "none".
Times are medians in milliseconds; `x` is the time of causal `mx.fast.scaled_dot_product_attention` divided by
the operator's in the same run. On a GPU each evaluation queues up to `--queue` independent calls (fewer from
8,192 tokens on), as the layers of a model do, so that the GPU's time is measured and not the launch;
`--queue 1` adds the launch. Memory is the peak of one forward and backward, inputs included, divided by the
bytes of q, k, v, o and their gradients. Below the table: from which length on an operator is faster than
softmax, interpolated between the lengths that were measured.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx

import mlx_hla
from mlx_hla.ops.operator import choices, find

OPERATORS = {name: getattr(mlx_hla, find(name).name) for name in choices()}


def median_ms(run, queue: int, seconds: float) -> float:
    """Median time of one run() over at least three evaluations and about this many seconds."""
    for _ in range(2):
        mx.eval([run() for _ in range(queue)])
    mx.synchronize()
    times = []
    while len(times) < 3 or (sum(times) < seconds and len(times) < 200):
        start = time.perf_counter()
        mx.eval([run() for _ in range(queue)])
        mx.synchronize()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times) / queue


def measure(attend, arrays, d_out, args) -> tuple[float, float, float]:
    """(forward ms, forward + backward ms, peak bytes of forward + backward with its inputs)."""

    def both(*arrays):
        return mx.vjp(attend, list(arrays), [d_out])

    forward, both = (mx.compile(f) if args.compile else f for f in (attend, both))
    queue = max(1, min(args.queue, args.queue * 8192 // arrays[0].shape[1]))
    forward_ms = median_ms(lambda: forward(*arrays), queue, args.seconds)
    both_ms = median_ms(lambda: both(*arrays), queue, args.seconds)
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    mx.eval(both(*arrays))
    return forward_ms, both_ms, mx.get_peak_memory()


def crossing(lengths: list[int], ratios: list[float]) -> str:
    """From which length on the ratio is at least 1, in words; log-log between two lengths."""
    above = [r >= 1 for r in ratios]
    if all(above):
        return f"ahead from {lengths[0]:,} tokens on, the shortest measured"
    if not above[-1]:
        return f"not ahead up to {lengths[-1]:,} tokens"
    i = len(above) - above[::-1].index(False)  # the first of those that stay ahead
    low, high = math.log(ratios[i - 1]), math.log(ratios[i])
    share = -low / (high - low)
    T = math.exp(math.log(lengths[i - 1]) + share * math.log(lengths[i] / lengths[i - 1]))
    return f"ahead from about {round(T, -2 if T > 1000 else -1):,.0f} tokens on"


def rows(args) -> Iterator[dict]:
    """A record for each length, decay and operator; with each the softmax of the same run."""
    dtype, scale = getattr(mx, args.dtype), args.dim**-0.5
    for T in args.lengths:
        shape = (args.batch, T, args.heads, args.dim)
        mx.random.seed(0)
        q, k, v, d_out = (mx.random.normal(shape).astype(dtype) for _ in range(4))
        decays = {
            "none": None,
            "head": mx.linspace(0.9, 0.999, args.heads),
            "gate": mx.random.uniform(0.9, 1.0, shape[:3]),
        }
        mx.eval(q, k, v, d_out, decays["head"], decays["gate"])
        base = measure(softmax_of(scale), [q, k, v], d_out, args)
        for name in args.decay:
            inputs = [q, k, v] + ([] if decays[name] is None else [decays[name]])
            for op in args.operators:

                def attend(q, k, v, decay=None, f=OPERATORS[op]):
                    return f(q, k, v, scale=scale, decay=decay, backend=args.backend)[0]

                forward, both, peak = measure(attend, inputs, d_out, args)
                yield {
                    "T": T,
                    "decay": name,
                    "operator": op,
                    "softmax_ms": base[:2],
                    "ms": [forward, both],
                    "times_softmax": [base[0] / forward, base[1] / both],
                    "memory": peak / (8 * q.nbytes),
                }


def softmax_of(scale: float):
    def softmax(q, k, v):
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        o = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal")
        return o.swapaxes(1, 2)

    return softmax


def line(found: list[dict]) -> str:
    """The records of one length and decay."""
    first = found[0]
    text = (
        f"{first['T']:8d} {first['decay']:>5} | {first['softmax_ms'][0]:8.2f} {first['softmax_ms'][1]:8.2f}"
    )
    for r in found:
        (forward, both), (x, y) = r["ms"], r["times_softmax"]
        text += f" | {forward:12.2f} {x:5.1f} {both:8.2f} {y:5.1f} {r['memory']:4.1f}"
    return text


def draw(found: list[dict], title: str, path: Path) -> None:
    """Forward and backward together against the length, on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6.4, 4), layout="constrained")
    lengths = sorted({r["T"] for r in found})
    softmax = {r["T"]: r["softmax_ms"][1] for r in found}
    ax.plot(lengths, [softmax[T] for T in lengths], "k--", label="softmax")
    for op, decay in dict.fromkeys((r["operator"], r["decay"]) for r in found):
        own = [r for r in found if (r["operator"], r["decay"]) == (op, decay)]
        ax.plot([r["T"] for r in own], [r["ms"][1] for r in own], "o-", label=f"{op}, decay {decay}")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlabel("tokens")
    ax.set_ylabel("forward + backward, ms")
    ax.set_title(title, fontsize=9)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def make_parser(gpu: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    default = [1024, 4096, 8192, 16384, 65536] if gpu else [1024, 4096]
    add("--lengths", type=int, nargs="+", default=default, help=f"default: {default}")
    kernels = [name for name in OPERATORS if find(name).family]  # those that have kernels of their own
    add("--operators", nargs="+", choices=OPERATORS, default=kernels, help=f"default: {' '.join(kernels)}")
    add("--batch", type=int, default=1, help="default: 1")
    add("--heads", type=int, default=16 if gpu else 4, help="default: %(default)s")
    add("--dim", type=int, default=64, help="of keys and values (default: 64)")
    dtype = "bfloat16" if gpu else "float32"
    add("--dtype", choices=["float32", "bfloat16", "float16"], default=dtype, help="default: %(default)s")
    decays = ["gate", "none"]
    add("--decay", nargs="+", choices=[*decays, "head"], default=decays, help="default: gate none")
    add("--backend", choices=["mlx", "metal", "cuda"], help="default: the library's own choice")
    add("--seconds", type=float, default=0.5, help="per figure (default: 0.5)")
    add("--queue", type=int, default=32 if gpu else 1, help="calls an evaluation (default: %(default)s)")
    add("--compile", action="store_true", help="measure under mx.compile")
    add("--json", type=Path, help="keep the figures in this file too")
    add("--picture", type=Path, help="draw them into this file; needs matplotlib")
    return parser


def main() -> None:
    gpu = mx.default_device() == mx.gpu
    args = make_parser(gpu).parse_args()
    args.lengths = sorted(set(args.lengths))
    name = mx.device_info().get("device_name", "CPU") if gpu else "CPU"
    title = f"MLX {mx.__version__} on {name}; B {args.batch}, {args.heads} heads of {args.dim}, {args.dtype}"
    print(f"{title}{', compiled' if args.compile else ''}; milliseconds")
    columns = "".join(f" | {op:>8} fwd     x  fwd+bwd     x  mem" for op in args.operators)
    print(f"{'T':>8} decay | sdpa fwd  fwd+bwd{columns}")
    found: list[dict] = []
    for record in rows(args):
        found.append(record)
        if len(found) % len(args.operators) == 0:
            print(line(found[-len(args.operators) :]), flush=True)
    for op in args.operators:
        for decay in args.decay:
            own = [r["times_softmax"] for r in found if (r["operator"], r["decay"]) == (op, decay)]
            forward, both = (crossing(args.lengths, [x[i] for x in own]) for i in (0, 1))
            print(f"{op}, decay {decay}: forward {forward}; with backward {both}")
    if args.json:
        args.json.write_text(
            json.dumps({"title": title, "compiled": args.compile, "rows": found}, indent=1) + "\n"
        )
    if args.picture:
        draw(found, title, args.picture)


if __name__ == "__main__":
    main()
