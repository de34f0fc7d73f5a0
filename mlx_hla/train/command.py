"""The command `mlx-hla train`, and the flag of all that train."""

from __future__ import annotations

import argparse

from mlx_hla.errors import InputError
from mlx_hla.flags import add_fields, given
from mlx_hla.models import ModelConfig
from mlx_hla.process import hint_at_openblas
from mlx_hla.train.loop import resume, train
from mlx_hla.train.presets import PRESETS, TrainConfig, preset
from mlx_hla.train.team import Team, assemble

TOGETHER = (
    "On several machines, or with several processes on one: mlx.launch --hostfile FILE --backend ring -- "
    "mlx-hla {command} ... starts a rank on each. All read the data, from the same paths. The ranks share "
    "every batch: batch_size is that of all, and the losses are those of one process. Rank 0 writes; "
    "a run goes on with --resume on any number of ranks. If a rank ends, all end, and so they do if one is "
    "silent for MLX_HLA_PATIENCE seconds (default: 600)."
)


def add_team(parser: argparse.ArgumentParser, command: str) -> None:
    parser.epilog = TOGETHER.format(command=command)
    parser.add_argument(
        "--sequence-parallel",
        type=int,
        default=1,
        metavar="K",
        help="with mlx.launch: every K ranks split the tokens of their sequences, for a context that one "
        "machine cannot hold; K divides the number of ranks; 1: each rank has whole sequences",
    )


def team_of(args: argparse.Namespace) -> Team:
    """The ranks that were started for this command; all must resume, or none."""
    return assemble(args.command + (" --resume" if args.resume else ""), args.sequence_parallel)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    presets = "; ".join(f"{name}: {p.about}" for name, p in PRESETS.items())
    parser.add_argument(
        "--preset", choices=PRESETS, default="small", help=f"{presets}. Defaults below are those of small"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in --out, as it was set up; --steps may be other",
    )
    add_team(parser, "train")
    add_fields(parser.add_argument_group("training"), TrainConfig)
    add_fields(parser.add_argument_group("model"), ModelConfig)


def run(args: argparse.Namespace) -> int:
    model, settings = given(args, ModelConfig), given(args, TrainConfig)
    hint_at_openblas()
    if args.resume:
        extra = sorted({*model, *settings} - {"out", "steps"})
        if extra:
            flags = ", ".join("--" + n.replace("_", "-") for n in extra)
            raise InputError(f"a resumed run keeps its settings: leave out {flags}")
        out = settings.get("out", PRESETS[args.preset].train.out)
        result = resume(out, settings.get("steps"), team_of(args))
    else:
        fixed = sorted(set(model) - {"context"})
        if fixed and settings.get("init_from") is not None:
            flag = "--" + fixed[0].replace("_", "-")
            raise InputError(f"the weights of --init-from say what the model is: leave out {flag}")
        if "vocab_size" in model and settings.get("tokenizer") is not None:
            raise InputError("the tokenizer says how many tokens there are: leave out --vocab-size")
        result = train(*preset(args.preset, model, settings), team_of(args))
    return 0 if result.finished else 130
