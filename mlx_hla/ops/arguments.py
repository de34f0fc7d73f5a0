"""The arguments that all operators share, typed and documented once.

A public function names its own arguments and takes these as `**shared: Unpack[SharedOptions]`; a type checker
sees each of them, and `public` shows them to `help` and to whoever asks for the signature.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, cast

import mlx.core as mx

from .checks import canonical, canonical_step

if TYPE_CHECKING:
    from typing_extensions import Unpack  # noqa: F401


class StepOptions(TypedDict, total=False):
    """What every step takes, see `mlx_hla.ops`."""

    scale: float
    decay: float | mx.array | None
    normalize: bool
    eps: float
    backend: str | None


class SharedOptions(StepOptions, total=False):
    """What every operator takes over a sequence, beside `initial_state`."""

    mask: mx.array | None
    segment_ids: mx.array | None
    group: Any


F = TypeVar("F", bound=Callable)


def _defaults(check: Callable) -> list[inspect.Parameter]:
    """The keyword arguments of a check, whose defaults are the operators'."""
    parameters = inspect.signature(check).parameters.values()
    shared = [p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    return [*shared, inspect.Parameter("backend", inspect.Parameter.KEYWORD_ONLY, default=None)]


# What every operator takes, over a sequence and in a step.
SHARED = ("initial_state", *(p.name for p in _defaults(canonical)))
STEP = tuple(p.name for p in _defaults(canonical_step))


def check_names(op: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse a keyword that is no option, in the name of the function that was called."""
    known = tuple(known)
    unknown = [name for name in given if name not in known]
    if unknown:
        raise TypeError(f"[{op}] has no option {unknown[0]!r}; it takes {', '.join(known)}")


def public(function: F) -> F:
    """The function, which with the shared arguments in the place of `**shared`, and refusing all others."""
    signature, name = inspect.signature(function), function.__name__
    check = canonical_step if name.endswith("_step") else canonical
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    names = {p.name for p in own}
    shown = [*own, *(p for p in _defaults(check) if p.name not in names)]
    arrays = {p.name for p in shown if p.kind is not inspect.Parameter.KEYWORD_ONLY}
    options = tuple(p.name for p in shown if p.name not in arrays)

    @functools.wraps(function)
    def call(*args: Any, **given: Any) -> Any:
        check_names(name, (n for n in given if n not in arrays), options)
        return function(*args, **given)

    call.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    return cast(F, call)
