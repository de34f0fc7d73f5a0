"""The command line: flags with wrong values, flags that contradict each other, odd paths and streams."""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlx_hla import cli

from .case import ACCEPTED, EITHER, REFUSED, Case

SEED = 5
Flags = list[str]

NO_INT = ("", " ", "x", "1.5", "nan", "inf", "1e3", "0x10", "1,000", "-1", "-9999999999", "true", "1 2", "½")
NO_FLOAT = (
    "",
    " ",
    "x",
    "nan",
    "-nan",
    "inf",
    "-inf",
    "1e999",
    "1,5",
    "0x1p3",
    "-1",
    "-1e300",
    "true",
    "1 2",
)
# Beside these flags the number is no nonsense: as much as there is, or not at all.
ZERO_IS_NONE = (
    "top-k",
    "min-p",
    "temperature",
    "valid-batches",
    "samples",
    "show",
    "warmup",
    "seed",
    "conv-size",
)
ZERO_IS_NONE += ("patience", "sample-tokens", "weight-decay", "beta1", "beta2", "dropout", "final-lr")
HUGE = {"seed", "batch-size", "accumulate", "context", "dims", "num-layers", "num-heads", "num-kv-heads"}
HUGE |= {"head-dim", "hidden-dims", "conv-size", "steps", "warmup", "valid-every", "save-every", "log-every"}
HUGE |= {"repetition-window", "max-bytes", "lr", "temperature", "rope-theta", "norm-eps", "min-p", "top-p"}
WORDS = (
    "",
    " ",
    "x",
    "HLA2",
    "none ",
    "rms,l2",
    "float16",
    "0",
    "99",
    "../..",
    "a" * 5000,
    "\u202e",
    "é",
    "--",
)
CHOICES = {"decay", "qk-norm", "dtype", "operator", "preset", "family", "suffix"}
# What a flag that names a file or a folder may find there.
ODD_PATHS = (
    "",
    "absent",
    "file",
    "folder",
    "pipe",
    "zero",
    "null",
    "loop",
    "dangling",
    "socket",
    "below-a-file",
)
# A device that takes nothing, where there is one.
FULL = tuple(at for at in ("/dev/full",) if os.path.exists(at))
ODD_PATHS += ("too-long", "nul", "locked")


LM = importlib.util.find_spec("mlx_lm") is not None  # without the extra, `finetune` and `fuse` only name it
# The flags of `lm` are mlx-lm's.
COMMANDS = tuple(n for n in cli.COMMANDS if n != "lm" and (LM or n not in ("finetune", "fuse")))


def base(place: Any, command: str) -> Flags:
    """Flags of a call that goes well, and quickly."""
    model, corpus = str(place.good("model")), str(place.good("corpus"))
    words = {
        "generate": f"--model {model} --prompt x --max-tokens 2 --seed 1",
        "info": f"--model {model}",
        "eval": f"--model {model} --data {corpus} --valid-fraction 0.2 --valid-batches 1 --batch-size 2",
        "train": f"--preset tiny --data {corpus} --out {place.path / 'out'} "
        f"--tokenizer {place.good('tokenizer')} "
        "--steps 1 --warmup 1 --batch-size 2 --context 16 --dims 16 --num-layers 1 --hidden-dims 24 "
        "--valid-fraction 0.2 --valid-batches 1",
        "finetune": f"--model {model} --data {corpus} --out {place.path / 'out'} --steps 1 --warmup 1 "
        "--batch-size 2 --context 16 --rank 2 --valid-fraction 0.2 --valid-batches 1 --sample-tokens 2",
        "fuse": f"--adapter {place.good('adapter') if command == 'fuse' else ''} --out {place.path / 'out'}",
        "selftest": "--repeats 1 --family first --dtype float32",
    }
    return [command, *words[command].split()]


def odd_path(place: Any, kind: str) -> str:
    """A path of that kind, made in the case's folder."""
    path: Path = place.path / kind
    if kind == "file":
        path.write_bytes(random.Random(kind).randbytes(3000))
    elif kind == "folder":
        path.mkdir()
    elif kind == "locked":
        path.mkdir(mode=0o000)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind in ("zero", "null"):
        path.symlink_to(f"/dev/{kind}")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "dangling":
        path.symlink_to(place.path / "nothing")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as s:  # its address may have some hundred bytes only
            here = os.getcwd()
            os.chdir(path.parent)
            try:
                s.bind(path.name)
            finally:
                os.chdir(here)
    elif kind == "below-a-file":
        path.write_bytes(b"x")
        return str(path / "x")
    return {"": "", "too-long": str(place.path / ("x" * 300)), "nul": "a\0b"}.get(kind, str(path))


def _options(command: str) -> Iterator[argparse.Action]:
    parser = cli.make_parser(command)
    found = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    yield from (a for a in found.choices[command]._actions if a.option_strings and a.dest != "help")


def _flag(place: Any, command: str, flag: str, value: str, joined: bool) -> Any:
    return place.command(*base(place, command), *([f"--{flag}={value}"] if joined else [f"--{flag}", value]))


def _flag_cases() -> Iterator[Case]:
    for command in COMMANDS:
        for action in _options(command):
            flag = action.option_strings[0].removeprefix("--")
            rng = random.Random(f"{SEED} {command} {flag}")
            kind = getattr(action.type, "__name__", None)
            values: list[tuple[str, str]] = []
            if action.nargs == 0:
                values = [(v, REFUSED) for v in rng.sample(["yes", "1", "", "false"], 1)]
            elif kind == "int":
                values = [(v, REFUSED) for v in rng.sample(NO_INT, 3)]
                values += [
                    ("-1", ACCEPTED if flag == "layers" else REFUSED),
                    ("0", EITHER if flag in ZERO_IS_NONE else REFUSED),
                ]
                values += [("9" * 30, EITHER)] if flag in HUGE - {"steps"} else []
            elif kind == "float":
                values = [(v, REFUSED) for v in rng.sample(NO_FLOAT, 4)]
                values += [("0", EITHER if flag in ZERO_IS_NONE else REFUSED)]
                values += [("1e30", EITHER if flag == "lr" else REFUSED)] if flag in HUGE else []
            elif flag in CHOICES or action.choices:
                values = [(v, REFUSED) for v in rng.sample(WORDS[1:7] + WORDS[8:12], 3)]
                if flag in ("suffix", "family"):
                    values = [("", REFUSED), ("/", REFUSED), (",,", REFUSED)]
            elif flag in ("prompt", "stop"):
                values = [
                    ("", REFUSED),
                    ("\ud800", EITHER),
                    ("x" * 70000, EITHER),
                    ("\0", EITHER),
                    ("\n", EITHER),
                ]
            for value, expect in dict(values).items():
                joined = action.nargs == 0 or value.startswith("-") or rng.random() < 0.4
                yield Case(
                    f"commands:{command}-{flag}={_short(value)}",
                    lambda p, c=command, f=flag, v=value, j=joined: _flag(p, c, f, v, j),
                    expect,
                )
            if action.nargs != 0:
                yield Case(
                    f"commands:{command}-{flag}-without-value",
                    lambda p, c=command, f=flag: p.command(*base(p, c), f"--{f}"),
                )
            typo = flag[:-1] + "x" + flag[-1]
            yield Case(
                f"commands:{command}-{typo}",
                lambda p, c=command, f=typo: p.command(*base(p, c), f"--{f}", "1"),
            )


def _short(value: str) -> str:
    text = value.encode("unicode_escape").decode().replace(" ", "_").replace("/", "|")
    return text if len(text) < 20 else f"{text[:8]}..{len(value)}"


def _path_cases() -> Iterator[Case]:
    flags = {
        "generate": ("model", "load-state", "save-state"),
        "info": ("model",),
        "eval": ("model", "data"),
        "train": ("data", "extra", "tokenizer", "init-from", "out"),
        "finetune": ("model", "data", "out"),
        "fuse": ("model", "adapter", "out"),
    }
    flags = {command: names for command, names in flags.items() if command in COMMANDS}
    for command, names in flags.items():
        for flag in names:
            for kind in ODD_PATHS:
                if flag == "save-state" and kind in ("file", "loop"):
                    continue  # what a file may replace
                if flag in ("out", "save-state") and kind in ("absent", "folder", "dangling"):
                    continue  # a place for a run

                def call(place, command=command, flag=flag, kind=kind):
                    argv = base(place, command)
                    if flag == "init-from":
                        argv = [a for a in argv if a not in ("--tokenizer", str(place.good("tokenizer")))]
                        for sized in ("--dims", "--num-layers", "--hidden-dims"):
                            del argv[argv.index(sized) : argv.index(sized) + 2]
                    return place.command(*argv, f"--{flag}", odd_path(place, kind))

                yield Case(
                    f"commands:{command}-{flag}-at-{kind or 'nothing'}", call, as_user=kind == "locked"
                )


# Flags, beside those of `base`, that cannot be together. {model}, {tokenizer}, {out}: good ones.
CONTRADICTIONS: dict[str, tuple[str, ...]] = {
    "train": (
        "--resume",
        "--resume --dims 16",
        "--resume --lr 0.1 --seed 3",
        "--vocab-size 380",
        "--init-from {model}",
        "--init-from {model} --vocab-size 400",
        "--init-from {model} --operator ahla",
        "--num-heads 3",
        "--num-heads 4 --num-kv-heads 3",
        "--dims 15",
        "--dims 20 --num-heads 8",
        "--operator softmax --qk-norm l2",
        "--operator softmax --head-dim 5",
        "--rope-theta 100 --head-dim 3",
        "--conv-size 1",
        "--operator 0",
        "--operator 17",
        "--dims 32768 --num-layers 512",
        "--vocab-size 1048576 --dims 32768",
        "--batch-size 99999999",
        "--batch-size 1000000 --context 1000",
        "--context 16777216",
        "--context 100000",
        "--hidden-dims 262144 --num-layers 512 --dims 8192",
        "--max-bytes 1",
        "--max-bytes 5 --valid-fraction 0.9999",
        "--suffix .swift",
        "--lr 1e30 --steps 20",
        "--lr 1e300 --steps 5 --clip 1e300",
        "--beta1 1",
        "--dropout 1",
        "--final-lr 1.5",
        "--num-heads 512 --head-dim 512 --dims 32768",
    ),
    "eval": (
        "--samples -3",
        "--samples 1 --max-tokens 0",
        "--show -1 --samples 1",
        "--valid-fraction 1",
        "--suffix .swift",
        "--temperature 1e-40 --samples 1",
        "--top-p 0 --min-p 2",
        "--batch-size 0",
        "--data {model} --suffix .safetensors",
    ),
    "generate": (
        "--stop x --stop=",
        "--prompt=",
        "--top-p 0",
        "--top-p 1.0001",
        "--min-p 1.5",
        "--repetition-penalty 0",
        "--repetition-window 0",
        "--temperature 1e-300",
        "--max-tokens 0",
        "--seed 18446744073709551616",
        "extra words",
        "--json --prompt",
    ),
    "finetune": (
        "--resume",
        "--resume --lr 0.1",
        "--type qlora",
        "--type full --bits 4",
        "--bits 5",
        "--bits 4",  # no width of this model can be packed
        "--layers 0",
        "--layers 2",
        "--rank 100000",
        "--suffix .swift",
        "--context 100000",
        "--batch-size 1000000 --context 1000",
        "--lr 1e30 --steps 20",
        "--valid-fraction 1",
        "--max-bytes 1",
        "--no-pack --data {tokenizer}",
    ),
    "fuse": ("--out {model}", "--adapter {model}", "--model {adapter}", "more"),
    "info": ("--json --model", "--model", "more", "--json=x"),
    "selftest": ("--repeats 0", "--family hla9", "--dtype int8", "--repeats -1", "--family", "--json=1"),
}


def _together(place: Any, command: str, flags: str) -> Any:
    good = {name: place.good(name) for name in ("model", "tokenizer", "adapter") if f"{{{name}}}" in flags}
    return place.command(*base(place, command), *flags.format(**good).split())


def _contradictions() -> Iterator[Case]:
    for command, several in ((c, CONTRADICTIONS[c]) for c in COMMANDS):
        for flags in several:
            name = _short(flags) if len(flags) < 20 else flags.replace(" ", "_")[:50]
            yield Case(f"commands:{command}-{name}", lambda p, c=command, f=flags: _together(p, c, f))


# Flags whose large values are no nonsense but a long wait.
PATIENCE = {"steps": 3, "samples": 2, "max-tokens": 64, "num-layers": 7, "valid-batches": 2, "accumulate": 3}
PATIENCE |= {"repeats": 1, "head-dim": 64, "dims": 64, "hidden-dims": 64, "num-heads": 16, "batch-size": 64}
LEFT_OUT = {
    "save-state",
    "load-state",
    "version",
    "prompt",
    "stop",
    "data",
    "extra",
    "model",
    "out",
    "tokenizer",
    "init-from",
    "preset",
    "resume",
}
INTS, FLOATS = (
    (0, 1, 2, 3, 5, 7, 16, 64, 1000, 2**31, -1),
    ("0", "1e-30", "1e-8", "0.1", "0.5", "0.999", "1", "2"),
)
FLOATS += ("100", "1e10", "1e-300", "-0.0")


def _random_flags(rng: random.Random, command: str) -> Flags:
    """A few flags with values that may be good, bad, or bad together."""
    options = [a for a in _options(command) if a.option_strings[0][2:] not in LEFT_OUT]
    words: Flags = []
    for action in rng.sample(options, min(len(options), rng.randint(2, 5))):
        flag, kind = action.option_strings[0], getattr(action.type, "__name__", None)
        if action.nargs == 0:
            words.append(rng.choice(action.option_strings))
        elif kind == "int":
            most = PATIENCE.get(flag[2:], 2**31)
            words.append(f"{flag}={rng.choice([n for n in INTS if n <= most])}")
        elif kind == "float":
            words.append(f"{flag}={rng.choice(FLOATS)}")
        else:
            operators = ("softmax", "first", "ahla", "hla3", "mixed", "readout", "4", "5")
            words.append(
                f"{flag}={rng.choice([*(action.choices or ()), *operators, 'none', 'rms', 'l2', 'fixed'])}"
            )
    return words


def _random_cases() -> Iterator[Case]:
    for command, count in {"train": 150, "eval": 60, "generate": 90}.items():
        for seed in range(count):
            words = _random_flags(random.Random(f"{SEED} {command} {seed}"), command)
            name = f"commands:{command}-random-{seed}" + "".join(w.replace("--", "-") for w in words)[:70]
            yield Case(name, lambda p, c=command, w=words: p.command(*base(p, c), *w), EITHER)


WRONG_STARTS = (
    [],
    [""],
    ["-"],
    ["--"],
    ["trian"],
    ["generate", "eval"],
    ["--model", "x"],
    ["\ud800"],
    ["help"],
)
WRONG_STARTS += (
    ["--version=1"],
    ["train", "--", "x"],
    ["-h=3"],
    ["x" * 100_000],
    ["a\0b"],
    ["info", "--help=x"],
)


def _stream_cases() -> Iterator[Case]:
    def add(name: str, run: Callable[[Any], Any], expect: str = REFUSED) -> Case:
        return Case(f"commands:{name}", run, expect)

    for argv in WRONG_STARTS:
        yield add(f"starts-{_short(' '.join(argv)) or 'with-nothing'}", lambda p, a=argv: p.command(*a))
    rng = random.Random(SEED)
    texts = {
        "nothing": (b"", REFUSED),
        "latin-1": ("caf\xe9 ".encode("latin-1"), REFUSED),
        "half-a-character": ("é".encode()[:1], REFUSED),
        "utf-16": ("def f(x):".encode("utf-16"), REFUSED),
        "surrogate": (b"x\xed\xa0\x80", REFUSED),
        "overlong": (b"\xc0\xaf", REFUSED),
        "bytes": (bytes(range(256)), REFUSED),
        "noise": (rng.randbytes(5000), REFUSED),
        "too-much": (b"x" * ((1 << 24) + 1), REFUSED),
        "nul": (b"a\0b\0\0", ACCEPTED),
        "bom": (b"\xef\xbb\xbfdef", ACCEPTED),
        "spaces": (b"   \n\n\t", ACCEPTED),
        "controls": (bytes(range(1, 32)), ACCEPTED),
        "lower-block": ("\u2581\u2581 x".encode(), ACCEPTED),
        "joined-emoji": ("👩‍👩‍👧‍👦".encode(), ACCEPTED),
        "tokens-as-text": (b"<s></s><unk><0x00>", ACCEPTED),
        "long": (b"x = 1\n" * 5000, ACCEPTED),
    }

    def generate(place, *more, **options):
        argv = [a for a in base(place, "generate") if a not in ("--prompt", "x")]
        return place.command(*argv, *more, **options)

    for name, (text, expect) in texts.items():
        for dash in ((), ("--prompt", "-")):
            yield add(
                f"generate-stdin-{name}{'-dash' if dash else ''}",
                lambda p, t=text, d=dash: generate(p, *d, stdin=t),
                expect,
            )
    yield add("generate-stdin-null", lambda p: generate(p, stdin="/dev/null"))
    yield add("generate-stdin-zero", lambda p: generate(p, stdin="/dev/zero"))
    for command in ("generate", "info", "eval", "train"):
        for stdout in (*FULL, "gone"):
            yield add(
                f"{command}-stdout-{stdout.strip('/').replace('/', '-')}",
                lambda p, c=command, s=stdout: p.command(*base(p, c), stdout=s),
            )
    process = {
        "stdin-closed": ("<&-", ACCEPTED),
        "stdout-closed": (">&-", EITHER),
        "stderr-closed": ("2>&-", ACCEPTED),
        "all-closed": ("<&- >&- 2>&-", EITHER),
        **{f"stdout-{at}": (f">{at}", REFUSED) for at in FULL},
    }
    for name, (redirect, expect) in process.items():
        yield add(
            f"process-{name.replace('/', '-')}",
            lambda p, r=redirect: p.process(*base(p, "generate"), redirect=r),
            expect,
        )
    yield add("process-model-no-utf-8", lambda p: p.process("info", "--model", b"/no/such/\xff\xfe"))
    yield add("process-data-no-utf-8", lambda p: p.process(*base(p, "eval"), "--data", b"\xff\xfe"))
    yield add("process-prompt-no-utf-8", lambda p: p.process(*base(p, "generate"), "--prompt", b"\xff\xfe"))
    yield add(
        "process-ascii-terminal",
        lambda p: p.process(*base(p, "generate"), "--prompt", "é", environment={"PYTHONIOENCODING": "ascii"}),
        ACCEPTED,
    )
    for words in ("nosuch", "", "../cli", "--", "generate.x"):
        yield add(f"process-lm-{_short(words) or 'nothing'}", lambda p, w=words: p.process("lm", w))
    yield add("process-lm", lambda p: p.process("lm"))
    yield add("process-no-prompt", lambda p: p.process("generate", redirect="<&-"))


def cases() -> Iterator[Case]:
    for make in (_flag_cases, _path_cases, _contradictions, _random_cases, _stream_cases):
        yield from make()
