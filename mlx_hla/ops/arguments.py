"""The arguments that all operators share, typed and documented once.

A public function names its own arguments and takes these as `**shared: Unpack[SharedOptions]`; a type checker
sees each of them, and `public` shows them to `help` and to whoever asks for the signature.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, TypedDict, TypeVar

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


F = TypeVar("F", bound=Callable)


def _defaults(function: Callable) -> list[inspect.Parameter]:
    """The keyword arguments of a check, whose defaults are the operators'."""
    parameters = inspect.signature(function).parameters.values()
    shared = [p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    return [*shared, inspect.Parameter("backend", inspect.Parameter.KEYWORD_ONLY, default=None)]


def public(function: F) -> F:
    """The function, whose signature shows the shared arguments in the place of `**shared`."""
    signature = inspect.signature(function)
    check = canonical_step if function.__name__.endswith("_step") else canonical
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    names = {p.name for p in own}
    shown = [*own, *(p for p in _defaults(check) if p.name not in names)]
    function.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    return function
