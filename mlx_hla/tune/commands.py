"""The commands `mlx-hla finetune` and `mlx-hla fuse`."""

from __future__ import annotations

import argparse
from typing import Any

from mlx_hla.errors import InputError
from mlx_hla.files import as_path
from mlx_hla.flags import add_fields, given
from mlx_hla.process import hint_at_openblas
from mlx_hla.train.command import add_team, team_of
from mlx_hla.tune.adapters import fuse, read_config
from mlx_hla.tune.options import FinetuneConfig
from mlx_hla.tune.run import finetune, resume


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, as it was set up")
    add_team(parser, "finetune")
    add_fields(parser, FinetuneConfig)


def run(args: argparse.Namespace) -> int:
    settings = given(args, FinetuneConfig)
    hint_at_openblas()
    if args.resume:
        if extra := sorted(set(settings) - {"out"}):
            flags = ", ".join("--" + n.replace("_", "-") for n in extra)
            raise InputError(f"a resumed run keeps its settings: leave out {flags}")
        result = resume(settings.get("out", FinetuneConfig.out), team_of(args))
    else:
        result = finetune(FinetuneConfig(**settings), team_of(args))
    return 0 if result.finished else 130


def fuse_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--adapter", metavar="FOLDER", default="runs/adapter", help="what finetune wrote")
    add("--model", help="folder of the base; by default the one that the adapter was trained on")
    add("--out", metavar="FOLDER", default="runs/fused", help="folder for the model")


def run_fuse(args: argparse.Namespace) -> int:
    out = fuse(args.adapter, args.out, args.model)
    print(f"model in {out}\ntry it: mlx-hla generate --model {out} --prompt 'def '")
    return 0


def about(adapter: str | None) -> dict[str, Any]:
    """What `mlx-hla info` tells of an adapter: its settings, and the folder of its base if it has one."""
    if adapter is None:
        return {}
    found = read_config(as_path("the adapter's folder", adapter))
    values = found.how._asdict()
    if found.how.type == "full":
        values = {"type": "full", "layers": found.how.layers}
    return {"adapter": {"folder": str(adapter), **values}, "base": found.model}
