"""Time one more token after many: each operator by its state, softmax attention by its keys and values.

    python examples/benchmark_decode.py                          # sizes that suit the device
    python examples/benchmark_decode.py --lengths 1024 1048576 --batch 1 32 --operators hla2 --dtype bfloat16

Each row is a batch and the tokens that were read before, by the operator itself. Milliseconds are medians
over runs of `--tokens` tokens, each fed the state of the one before, under mx.compile, the lengths of an
operator by turns. `x` is the time of softmax over the operator's, `copy` the operator's over the time that
this device takes to copy as many bytes as the state has, each read and written once, as a step must. Softmax
is `mx.fast.scaled_dot_product_attention` of one query on keys and values of that length, without the time to
store new ones.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import mlx.core as mx

import mlx_hla
from mlx_hla.ops.operator import choices, find

PIECE = 8192  # tokens that are read at once


def timed(run: Callable[[], object]) -> float:
    """Milliseconds of one run."""
    start = time.perf_counter()
    mx.eval(run())
    mx.synchronize()
    return 1e3 * (time.perf_counter() - start)


def medians_ms(runs: list[Callable[[], object]], seconds: float) -> list[float]:
    """Median time of each, over at least three runs and about this many seconds of it.

    They take turns: what disturbs the machine for a while disturbs all of them alike.
    """
    for run in runs:
        timed(run)
    times = [[timed(run) for run in runs] for _ in range(3)]
    while sum(map(sum, times)) < seconds * len(runs) and len(times) < 200:
        times.append([timed(run) for run in runs])
    return [statistics.median(each) for each in zip(*times, strict=True)]


def arrays_of(state: object) -> list[mx.array]:
    return [x for x in state if isinstance(x, mx.array)]  # type: ignore[attr-defined]


def copy_ms(nbytes: int, seconds: float) -> float:
    """Time to read and to write so many bytes, measured on 256 MB or more, eight times over."""
    x = mx.zeros(max(nbytes, 2**28) // 4)

    def run() -> mx.array:
        y = x
        for _ in range(8):
            y = y + 1
        return y

    return medians_ms([run], seconds)[0] / 8 * nbytes / x.nbytes


def operator_ms(name: str, B: int, args) -> tuple[list[float], int]:
    """(milliseconds of a token after each of the lengths, bytes of the state)."""
    operator, dtype = find(name), getattr(mx, args.dtype)
    read, step = getattr(mlx_hla, operator.name), getattr(mlx_hla, f"{operator.name}_step")
    how = {"scale": args.dim**-0.5, "backend": args.backend}

    def tokens(T: int) -> list[mx.array]:
        shape = (B, T, args.heads, args.dim)
        qkv = [mx.random.normal(shape).astype(dtype) for _ in range(3)]
        return [*qkv, mx.random.uniform(0.9, 1.0, shape[:3])]

    *one, decay = (x[:, 0] for x in tokens(1))
    mx.eval(one, decay)
    state, done, held = None, 0, []
    for T in args.lengths:
        while done < T:
            *qkv, g = tokens(min(PIECE, T - done))
            state = read(*qkv, decay=g, initial_state=state, **how)[1]
            mx.eval(arrays_of(state))
            done += qkv[0].shape[1]
        held.append(arrays_of(state))

    def write(*arrays: mx.array) -> list[mx.array]:
        given = iter(arrays)  # a state's fields are arrays or None
        before = type(state)(*(next(given) if isinstance(x, mx.array) else None for x in state))
        o, after = step(*one, before, decay=decay, **how)
        return [o, *arrays_of(after)]

    one_more = mx.compile(write)

    def run(arrays: list[mx.array]) -> list[mx.array]:
        for _ in range(args.tokens):
            o, *arrays = one_more(*arrays)
        return [o, *arrays]

    times = medians_ms([partial(run, arrays) for arrays in held], args.seconds)
    return [ms / args.tokens for ms in times], sum(x.nbytes for x in held[0])


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

    return medians_ms([run], args.seconds)[0] / args.tokens


def rows(args) -> Iterator[dict]:
    """The records of a batch and a length, softmax's among them."""
    for B in args.batch:
        each = {name: operator_ms(name, B, args) for name in args.operators}
        copies = {name: copy_ms(nbytes, args.seconds) for name, (_, nbytes) in each.items()}
        for i, T in enumerate(args.lengths):
            row: dict = {"batch": B, "T": T, "softmax_ms": softmax_ms(B, T, args), "operators": {}}
            mx.clear_cache()
            for name, (times, nbytes) in each.items():
                found = {"ms": times[i], "state_bytes": nbytes, "copies": times[i] / copies[name]}
                row["operators"][name] = found
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
    most = 2**33 if gpu else 2**31  # MLX's kernels have no more than 2^32 threads
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
