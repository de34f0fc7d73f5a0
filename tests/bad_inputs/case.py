"""One bad input, and what the library may answer to it."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

# What must come of an input. Some damage leaves a file good: there, any clean end will do.
REFUSED, ACCEPTED, EITHER = "refused", "accepted", "either"
# The functions and classes that a user calls, as errors name them.
WHO = re.compile(r"\[(\w+)\] ")
# Python itself says it of a call that does not fit a public function's signature.
SIGNATURE = re.compile(
    r"(\w+)(\.__init__)?\(\) (got an unexpected keyword|missing|takes|got multiple values)"
)
COMMAND_ERROR = "mlx-hla: error: "
LONGEST = 900


class Ended(NamedTuple):
    """A command's exit status and what it wrote."""

    status: int
    out: str
    err: str


@dataclass(frozen=True)
class Case:
    """An input; `run(place)` gives it to the library and returns what came of it."""

    name: str
    run: Callable[[Any], Any]
    expect: str = REFUSED
    as_user: bool = False  # permissions do not bind root
    says: str = ""  # what the message must speak of

    @property
    def area(self) -> str:
        return self.name.partition(":")[0]

    @property
    def skipped(self) -> str | None:
        return "permissions do not bind root" if self.as_user and os.geteuid() == 0 else None


def verdict(case: Case, place: Any) -> str | None:
    """What is wrong with the library's answer to a case, or None."""
    try:
        result = case.run(place)
    except Exception as e:
        return _of_error(case, e)
    if isinstance(result, Ended):
        return _of_command(case, result)
    return f"accepted: {result!r:.200}" if case.expect == REFUSED else None


def _of_error(case: Case, error: Exception) -> str | None:
    if case.expect == ACCEPTED:
        return f"refused: {error!r:.300}"
    text, last = str(error), traceback.extract_tb(error.__traceback__)[-1]
    where = f"{type(error).__name__} from {os.path.basename(last.filename)}:{last.lineno}: {text[:300]}"
    if type(error).__name__ != "InputError":
        named = (SIGNATURE if isinstance(error, TypeError) else WHO).match(text) or WHO.match(text)
        if type(error) not in (ValueError, TypeError) or not named or not _is_public(named[1]):
            return f"a bare {where}"
    return _of_message(case, text) and f"{_of_message(case, text)}: {where}"


def _is_public(name: str) -> bool:
    """Whether a user can have called it. MLX puts names of its own operations in brackets too."""
    import mlx_hla
    from mlx_hla import evaluate, generate, losses, models, nn, sampling, tokenizer, train

    homes = (mlx_hla, nn, models, train, generate, sampling, tokenizer, evaluate, losses)
    return name == "monoid" or any(hasattr(home, name) for home in homes)


def _of_message(case: Case, text: str) -> str | None:
    if "\n" in text:
        return "the message has several lines"
    if not 10 <= len(text) <= LONGEST:
        return f"the message has {len(text)} characters"
    if case.says and case.says not in text:
        return f"the message does not speak of {case.says!r}"
    return None


def _of_command(case: Case, ended: Ended) -> str | None:
    status, out, err = ended
    told = f"status {status}, {err[-400:]!r} on stderr, {out[-200:]!r} on stdout"
    if "Traceback" in out + err:
        return f"a traceback: {told}"
    if status == 0:
        if COMMAND_ERROR in err:
            return f"an error with status 0: {told}"
        return f"accepted: {told}" if case.expect == REFUSED else None
    if case.expect == ACCEPTED:
        return f"refused: {told}"
    if status == 141 and not err:
        return None  # the reader has gone
    if status not in (1, 2, 130):
        return f"an odd end: {told}"
    if err.count(COMMAND_ERROR) != 1 or not err.endswith("\n"):
        return f"no single line that says what is wrong: {told}"
    line = err[err.index(COMMAND_ERROR) + len(COMMAND_ERROR) : -1]
    if re.match(r"\w*(Error|Exception|Interrupt)\b", line):
        return f"a bare {told}"
    return _of_message(case, line) and f"{_of_message(case, line)}: {told}"
