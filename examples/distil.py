"""Swap half of a small Llama's layers for higher-order attention; win its loss back by training those alone.

A Llama of mlx-lm's own model file is trained on the Python standard library, every other layer is swapped,
and the new layers learn to say what the whole model said before (or, with --target text, the text itself).
Needs the extra `lm`.

    python examples/distil.py

As measured, MLX 0.32.4, two x86-64 cores with OpenBLAS and other work on them, one seed; the validation text
is the start of the held-out files, and bytes are those of all caches after so many tokens:

    model                     seconds  nats per byte    bytes at 256  bytes at 1,024  bytes at 4,096
    Llama                         134          1.594         524,288       2,097,152       8,388,608
    no attention in 1, 3            0          1.794
    layers 1, 3 swapped             0          1.727         317,440       1,103,872       4,249,600
    new layers trained            105          1.609         317,440       1,103,872       4,249,600

The attention of the two layers is worth 0.200 nats per byte, the swap costs 0.133 of them, training the new
layers wins 0.118 back. A small and hardly trained model: how to swap, not what a large one would lose.
"""

# ruff: noqa: E402
from mlx_hla.process import prefer_openblas

prefer_openblas()  # before MLX is imported

import argparse
import time
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx_lm.models import llama

from mlx_hla.data import Batches, bytes_per_token, encode_texts, load_corpus
from mlx_hla.losses import Scorer
from mlx_hla.mlx_lm import freeze_rest, swap
from mlx_hla.tokenizer import train_tokenizer

LENGTHS = (256, 1024, 4096)
CHUNK = 256


def make_llama(args: argparse.Namespace) -> llama.Model:
    fields = llama.ModelArgs(
        model_type="llama",
        hidden_size=args.dims,
        num_hidden_layers=args.layers,
        intermediate_size=2 * args.dims,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        vocab_size=args.vocab,
    )
    return llama.Model(fields)


def text_loss(model: nn.Module, tokens: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]).mean()


def teacher_loss(teacher: nn.Module) -> Callable[[nn.Module, mx.array], mx.array]:
    """Cross-entropy with the teacher's probabilities: its gradient is that of their divergence."""

    def loss(model: nn.Module, tokens: mx.array) -> mx.array:
        logits = model(tokens[:, :-1])
        want = mx.softmax(teacher(tokens[:, :-1]), axis=-1)
        return -(want * (logits - mx.logsumexp(logits, axis=-1, keepdims=True))).sum(-1).mean()

    return loss


def train(model: nn.Module, batches: Batches, loss_fn: Callable, steps: int, lr: float, name: str) -> float:
    warm_up = max(1, min(30, steps // 10))
    cosine = optim.cosine_decay(lr, max(1, steps - warm_up), 0.05 * lr)
    rate = optim.join_schedules([optim.linear_schedule(0.0, lr, warm_up), cosine], [warm_up])
    optimizer = optim.AdamW(rate, betas=[0.9, 0.95])
    value_and_grad = nn.value_and_grad(model, loss_fn)
    start = time.perf_counter()
    for step in range(steps):
        loss, grads = value_and_grad(model, batches[step])
        grads, _ = optim.clip_grad_norm(grads, 1.0)
        optimizer.update(model, grads)
        mx.eval(model.parameters(), optimizer.state, loss)
        if (step + 1) % max(1, steps // 5) == 0:
            print(f"    {name}: step {step + 1:4d} of {steps}, loss {loss.item():.3f}", flush=True)
    return time.perf_counter() - start


def state_bytes(model: nn.Module, length: int) -> int:
    """Bytes of the caches after so many tokens."""
    cache = model.make_cache()
    tokens = mx.zeros((1, CHUNK), mx.int32)
    for _ in range(length // CHUNK):
        model(tokens, cache=cache)
        mx.eval([c.state for c in cache])
    return sum(c.nbytes for c in cache)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Swap layers of a small Llama and recover its loss.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=600, help="steps of the Llama's training")
    parser.add_argument("--recover-steps", type=int, default=200, help="steps of the new layers' training")
    parser.add_argument(
        "--target", choices=("teacher", "text"), default="teacher", help="what they learn from"
    )
    parser.add_argument("--operator", default="hla2", help="of the new layers")
    parser.add_argument("--rope", action="store_true", help="keep rotary positions in the new layers")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate of the Llama")
    parser.add_argument("--recover-lr", type=float, default=4e-3, help="peak learning rate of the new layers")
    parser.add_argument("--dims", type=int, default=128, help="width")
    parser.add_argument("--layers", type=int, default=4, help="blocks")
    parser.add_argument("--vocab", type=int, default=1024, help="tokens in the vocabulary")
    parser.add_argument("--context", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=8, help="sequences per step")
    parser.add_argument("--max-bytes", type=int, default=2_000_000, help="bytes of the corpus to read")
    parser.add_argument("--valid-batches", type=int, default=32, help="batches of a validation")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches")
    args = parser.parse_args()

    corpus = load_corpus(valid_fraction=0.1, max_bytes=args.max_bytes)
    print(corpus.describe())
    tokenizer = train_tokenizer(corpus.train, args.vocab)
    args.vocab = tokenizer.vocab_size
    stream, valid = encode_texts(tokenizer, corpus.train), encode_texts(tokenizer, corpus.valid)
    sizes = bytes_per_token(tokenizer)
    mx.random.seed(args.seed)
    model, teacher = make_llama(args), make_llama(args)

    def score() -> float:
        options = {"batch_size": args.batch, "context": args.context, "dtype": mx.float32}
        scorer = Scorer(model, valid, sizes, max_batches=args.valid_batches, **options)
        return scorer(model.parameters())

    def held() -> list[int]:
        return [state_bytes(model, length) for length in LENGTHS]

    batches = Batches(stream, args.batch, args.context, args.seed)
    seconds = train(model, batches, text_loss, args.steps, args.lr, "the Llama")
    table = [("Llama", seconds, score(), held())]

    teacher.update(model.parameters())
    teacher.freeze()
    chosen = swap(model, "odd", args.operator, rope=args.rope)
    names = ", ".join(map(str, chosen))
    own = model.parameters()
    for i in chosen:  # what the swap is to be measured by: no attention at all in these layers
        output = model.layers[i].self_attn.o_proj
        output.weight = mx.zeros(output.weight.shape)
    table.append((f"no attention in {names}", 0.0, score(), []))
    model.update(own)
    table.append((f"layers {names} swapped", 0.0, score(), held()))

    freeze_rest(model)
    batches = Batches(stream, args.batch, args.context, args.seed + 1)
    loss_fn = teacher_loss(teacher) if args.target == "teacher" else text_loss
    seconds = train(model, batches, loss_fn, args.recover_steps, args.recover_lr, "the new layers")
    table.append(("new layers trained", seconds, score(), table[-1][-1]))

    heads = "".join(f"{f'bytes at {n:,}':>16}" for n in LENGTHS)
    print(f"\n{'model':24}{'seconds':>9}{'nats per byte':>15}{heads}")
    for name, seconds, loss, counts in table:
        print(f"{name:24}{seconds:9.0f}{loss:15.3f}" + "".join(f"{n:16,}" for n in counts))


if __name__ == "__main__":
    main()
