"""The command line: `mlx-hla generate | train | eval | info | finetune | fuse | selftest | lm`.

Flags are the fields of the dataclasses that they fill. What a user got wrong is told in one line on stderr,
with a non-zero exit status: 1, or 2 for flags that do not parse; 130 after Ctrl-C. MLX_HLA_DEBUG=1 shows the
traceback.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from mlx_hla import __version__
from mlx_hla.errors import InputError, about_import
from mlx_hla.flags import add_fields, given
from mlx_hla.process import give_up_stdout, hint_at_openblas, open_standard_streams, prefer_openblas
from mlx_hla.progress import progress

MAX_PROMPT_BYTES = 1 << 24
LONG_PROMPT = 2000  # characters whose reading is felt on a CPU


class Command(NamedTuple):
    """A subcommand. Another one is another row of COMMANDS."""

    about: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]  # returns the exit status


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        message = " ".join(message.split())
        if len(message) > 600:  # it repeats what came
            message = f"{message[:200]} ... {message[-200:]}"
        sys.stderr.write(f"mlx-hla: error: {message} (try {self.prog} --help)\n")
        sys.exit(2)


# --- generate


def _generate_arguments(parser):
    from mlx_hla.sampling import Sampling

    add = parser.add_argument
    add("--prompt", help="text to continue; -, or no --prompt: read it from stdin")
    add("--model", help="folder of a model; by default the one that ships with the package")
    add("--adapter", metavar="FOLDER", help="an adapter of finetune's, on top of the model that it is for")
    add("--max-tokens", type=int, default=256, help="tokens at most")
    add("--save-state", metavar="FILE", help="keep what the prompt leaves in the model, to go on from later")
    add("--load-state", metavar="FILE", help="go on from there; --prompt, if given, is read after it")
    add("--stop", action="append", default=[], help=r"stop before this text (\n and \t count); repeatable")
    add("--json", action="store_true", help="print one JSON object instead of the stream")
    add("--quiet", action="store_true", help="print the text only")
    add_fields(parser, Sampling)


def _load(args):
    """(model, tokenizer) of --model, with --adapter on top."""
    if args.adapter is None:
        return importlib.import_module("mlx_hla.models").load(args.model)
    return importlib.import_module("mlx_hla.tune").load_adapted(args.adapter, args.model)


def _generate(args) -> int:
    from mlx_hla.generate import stream_generate
    from mlx_hla.sampling import Sampling

    sampling = Sampling(**given(args, Sampling))
    # What was read before needs no more text to go on; stdin is then read only if asked for.
    prompt = "" if args.load_state is not None and args.prompt is None else _read_prompt(args.prompt)
    if len(prompt) > LONG_PROMPT:
        hint_at_openblas()
    model, tokenizer = _load(args)
    stops = [s.replace("\\n", "\n").replace("\\t", "\t") for s in args.stop]
    chunks = stream_generate(
        model,
        tokenizer,
        _after_state(args, model, tokenizer, prompt),
        max_tokens=args.max_tokens,
        sampling=sampling,
        stop=stops,
    )
    text = []
    show = not args.json
    for i, chunk in enumerate(chunks):
        if show:
            sys.stdout.write(prompt * (i == 0) + chunk.text)
            sys.stdout.flush()
        text.append(chunk.text)
    if args.json:
        numbers = {k: v for k, v in vars(chunk).items() if k not in ("text", "token")}
        print(json.dumps({"prompt": prompt, "completion": "".join(text), **numbers}))
        return 0
    print()
    if not args.quiet:
        print("=" * 10)
        print(f"Prompt: {chunk.prompt_tokens} tokens, {chunk.prompt_tps:.3f} tokens-per-sec")
        print(f"Generation: {chunk.generation_tokens} tokens, {chunk.generation_tps:.3f} tokens-per-sec")
        print(f"Peak memory: {chunk.peak_memory:.3f} GB")
    return 0


def _after_state(args, model, tokenizer, prompt: str):
    """What to go on from: the prompt, or what the model holds of it where states are loaded or saved."""
    from mlx_hla.generate import read
    from mlx_hla.models.snapshot import load_snapshot, save_snapshot

    if args.load_state is None and args.save_state is None:
        return prompt
    state = None if args.load_state is None else load_snapshot(args.load_state, model)
    if prompt or state is None:
        state = read(model, tokenizer.encode(prompt, bos=state is None), state)
    if args.save_state is not None:
        save_snapshot(args.save_state, model, state)
        size = os.path.getsize(args.save_state) / 1e6
        sys.stderr.write(f"mlx-hla: state after {state.length} tokens in {args.save_state}, {size:.2f} MB\n")
    return state


def _read_prompt(prompt: str | None) -> str:
    stdin = sys.stdin  # None where it was closed
    if (prompt is None and (stdin is None or stdin.isatty())) or (prompt == "-" and stdin is None):
        raise InputError("no prompt: give --prompt TEXT, or text on stdin")
    if prompt is None or prompt == "-":
        try:
            data = stdin.buffer.read(MAX_PROMPT_BYTES + 1)
            if len(data) > MAX_PROMPT_BYTES:
                raise InputError(f"the prompt on stdin is larger than {MAX_PROMPT_BYTES} bytes")
            prompt = data.decode()
        except UnicodeDecodeError as e:
            raise InputError(f"the prompt on stdin is no UTF-8 (byte {e.start})") from None
    if not prompt:
        raise InputError("the prompt has no tokens: give some text to continue")
    return prompt


# --- eval


def _eval_arguments(parser):
    from mlx_hla.sampling import Sampling

    add = parser.add_argument
    add("--model", help="folder of a model; by default the one that ships with the package")
    add("--data", help="folder or file of text; by default the Python standard library")
    add("--suffix", help="read the files of a folder that end so, as .swift,.h")
    add("--valid-fraction", type=float, default=0.05, help="share of the files that validate, as in training")
    add("--batch-size", type=int, default=8, help="windows at a time")
    add("--valid-batches", type=int, default=0, help="batches at most; 0: all of the validation text")
    add("--samples", type=int, default=0, help="functions to complete and to parse as Python; 0: none")
    add("--max-tokens", type=int, default=256, help="tokens of a completion at most")
    add("--show", type=int, default=0, help="print this many of the samples")
    add("--json", action="store_true", help="print one JSON object")
    add_fields(parser, Sampling, Sampling(seed=0))


def _eval(args) -> int:
    from mlx_hla import data, evaluate
    from mlx_hla.devices import compute_dtype
    from mlx_hla.models import load
    from mlx_hla.sampling import Sampling

    for name, least in {
        "batch_size": 1,
        "valid_batches": 0,
        "samples": 0,
        "max_tokens": 1,
        "show": 0,
    }.items():
        if getattr(args, name) < least:
            raise InputError(f"{name} must be at least {least}, got {getattr(args, name)}")
    sampling = Sampling(**{"seed": 0, **given(args, Sampling)})
    model, tokenizer = load(args.model)
    corpus = data.load_corpus(args.data, args.valid_fraction, suffix=args.suffix)
    scorer = evaluate.Scorer(
        model,
        data.encode_texts(tokenizer, corpus.valid),
        data.bytes_per_token(tokenizer),
        batch_size=args.batch_size,
        context=model.config.context,
        dtype=compute_dtype(),
        max_batches=args.valid_batches,
    )
    hint_at_openblas()
    result: dict[str, Any] = {"corpus": corpus.describe(), "valid_bytes": scorer.bytes}
    with progress(scorer.batches, "batch") as one_more:
        result["nats_per_byte"] = scorer(model.parameters(), one_more)
    samples: list[str] = []
    if args.samples:
        headers = evaluate.function_headers(corpus.valid)
        with progress(args.samples, "sample") as one_more:
            share, count, samples = evaluate.parse_share(
                model,
                tokenizer,
                headers,
                samples=args.samples,
                max_tokens=args.max_tokens,
                sampling=sampling,
                on_sample=one_more,
            )
        result |= {"samples": count, "parse_share": share, "sampling": vars(sampling)}
    if args.json:
        print(json.dumps(result))
        return 0
    print(result["corpus"])
    print(f"{result['nats_per_byte']:.4f} nats per byte over {scorer.bytes:,} bytes")
    if args.samples:
        print(f"{share:.1%} of {count} sampled functions parse as Python")
    for text in samples[: args.show]:
        print("-" * 10 + ("" if evaluate.parse(text) else " does not parse"), text, sep="\n")
    return 0


# --- info


def _info_arguments(parser):
    parser.add_argument("--model", help="folder of a model; by default the one that ships with the package")
    parser.add_argument("--adapter", metavar="FOLDER", help="an adapter of finetune's, to tell of with it")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _info(args) -> int:
    import mlx.core as mx

    from mlx_hla.models import PRETRAINED
    from mlx_hla.models.io import WEIGHTS, read_header
    from mlx_hla.models.quantization import entry_of, parameter_counts
    from mlx_hla.nn.cache import cache_bytes

    about = importlib.import_module("mlx_hla.tune.commands").about(args.adapter)
    folder = args.model or about.pop("base", None) or PRETRAINED
    model, tokenizer = _load(args)
    config = model.config
    parts = {"embedding": 0, "mixers": 0, "mlps": 0, "norms": 0}
    for name, count in parameter_counts(model).items():
        kind = "mixers" if ".mixer." in name else "mlps" if ".mlp." in name else name.split(".")[0]
        parts[kind if kind in parts else "norms"] += count
    state: dict[str, int] = {}
    for tokens in (1, 1024):
        cache = model.make_cache()
        model.features(mx.full((1, tokens), tokenizer.bos_id), cache)
        state[str(tokens)] = cache_bytes(cache)
    result: dict[str, Any] = {
        "model": str(folder),
        "config": dataclasses.asdict(config),
        "quantization": entry_of(model),
        "parameters": model.num_parameters,
        "parameters_by_part": parts,
        "weights_bytes": os.path.getsize(os.path.join(folder, WEIGHTS)),
        "weights_dtypes": sorted({d for d, _ in read_header(os.path.join(folder, WEIGHTS)).values()}),
        "state_bytes_after_tokens": state,
        **about,
    }
    if args.json:
        print(json.dumps(result))
        return 0
    print(f"{folder}: {config.mixer_name}, {model.num_parameters:,} parameters")
    print("  " + ", ".join(f"{part} {n:,}" for part, n in parts.items()))
    print(f"  weights: {result['weights_bytes'] / 1e6:.2f} MB of {', '.join(result['weights_dtypes'])}")
    shown = ", ".join(f"{n:,} bytes after {tokens} tokens" for tokens, n in state.items())
    print(f"  state of one text: {shown}")
    if about:
        print(f"  adapter: {json.dumps(about['adapter'])}")
    if result["quantization"]:
        print(f"  quantization: {json.dumps(result['quantization'])}")
    for name, value in result["config"].items():
        print(f"  {name}: {value}")
    return 0


def _late(about: str, module: str, add_arguments: str = "add_arguments", run: str = "run") -> Command:
    """A command by the names of its functions, in a module that is imported when one is called."""

    def function(name: str) -> Callable[[Any], Any]:
        return lambda value: getattr(importlib.import_module(f"mlx_hla.{module}"), name)(value)

    return Command(about, function(add_arguments), function(run))


# --- lm


def _lm_arguments(parser):
    add = parser.add_argument
    add("lm_command", metavar="COMMAND", help="generate, server, lora, fuse, convert or another of mlx-lm's")
    add("arguments", nargs=argparse.REMAINDER, help="its own flags; --help lists them")


def _lm(args) -> int:
    from mlx_hla import mlx_lm

    return mlx_lm.run(args.lm_command, args.arguments)


COMMANDS = {
    "generate": Command("continue a text", _generate_arguments, _generate),
    "train": _late("train a model, on the Python standard library or your text", "train.command"),
    "eval": Command("nats per byte of held-out text; share of samples that parse", _eval_arguments, _eval),
    "info": Command("what a model is made of", _info_arguments, _info),
    "finetune": _late("adapt a model to your text: LoRA, DoRA or full", "tune.commands"),
    "fuse": _late("write a model and its adapter as one", "tune.commands", "fuse_arguments", "run_fuse"),
    "selftest": _late("run every kernel on this machine's GPU and check it", "selftest"),
    "lm": Command("run a command of mlx-lm's, which then knows these models", _lm_arguments, _lm),
}


def make_parser(chosen: str | None = None) -> argparse.ArgumentParser:
    """The parser; only the chosen command's flags are filled in, so that its imports alone are paid for."""
    parser = _Parser(prog="mlx-hla", description="Higher-order linear attention: language models in MLX.")
    parser.add_argument("--version", action="version", version=f"mlx-hla {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name, command in COMMANDS.items():
        sub = subparsers.add_parser(
            name,
            help=command.about,
            description=command.about,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        if name == chosen:
            command.add_arguments(sub)
    return parser


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    open_standard_streams()
    prefer_openblas()
    try:
        chosen = next((a for a in argv if not a.startswith("-")), None)
        args = make_parser(chosen).parse_args(argv)
        status = COMMANDS[args.command].run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except BrokenPipeError:
        give_up_stdout()  # the reader has gone
        return 141
    except Exception as e:
        if os.environ.get("MLX_HLA_DEBUG"):
            raise
        kind = "" if isinstance(e, InputError | OSError | ImportError) else f"{type(e).__name__}: "
        text = about_import(e) if isinstance(e, ImportError) else str(e)
        message, status = kind + (" ".join(text.split()) or type(e).__name__), 1
        give_up_stdout()
    sys.stderr.write(f"mlx-hla: error: {message}\n")
    return status
