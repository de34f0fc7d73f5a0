"""Time the operators against softmax attention on this machine, forward and forward + backward.

    python examples/benchmark.py                      # sizes that suit the device
    python examples/benchmark.py --lengths 4096 65536 --heads 16 --dtype bfloat16
    python examples/benchmark.py --decay gate --operators hla2 ahla

Each row is one length. Times are medians in milliseconds; `x` is the time of causal
`mx.fast.scaled_dot_product_attention` divided by the operator's in the same run. On a GPU each evaluation
queues up to `--queue` independent calls (fewer from 8,192 tokens on), as the layers of a model do, so that
the GPU's time is measured and not the launch; `--queue 1` adds the launch. Memory is the peak of one
forward and backward, inputs included, divided by the bytes of q, k, v, o and their gradients.
"""

import argparse
import statistics
import time

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


def main() -> None:
    gpu = mx.default_device() == mx.gpu
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = [1024, 4096, 8192, 16384, 65536] if gpu else [1024, 4096]
    parser.add_argument("--lengths", type=int, nargs="+", default=default, help=f"default: {default}")
    kernels = [name for name in OPERATORS if find(name).family]  # those that have kernels of their own
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=kernels)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=16 if gpu else 4)
    parser.add_argument("--dim", type=int, default=64, help="of keys and values (default: 64)")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16" if gpu else "float32"
    )
    parser.add_argument("--decay", choices=["none", "head", "gate"], default="none")
    parser.add_argument("--backend", choices=["mlx", "metal"], help="default: the library's own choice")
    parser.add_argument("--seconds", type=float, default=0.5, help="per figure (default: 0.5)")
    parser.add_argument("--queue", type=int, default=32 if gpu else 1, help="calls an evaluation")
    parser.add_argument("--compile", action="store_true", help="measure under mx.compile")
    args = parser.parse_args()
    dtype = getattr(mx, args.dtype)
    name = mx.device_info().get("device_name", "CPU") if gpu else "CPU"
    print(
        f"MLX {mx.__version__} on {name}; B {args.batch}, {args.heads} heads of {args.dim}, {args.dtype},",
        end=" ",
    )
    print(f"decay {args.decay}; milliseconds")
    columns = "".join(f" | {op:>8} fwd     x  fwd+bwd     x  mem" for op in args.operators)
    print(f"{'T':>8} | sdpa fwd  fwd+bwd{columns}")
    scale = args.dim**-0.5
    for T in args.lengths:
        shape = (args.batch, T, args.heads, args.dim)
        mx.random.seed(0)
        q, k, v, d_out = (mx.random.normal(shape).astype(dtype) for _ in range(4))
        decay = None
        if args.decay == "head":
            decay = mx.linspace(0.9, 0.999, args.heads)
        elif args.decay == "gate":
            decay = mx.random.uniform(0.9, 1.0, shape[:3])
        inputs = [q, k, v] + ([] if decay is None else [decay])
        mx.eval(*inputs, d_out)

        def softmax(q, k, v):
            q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
            o = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal")
            return o.swapaxes(1, 2)

        base = measure(softmax, [q, k, v], d_out, args)
        row = f"{T:8d} | {base[0]:8.2f} {base[1]:8.2f}"
        for op in args.operators:

            def attend(q, k, v, decay=None, f=OPERATORS[op]):
                return f(q, k, v, scale=scale, decay=decay, backend=args.backend)[0]

            forward, both, peak = measure(attend, inputs, d_out, args)
            memory = peak / (8 * q.nbytes)
            row += (
                f" | {forward:12.2f} {base[0] / forward:5.1f} {both:8.2f} {base[1] / both:5.1f} {memory:4.1f}"
            )
        print(row, flush=True)


if __name__ == "__main__":
    main()
