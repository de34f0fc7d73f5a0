"""Read one long prompt on several machines side by side, then write on one of them.

    mlx.launch -n 2 --backend ring -- python examples/long_prompt.py notes.txt
    mlx.launch --hostfile macs.json --backend ring -- python examples/long_prompt.py notes.txt

Every rank reads its stretch of the prompt (`mlx_hla.generate.read(..., group=...)`); what they exchange are
the layers' states, whose size does not depend on the prompt. Then all of them hold the whole prompt's state,
and rank 0 goes on alone. Without `mlx.launch` one process reads. Only models of constant state can.

All ranks must have the same model, prompt and versions, or each ends with a line that says in what they
differ; when one ends, so do the others, and when one is silent for MLX_HLA_PATIENCE seconds (default: 600).

On paper, for R ranks: a call of c tokens a rank (`--chunk`) exchanges what the model's state holds, s bytes
in n messages: one for each convolution, each window and each pass. A ring hands it on R - 1 times, which
takes (R - 1) (n l + s / w) at a latency l and a bandwidth w, whatever c is. One machine alone would read the
other ranks' tokens in (R - 1) c / r, at r tokens a second. So it pays from c > r (n l + s / w) on, for any R.
The shipped model has s = 2.4 MB and n = 15. Over Thunderbolt, w some 4 GB/s and l 50 us, the bracket is 1.4
ms: at 100,000 tokens a second 140 tokens a rank break even, and at the default of 512 two ranks read 1.6
times as fast as one. s grows with the square of the heads' width and with the layers, as a token's cost does.

Measured, two processes on two CPU cores: a layer over 2,048 tokens of its own costs a fifth more where it is
part of a split sequence. On cores that share their memory's bandwidth nothing is gained.
"""

import argparse
import sys
import time

from mlx_hla.process import prefer_openblas

prefer_openblas()  # before MLX is imported

from mlx_hla.errors import InputError  # noqa: E402
from mlx_hla.files import read_bytes  # noqa: E402
from mlx_hla.generate import read, stream_generate  # noqa: E402
from mlx_hla.launched import join  # noqa: E402
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
    try:
        read_and_write(args)
    except InputError as e:
        sys.exit(f"long_prompt: error: {e}")


def read_and_write(args: argparse.Namespace) -> None:
    group = join("long_prompt")  # None: this process is alone
    model, tokenizer = load(args.model)
    tokens = tokenizer.encode(read_bytes(args.prompt, 1 << 28).decode(), bos=True)
    start = time.perf_counter()
    state = read(model, tokens, chunk=args.chunk, group=group)
    seconds = time.perf_counter() - start
    if group is not None and group.rank():
        return
    for chunk in stream_generate(
        model, tokenizer, state, max_tokens=args.max_tokens, sampling=Sampling(seed=args.seed)
    ):
        sys.stdout.write(chunk.text)
        sys.stdout.flush()
    rate, ranks = len(tokens) / seconds, 1 if group is None else group.size()
    print(f"\n{len(tokens):,} tokens read on {ranks} ranks in {seconds:.2f} s, {rate:,.0f} a second")


if __name__ == "__main__":
    main()
