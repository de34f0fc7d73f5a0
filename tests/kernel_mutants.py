"""Break the kernels on purpose and see whether their tests notice: `python tests/kernel_mutants.py`.

Rules (drop a barrier, flip a comparison, ..) are applied to metal/*.metal, to a fixed sample of the places
where each fits. Every mutant is one edit in a copy of the package; the tests of its file run against the
copy and stop at the first failure. Prints the mutants that survive and the share that was killed; exits with
1 below 95%.

    --list          the mutants, without running them
    --only TEXT     those whose description contains TEXT
    --per-rule N    places per rule and file (default 1); 0 for all
    --jobs N        at a time (default 2)
"""

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
GOAL = 0.95
TIME_LIMIT = 900  # seconds for the tests of one mutant

# rule: (pattern, what replaces it). Each match in a line of code is a place for a mutant.
RULES = {
    "drop a barrier": (r"^( *)sync_threadgroup\(\);", r"\1"),
    "flip a comparison": (r"(?<=[\w)\]]) < (?=[\w(])", " <= "),
    "flip a strict comparison": (r"(?<=[\w)\]]) > (?=\w)", " >= "),
    "flip a loose comparison": (r" (<|>)= (?=[\w(])", r" \1 "),
    "turn an equality": (r" == ", " != "),
    "keep one condition of two": (r" && (?:[\w.]+(?:\[\d\])?(?: \+ \d)? (?:<|>|<=|>=|==) [\w.]+)", ""),
    "skip the last chunk": (r"u < (walk\.count|total); u \+= W", r"u + W < \1; u += W"),
    "start one chunk late": (r"\bAHEAD \? -W : 0;", "W;"),
    "take a short chunk for a whole one": (r"min\(W, [^)]*\)", "W"),
    "shift a column": (r"\+ col0\b", "+ col0 + 1"),
    "shift a fragment": (r"\b8 \* ([rckij])\b", r"8 * (\1 + 1)"),
    "shift a row": (r"\+ at\.row\b", "+ at.row + 1"),
    "swap row and column": (r"at\.row \* ld \+ G \* at\.col", "at.col * ld + G * at.row"),
    "shift a token": (r"\bt \* (\w+)_strides\[1\]", r"(t + 1) * \1_strides[1]"),
    "shift a block": (r"\bblock \* ", "(block + 1) * "),
    "take another head": (r"\bhead \* (\w+)_strides", r"(head ^ 1) * \1_strides"),
    "mix up the heads of a group": (r"\(head \* (\w+)_shape\[2\] / (\w+)\)", r"(head % \1_shape[2])"),
    "forget the batch": (r"\bbatch \* (\w+)_strides\[0\] \+ ", ""),
    "take another stride": (r"_strides\[1\]", "_strides[2]"),
    "take the last stride for 1": (r"int\(\w+_strides\[(?:3|4)\]\)", "1"),
    "drop a decay since the start": (r"^( *)tile_decay_from_start(?:<\w+>)?\([^;]*;", r"\1"),
    "drop a decay to the end": (r"^( *)tile_decay_to_end(?:<\w+>)?\([^;]*;", r"\1"),
    "keep the state undecayed": (r"^( *)tile_scale\([^;]*;", r"\1"),
    "drop a factor of decay": (r"\bdecay \* ", ""),
    "drop the decay between": (r" \* decay_between\([^;:]*?\)(?=[ ;:])", ""),
    "another power of the decay": (r"\bcum, ([12])\.0f", lambda m: f"cum, {3 - int(m[1])}.0f"),
    "drop a scale": (r"\bscale \* ", ""),
    "drop another factor": (r"\b(?:read|write|power) \* ", ""),
    "drop a sum": (r" \+= (?!\d|launch\.threads|32|NS\b|W\b)", " = "),
    "count down": (r" -= ", " += "),
    "swap the tiles of a product": (r"\b(xs|qs), (LD\w*), (ys|ks|kts), (LD\w*)", r"\3, \4, \1, \2"),
    "read another tile": (r"\b(\w+), (\w+), LD(\w*), (s|f|state|zs|right|grad), at\)",
                          r"\1, \2 + 8, LD\3, \4, at)"),
    "transpose a tile": (r"NC, (true|false), (true|false)>",
                         lambda m: f"NC, {'false' if m[1] == 'true' else 'true'}, {m[2]}>"),
    "take the triangle for a square, or back": (r"NC, (true|false), (true|false)>",
        lambda m: f"NC, {m[1]}, {'false' if m[2] == 'true' else 'true'}>"),
    "leave out a ridge": (r"scale \* ridge", "0.0f"),
    "forget a product": (r"^( *)(tile_mma|scores|tile_add|tile_mma_upper)<?[^;]*;", r"\1"),
    "trust an address": (r" && at_multiple\(.*\);", ";"),
    "trust a width": (r"\(\(cols \| row_step\)", "((row_step)"),
    "trust a row's step": (r"\(\(cols \| row_step\)", "((cols)"),
    "stage rows that are not there": (r", i\.row < rows\);", ", true);"),
    "skip a place of a grid": (r"spot\.col -= COLS", "spot.col = 0"),
    "weave another way": (r"\bof\[g\], of\[G \+ g\]", "of[2 * g], of[2 * g + 1]"),
    "do not weave rows": (r"8 \* \(r - r % G\) \+ G \* at\.row \+ r % G", "8 * r + at.row"),
    "forget to stage": (r"^( *)stage<[^;]*;", r"\1"),
    "do not start at zero": (r"^( *)tile_zero\((\w+)\);", r"\1tile_scale(\2, 0.5f);"),
    "another lane": (r"simd_(shuffle_xor|broadcast)\(x, (\d+)\)", r"simd_\1(x, \2 / 2)"),
    "another simdgroup": (r"\bsimdgroup == 0\b", "simdgroup == 1"),
    "round too early": (r"static_cast<T>\(", "static_cast<T>(2.0f * "),
    "one thread too few": (r"\+= (launch\.threads|32 \* NS)(?=\))", r"+= \1 + 1"),
    "a reset that leaks": (r"-185\.0f", "-23.0f"),
    "a zero taken for 1e-30": (r"\bg, LOG_ZERO\b", "g, -99.657843f"),
    "mirror too little": (r"diagonal (>=?) 0", r"diagonal \1 8"),
    "write a state to the wrong place": (r"\bslot \* ", "(slot ^ 1) * "),
}  # fmt: skip

# Edits that change nothing: (rule, a piece of "what is edited in the line and the next", why).
EQUIVALENT = [
    ("flip a loose comparison", "g <= 0.0f || l < log_least", "log 0 is below any bound"),
    ("flip a comparison", "g <= 0.0f || l < log_least", "the larger of two equals is either"),
    ("flip a strict comparison", "DY > DZ ? DY : DZ", "the larger of two equals is either"),
    ("flip a strict comparison", "D > DV ? D : DV", "the larger of two equals is either"),
    ("flip a strict comparison", "? y_shape[2] : z_shape[2]", "the larger of two equals is either"),
    ("another simdgroup", "step_normaliser<", "a step has two simdgroups or more; any may do it"),
    ("turn an equality", "? whole[0] : whole[1]", "a log's two parts are only ever added"),
    ("another simdgroup", "if (SELDOM && launch.simdgroup == 0)", "any may do it"),
    ("flip a comparison", "int u = 0; u < total", "a chunk without tokens adds nothing"),
    ("flip a strict comparison", "DECAY && KEEP > W", "with KEEP = W every chunk is at a kept state"),
    ("one thread too few", "i < rows; i += launch.threads", "64 threads or more, and rows at most 32"),
    ("one thread too few", "i < W; i += launch.threads", "64 threads or more, and W is at most 32"),
    ("round too early", "there ? src[", "twice zero is zero"),
    (
        "take the last stride for 1",
        "_entry_strides[4]), D, D",
        "entries are what linear_scan wrote: contiguous",
    ),
    ("take the last stride for 1", "plus_strides[3]", "plus is what back_queries wrote: contiguous"),
    ("flip a strict comparison", "past[now] > NOTHING", "at this bound either way is as good"),
    ("flip a strict comparison", "if (rows > 0)", "a chunk of no rows is staged as zeros that nobody reads"),
    ("flip a loose comparison", "<= AHEAD_BYTES", "what is staged ahead changes when, not what"),
    ("keep one condition of two", "&& row < size in ", "sizes are multiples of 8, as the tiles' rows are"),
]

# The tests of a file's mutants, the quickest to notice first; the widest heads and the longest runs left out.
SELECTIONS = {
    "step": [
        ["test_kernels_step.py", "test_kernels_packed.py", "test_kernels_normalised_step.py"],
        "not D128 and not D64",
    ],
    "routed": [
        ["test_kernels_values.py", "test_kernels_edges.py", "test_kernels_cost.py"],
        "(ahla or hla3) and not half_precision and not D64 and not D96 and not V128 and not agree_to_the_bit",
    ],
    None: [
        ["test_kernels_values.py", "test_kernels_step.py", "test_kernels_edges.py", "test_kernels_cost.py"],
        "not half_precision and not D64 and not D96 and not V128 and not agree_to_the_bit",
    ],
}


@dataclass(frozen=True)
class Mutant:
    rule: str
    file: str
    line: int
    start: int  # in the file's text
    end: int
    old: str
    new: str
    context: str  # the line that it starts in, and the next

    def __str__(self):
        edit = f"`{_short(self.old)}` -> `{_short(self.new)}`"
        return (
            f"{self.file}.metal:{self.line}: {self.rule}: {edit} in `{_short(self.context.splitlines()[0])}`"
        )

    def apply(self, text):
        return text[: self.start] + self.new + text[self.end :]

    @property
    def equivalent(self):
        text = f"{self.old} in {self.context}"
        return next((why for rule, piece, why in EQUIVALENT if rule == self.rule and piece in text), None)


def _short(text):
    return " ".join(text.split())[:90]


def places(text, file):
    """Every mutant of a file; comments and the preprocessor's lines are left alone."""
    code = re.sub(r"//[^\n]*|^#[^\n]*", lambda m: " " * len(m[0]), text, flags=re.M)
    lines = text.split("\n")
    for rule, (pattern, new) in RULES.items():
        for m in re.finditer(pattern, code, re.M):
            edited = m.expand(new) if isinstance(new, str) else new(m)
            if edited != m[0]:
                line = code.count("\n", 0, m.start())
                yield Mutant(
                    rule, file, line + 1, m.start(), m.end(), m[0], edited, "\n".join(lines[line : line + 2])
                )


def mutants(per_rule=1, seed=0):
    out = []
    for path in sorted((ROOT / "metal").glob("*.metal")):
        text = path.read_text(encoding="utf-8")
        by_rule = {}
        for mutant in places(text, path.stem):
            if not mutant.equivalent:
                by_rule.setdefault(mutant.rule, []).append(mutant)
        for rule, found in by_rule.items():
            pick = random.Random(f"{seed} {path.stem} {rule}")
            out += found if not per_rule or len(found) <= per_rule else pick.sample(found, per_rule)
    return sorted(out, key=lambda m: (m.file, m.start, m.rule))


def tests_of(file):
    files, words = SELECTIONS.get(file, SELECTIONS[None])
    return [*(str(TESTS / name) for name in files), "-k", words]


def run(mutant, cache, edit=None):
    """(killed, seconds, the first failure) of one mutant; `edit` replaces its edit of the file's text."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        ignore = shutil.ignore_patterns("__pycache__", "pretrained")
        shutil.copytree(ROOT / "mlx_hla", Path(work) / "mlx_hla", ignore=ignore)
        shutil.copytree(ROOT / "metal", Path(work) / "metal")
        path = Path(work) / "metal" / f"{mutant.file}.metal"
        path.write_text((edit or mutant.apply)(path.read_text(encoding="utf-8")), encoding="utf-8")
        env = os.environ | {
            "PYTHONPATH": work,
            "MLX_HLA_STANDIN_CACHE": cache,
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=line", "-p", "no:cacheprovider"]
        command += ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), *tests_of(mutant.file)]
        for _ in range(3):  # again where something else ended the tests
            try:
                done = subprocess.run(
                    command, cwd=work, env=env, capture_output=True, text=True, timeout=TIME_LIMIT
                )
            except subprocess.TimeoutExpired:
                return False, time.monotonic() - started, "the tests did not end"
            if done.returncode >= 0:
                break
    failures = re.findall(r"^FAILED \S+?::(.*)$", done.stdout, re.M)
    words = failures[0] if failures else f"exit {done.returncode}: {done.stdout.strip()[-300:]}"
    return done.returncode == 1 and bool(failures), time.monotonic() - started, words


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--per-rule", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args(arguments)
    chosen = [m for m in mutants(options.per_rule) if options.only in str(m)]
    print(f"{len(chosen)} mutants by {len({m.rule for m in chosen})} rules", flush=True)
    if options.list:
        for mutant in chosen:
            print(mutant)
        return 0
    with tempfile.TemporaryDirectory() as cache:
        for file in {str(tests_of(m.file)): m.file for m in chosen}.values():
            sound = Mutant("none", file, 0, 0, 0, "", "", "\n")
            _, seconds, words = run(sound, cache)
            if not words.startswith("exit 0"):
                print(f"{file}.metal as it is does not pass: {words}")
                return 2
            print(f"{file}.metal and its like as they are pass in {seconds:.0f} s", flush=True)
            if not run(sound, cache, edit=lambda text: text + "\n!\n")[0]:
                print("a source that does not compile passes: the tests do not see the copies")
                return 2
        survivors = []
        with ThreadPoolExecutor(options.jobs) as pool:
            results = pool.map(lambda m: run(m, cache), chosen)
            for n, (mutant, (killed, seconds, words)) in enumerate(zip(chosen, results, strict=True), 1):
                fate = "killed  " if killed else "SURVIVED"
                print(f"{n:3} {fate} {seconds:4.0f} s  {mutant}  <- {words[:110]}", flush=True)
                if not killed:
                    survivors.append(mutant)
    share = 1 - len(survivors) / len(chosen)
    print(f"\nkilled {len(chosen) - len(survivors)} of {len(chosen)} ({share:.1%}); survivors:")
    for mutant in survivors:
        print(f"  {mutant}")
    return 0 if share >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
