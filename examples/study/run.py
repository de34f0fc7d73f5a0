"""Run the study's jobs, most important first, in processes side by side, within a time.

    python examples/study/run.py --workers 6 --minutes 9 --out results --bundle results.json
    python examples/study/run.py --list --only 'alias*' 'join*'       # which jobs there are, in their order
    python examples/study/run.py --workers 2 --minutes 1 --out runs/x -- --steps 3 --batch 2 --test 64

A job is one arm on one task, `tasks.py TASK --arms ARM`; what stands after `--` goes to every one of them. A
job starts only if it would end in time, were it as long as the longest of its task so far, and what runs when
the time is over is ended: a result is a whole file or none. Results that are there, or in `--have`, are left
out.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, NamedTuple

import results

HERE = Path(__file__).resolve().parent
MAIN = ("first", "gdn", "hla2", "ahla", "readout", "mesa", "mixed")
OTHERS = ("softmax", "window", "hla3", "first_ahla")


class Job(NamedTuple):
    task: str
    arm: str
    head_dim: int = 16

    @property
    def key(self) -> str:
        return results.key(self.task, self.arm, self.head_dim)

    def command(self, out: Path, more: list[str]) -> list[str]:
        script = [sys.executable, str(HERE / "tasks.py"), self.task, "--arms", self.arm]
        return [*script, "--head-dim", str(self.head_dim), "--out", str(out), *more]


def jobs() -> list[Job]:
    """All of them, most important first."""
    out: list[Job] = []

    def add(tasks: str, arms: tuple[str, ...] | str, head_dim: int = 16) -> None:
        arms = tuple(arms.split()) if isinstance(arms, str) else arms
        out.extend(Job(task, arm, head_dim) for task in tasks.split() for arm in arms)

    add("regress alias join recall", MAIN)
    # What makes training find the second hop: few pairs first, long memories, more steps.
    add("join alias", tuple(f"{arm}+curriculum" for arm in MAIN))
    add("regress recall alias join", OTHERS)
    add("alias join", "hla2+long ahla+long hla2+curriculum+long ahla+curriculum+long")
    add("alias join", "hla2+fixed ahla+fixed mixed+fixed gdn+fixed")
    add("join alias", tuple(f"{arm}+steps" for arm in MAIN))
    add("recall", MAIN, 8)
    add("recall", ("first", "gdn", "hla2", "ahla", "readout"), 4)
    add("hop3 match3", (*MAIN, "softmax"))
    add("recall regress", tuple(f"{arm}+window" for arm in MAIN))
    add("copy parity s3", ("first", "gdn", "hla2", "ahla", "readout", "softmax"))
    add("regress_iso", MAIN)
    add("recall", MAIN, 32)
    add("hop3 match3", tuple(f"{arm}+window" for arm in MAIN))
    add("hop3 match3 copy parity s3", ("window", "hla3", "first_ahla"))
    add("alias join", tuple(f"{arm}+window" for arm in MAIN))
    add("copy parity s3", "mesa mixed first+window gdn+window hla2+window readout+window")
    add("s5", ("first", "gdn", "hla2", "ahla", "readout", "softmax"))
    return out


class Running(NamedTuple):
    job: Job
    process: subprocess.Popen
    said: IO[str]
    since: float


def start(job: Job, out: Path, more: list[str]) -> Running:
    said = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115  closed when the job has ended
    roots = [str(HERE.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    # Exact float32 products on a GPU: the models are too small to gain from rounding.
    env = {"MLX_ENABLE_TF32": "0", "OMP_NUM_THREADS": "1"} | os.environ
    env["PYTHONPATH"] = os.pathsep.join(roots)
    process = subprocess.Popen(job.command(out, more), stdout=said, stderr=subprocess.STDOUT, env=env)
    return Running(job, process, said, time.monotonic())


def last_line(running: Running) -> str:
    running.said.seek(0)
    lines = running.said.read().strip().splitlines()
    running.said.close()
    return lines[-1] if lines else "said nothing"


def work(todo: list[Job], args: argparse.Namespace) -> tuple[int, int]:
    """(jobs done, jobs failed)."""
    begin = time.monotonic()
    deadline = begin + 60 * args.minutes
    running: list[Running] = []
    todo, done, failed = list(todo), 0, 0
    took: dict[str, float] = {}  # the longest of each task's jobs

    def fits(job: Job) -> bool:
        expected = took.get(job.task, max(took.values(), default=0.0))
        return time.monotonic() + expected < deadline

    try:
        while todo or running:
            while len(running) < args.workers and (job := next(filter(fits, todo), None)):
                todo.remove(job)
                running.append(start(job, args.out, args.more))
            if not running or time.monotonic() >= deadline:
                break
            time.sleep(0.05)
            for r in [r for r in running if r.process.poll() is not None]:
                running.remove(r)
                now, good = time.monotonic(), r.process.returncode == 0
                done, failed = done + good, failed + (not good)
                if good:
                    took[r.job.task] = max(took.get(r.job.task, 0.0), now - r.since)
                mark = "" if good else f"FAILED {r.job.key}: "
                print(f"{now - begin:6.1f} s  {mark}{last_line(r)}", flush=True)
                if args.bundle and good:
                    results.bundle(args.out, args.bundle)
    finally:
        for r in running:
            r.process.kill()
            r.process.wait()
            r.said.close()
            print(f"ended before its time: {r.job.key}", flush=True)
    if todo:
        print(f"not started: {len(todo)}, the first of them {todo[0].key}")
    return done, failed


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--workers", type=int, default=2, help="processes side by side (default: %(default)s)")
    p.add_argument("--minutes", type=float, default=9.0, help="for all of it (default: %(default)s)")
    p.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="of jobs, as --list has them")
    p.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    p.add_argument("--bundle", type=Path, help="also keep all of them in this one file")
    p.add_argument("--have", type=Path, nargs="+", default=[], help="folders or bundles with results")
    p.add_argument("--again", action="store_true", help="compute also what is there")
    p.add_argument("--list", action="store_true", help="print the jobs and do nothing")
    p.add_argument("more", nargs="*", help="after --: options of tasks.py for every job")
    args = p.parse_args()
    args.more += ["--again"] if args.again else []
    there = set() if args.again else set(results.read(args.out, *args.have))
    todo = [j for j in jobs() if any(fnmatch.fnmatchcase(j.key, only) for only in args.only)]
    if not todo:
        p.error(f"no job is like {' '.join(args.only)}: see --list")
    todo = [j for j in todo if j.key not in there]
    if args.list:
        print("\n".join(j.key for j in todo))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    done, failed = work(todo, args)
    if args.bundle:
        results.bundle(args.out, args.bundle)
    print(f"{done} done, {failed} failed, {len(todo) - done - failed} left")


if __name__ == "__main__":
    main()
