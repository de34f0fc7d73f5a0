"""Read one long prompt on several machines side by side, then write on one of them.

    mlx.launch -n 2 --backend ring -- python examples/long_prompt.py notes.txt
    mlx.launch --hostfile macs.json --backend ring -- python examples/long_prompt.py notes.txt

Every rank reads its stretch of the prompt (`mlx_hla.generate.read(..., group=...)`); what they exchange are
the layers' states, whose size does not depend on the prompt. Then all of them hold the whole prompt's state,
and rank 0 goes on alone. Without `mlx.launch` one process reads. Only models of constant state can.

On paper: a call of `--chunk` tokens a rank exchanges what the model's state holds, 2.4 MB for the shipped
model, in one message for each convolution, window and pass, 15 of them. Over Thunderbolt (some 4 GB/s, 50 µs
a message) that is 1.4 ms. Measured, two processes on two CPU cores: a layer over 2,048 tokens of its own
costs a fifth more where it is part of a split sequence. So it pays where a chunk takes a rank clearly longer
than the exchange: long chunks, larger models. On cores that share their memory's bandwidth nothing is gained.
"""

import argparse
import sys
import time

from mlx_hla.process import prefer_openblas

prefer_openblas()  # before MLX is imported

import mlx.core as mx  # noqa: E402

from mlx_hla.files import read_bytes  # noqa: E402
from mlx_hla.generate import read, stream_generate  # noqa: E402
from mlx_hla.models import load  # noqa: E402
from mlx_hla.sampling import Sampling  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompt", help="a file with the prompt")
    parser.add_argument("--model", help="a model's folder; none: the one that ships")
    parser.add_argument("--chunk", type=int, default=512, help="tokens of a rank at a time (default: 512)")
    parser.add_argument("--max-tokens", type=int, default=100, help="default: 100")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    args = parser.parse_args()
    group = mx.distributed.init()
    model, tokenizer = load(args.model)
    tokens = tokenizer.encode(read_bytes(args.prompt, 1 << 28).decode(), bos=True)
    start = time.perf_counter()
    state = read(model, tokens, chunk=args.chunk, group=group)
    seconds = time.perf_counter() - start
    if group.rank():
        return
    for chunk in stream_generate(
        model, tokenizer, state, max_tokens=args.max_tokens, sampling=Sampling(seed=args.seed)
    ):
        sys.stdout.write(chunk.text)
        sys.stdout.flush()
    rate = len(tokens) / seconds
    print(f"\n{len(tokens):,} tokens read on {group.size()} ranks in {seconds:.2f} s, {rate:,.0f} a second")


if __name__ == "__main__":
    main()
