"""Time one more token after many: each operator by its state, softmax attention by its keys and values.

    python examples/benchmark_decode.py                          # sizes that suit the device
    python examples/benchmark_decode.py --lengths 1024 1048576 --batch 1 32 --operators hla2 --dtype bfloat16

Each row is a batch and the tokens that were read before, by the operator itself. Milliseconds are medians
over runs of `--tokens` tokens, each fed the state of the one before, under mx.compile; `x` is the time of
softmax over the operator's, `copy` the operator's over the time that this device takes to copy as many
bytes as the state has, each read and written once, as a step must. Softmax is
`mx.fast.scaled_dot_product_attention` of one query on keys and values of that length, without the time to
store new ones.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx

import mlx_hla
from mlx_hla.ops.operator import choices, find

PIECE = 8192  # tokens that are read at once


def median_ms(run: Callable[[], object], seconds: float) -> float:
    """Median time of one run over at least three and about this many seconds."""
    for _ in range(2):
        mx.eval(run())
    mx.synchronize()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < seconds and len(times) < 200):
        start = time.perf_counter()
        mx.eval(run())
        mx.synchronize()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def arrays_of(state: object) -> list[mx.array]:
    return [x for x in state if isinstance(x, mx.array)]  # type: ignore[attr-defined]


def copy_ms(nbytes: int, seconds: float) -> float:
    """Time to read and to write so many bytes, measured on 256 MB or more."""
    x = mx.zeros(max(nbytes, 2**28) // 4)
    return median_ms(lambda: x + 1, seconds) * nbytes / x.nbytes


def operator_ms(name: str, B: int, lengths: list[int], args) -> Iterator[tuple[float, int]]:
    """(milliseconds of a token, bytes of the state) after each of the lengths, in order."""
    operator, dtype = find(name), getattr(mx, args.dtype)
    read, step = getattr(mlx_hla, operator.name), getattr(mlx_hla, f"{operator.name}_step")
    how = {"scale": args.dim**-0.5, "backend": args.backend}

    def tokens(T: int) -> list[mx.array]:
        shape = (B, T, args.heads, args.dim)
        qkv = [mx.random.normal(shape).astype(dtype) for _ in range(3)]
        return [*qkv, mx.random.uniform(0.9, 1.0, shape[:3])]

    *one, decay = (x[:, 0] for x in tokens(1))
    mx.eval(one, decay)
    state, done = None, 0

    def write(*held: mx.array) -> list[mx.array]:
        given = iter(held)  # a state's fields are arrays or None
        before = type(state)(*(next(given) if isinstance(x, mx.array) else None for x in state))
        o, after = step(*one, before, decay=decay, **how)
        return [o, *arrays_of(after)]

    one_more = mx.compile(write)

    def run() -> list[mx.array]:
        held = arrays_of(state)
        for _ in range(args.tokens):
            o, *held = one_more(*held)
        return [o, *held]

    for T in lengths:
        while done < T:
            *qkv, g = tokens(min(PIECE, T - done))
            state = read(*qkv, decay=g, initial_state=state, **how)[1]
            mx.eval(arrays_of(state))
            done += qkv[0].shape[1]
        yield median_ms(run, args.seconds) / args.tokens, sum(x.nbytes for x in arrays_of(state))


def softmax_ms(B: int, T: int, args) -> float | None:
    """None where keys and values would take more than --most bytes."""
    dtype = getattr(mx, args.dtype)
    shape = (B, args.heads, T, args.dim)
    if 2 * B * args.heads * T * args.dim * dtype.size > args.most:
        return None
    q = mx.random.normal((B, args.heads, 1, args.dim)).astype(dtype)
    k, v = (mx.random.normal(shape).astype(dtype) for _ in range(2))
    mx.eval(q, k, v)

    def run() -> mx.array:
        x = q
        for _ in range(args.tokens):
            x = mx.fast.scaled_dot_product_attention(x, k, v, scale=args.dim**-0.5)
        return x

    return median_ms(run, args.seconds) / args.tokens


def rows(args) -> Iterator[dict]:
    """The records of a batch and a length, softmax's among them."""
    for B in args.batch:
        each = {name: operator_ms(name, B, args.lengths, args) for name in args.operators}
        for T in args.lengths:
            softmax = softmax_ms(B, T, args)
            mx.clear_cache()
            row: dict = {"batch": B, "T": T, "softmax_ms": softmax, "operators": {}}
            for name, times in each.items():
                ms, nbytes = next(times)
                copies = ms / copy_ms(nbytes, args.seconds)
                row["operators"][name] = {"ms": ms, "state_bytes": nbytes, "copies": copies}
            yield row


def line(row: dict) -> str:
    softmax = row["softmax_ms"]
    text = f"{row['batch']:5d} {row['T']:10,d} | {'' if softmax is None else f'{softmax:.4f}':>10}"
    for r in row["operators"].values():
        times = "" if softmax is None else f"{softmax / r['ms']:.1f}"
        text += f" | {r['ms']:12.4f} {times:>7} {r['copies']:6.1f}"
    return text


def make_parser(gpu: bool) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    lengths = [1024, 16384, 131072, 1048576] if gpu else [1024, 4096, 16384]
    add("--lengths", type=int, nargs="+", default=lengths, help=f"tokens read before (default: {lengths})")
    batch = [1, 32] if gpu else [1, 8]
    add("--batch", type=int, nargs="+", default=batch, help=f"default: {batch}")
    kernels = [name for name in choices() if find(name).family]  # those that have kernels of their own
    add("--operators", nargs="+", choices=choices(), default=kernels, help=f"default: {' '.join(kernels)}")
    add("--heads", type=int, default=16 if gpu else 4, help="default: %(default)s")
    add("--dim", type=int, default=64, help="of keys and values (default: 64)")
    dtype = "bfloat16" if gpu else "float32"
    add("--dtype", choices=["float32", "bfloat16", "float16"], default=dtype, help="default: %(default)s")
    add("--backend", choices=["mlx", "metal", "cuda"], help="default: the library's own choice")
    add("--tokens", type=int, default=32, help="of a run (default: %(default)s)")
    add("--seconds", type=float, default=0.3, help="per figure (default: %(default)s)")
    most = 2**35 if gpu else 2**31
    add("--most", type=int, default=most, help="bytes of softmax's keys and values (default: %(default)s)")
    add("--json", type=Path, help="keep the figures in this file too")
    return p


def main() -> None:
    gpu = mx.default_device() == mx.gpu
    args = make_parser(gpu).parse_args()
    args.lengths = sorted(set(args.lengths))
    name = mx.device_info().get("device_name", "CPU") if gpu else "CPU"
    title = f"MLX {mx.__version__} on {name}; {args.heads} heads of {args.dim}, {args.dtype}"
    print(f"{title}; milliseconds for a token")
    columns = "".join(f" | {op:>12} {'x':>7} {'copy':>6}" for op in args.operators)
    print(f"batch     tokens |    softmax{columns}")
    found = []
    for row in rows(args):
        found.append(row)
        print(line(row), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"title": title, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
