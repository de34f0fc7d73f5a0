"""Bad inputs: a generator of them, and a worker that tries them one by one.

An input fails if its answer is a traceback, a bare TypeError or the like, a hang, a crash, a memory beyond
bounds, or silent acceptance of nonsense. `case` says what counts as an answer; `operators`, `library`,
`commands`, `folders`,
`corpora` and `states` make the inputs; `worker` tries them in a process of its own, which `pool`
watches and replaces. Everything random is drawn from fixed seeds.
"""

from __future__ import annotations

import random
from functools import cache

from .case import Case

# How many of the sample that runs every time come from each area.
SAMPLE = {
    "operators": 20,
    "library": 20,
    "commands": 20,
    "model": 15,
    "checkpoint": 11,
    "corpus": 7,
    "state": 7,
}


@cache
def all_cases() -> dict[str, Case]:
    """name -> case, in order."""
    from . import commands, corpora, folders, library, operators, states

    cases: dict[str, Case] = {}
    for module in (operators, library, commands, folders, corpora, states):
        for case in module.cases():
            name, n = case.name, 2
            while name in cases:
                name, n = f"{case.name}#{n}", n + 1
            cases[name] = case
    return cases


def sample() -> list[str]:
    """A fixed choice of cases from every area."""
    names = {area: [n for n, c in all_cases().items() if c.area == area] for area in SAMPLE}
    return [n for area, k in SAMPLE.items() for n in random.Random(area).sample(names[area], k)]
