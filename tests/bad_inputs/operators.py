"""Operators and their steps: every argument with values of a wrong type, shape, dtype or size."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

import mlx_hla
from mlx_hla.ops.checks import Dims
from mlx_hla.ops.operator import OPERATORS, Operator
from mlx_hla.ops.order import of_order

from .case import Case
from .values import DTYPES, INF, NAN, NOT_ARRAY, NOT_BOOL, NOT_REAL, STRANGE, label, without

B, T, HQ, HKV, D, V = 2, 6, 4, 2, 8, 5
SEED, A_FUNCTION = 7, 60  # cases for each function
ALL: list[Operator] = [*OPERATORS.values(), of_order(4), of_order(5)]


def _arrays(step: bool) -> dict[str, mx.array]:
    lead = (B,) if step else (B, T)
    return {
        "q": mx.zeros((*lead, HQ, D)),
        "k": mx.zeros((*lead, HKV, D)),
        "v": mx.zeros((*lead, HKV, V)),
    }


def _call(operator: Operator, step: bool, change: dict[str, Any]) -> Any:
    function = getattr(mlx_hla, operator.name + ("_step" if step else ""))
    given = {**_arrays(step), **({"state": None} if step else {}), **operator.selected, **change}
    given = {n: x() if isinstance(x, partial) else x for n, x in given.items()}
    o, state = function(**given)
    mx.eval(o, *(x for x in state if isinstance(x, mx.array)))
    return o


def _wrong_array(rng: random.Random, shape: tuple[int, ...]) -> Any:
    """Something in the place of an array of this shape."""
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice([*NOT_ARRAY, *STRANGE, None])
    if kind == 1:
        return partial(mx.zeros, shape, rng.choice(DTYPES))
    sizes = list(shape)
    if kind == 2:
        sizes.pop(rng.randrange(len(sizes)))
    elif kind == 3:
        sizes.insert(rng.randrange(len(sizes) + 1), rng.choice([1, 2]))
    elif kind == 4:
        sizes[rng.randrange(len(sizes))] = 0
    else:
        axis = rng.choice([0, 1, len(sizes) - 1])
        sizes[axis] += rng.choice([1, 3])
    return partial(mx.zeros, tuple(sizes), mx.float32)


def _wrong_state(rng: random.Random, operator: Operator, step: bool) -> Any:
    """A state that is none of this operator's, or does not fit the call."""
    dims = Dims(B, HQ, HKV, D, V)
    kind = rng.randrange(6)
    if kind == 0:
        others = [o for o in ALL if o.state is not operator.state]
        return partial(rng.choice(others).zeros, dims, False)
    if kind == 1:
        return partial(operator.zeros, dims, True) if _normalises(operator) else "state"
    if kind == 2:
        place = rng.randrange(len(dims))
        sizes = [n + (2 if i == place else 0) for i, n in enumerate(dims)]
        return partial(operator.zeros, Dims(*sizes), False) if _tells(operator, place) else (1, 2)
    if kind == 3:
        return partial(_changed, operator, dims, rng.choice([mx.float16, mx.int32, mx.bfloat16]))
    if kind == 4:
        return partial(_changed, operator, dims, rng.choice(["numpy", "none", "text", "number"]))
    return rng.choice([(), [], "state", 3, {"S": 1}, mx.zeros((2, 2)), *STRANGE])


def _normalises(operator: Operator) -> bool:
    return any(slot.normaliser for slot in operator.slots)


def _tells(operator: Operator, place: int) -> bool:
    """Whether a state shows this size of a call: no operator with key-value slots alone knows Hq."""
    sizes = [n + (2 if i == place else 0) for i, n in enumerate((B, HQ, HKV, D, V))]
    right = operator.shapes(Dims(B, HQ, HKV, D, V), False)
    return right != operator.shapes(Dims(*sizes), False)


def _changed(operator: Operator, dims: Dims, how: Any) -> Any:
    """The operator's state with its first array replaced."""
    state = operator.zeros(dims, False)
    first = state[0]
    new = (
        {
            "numpy": np.zeros(first.shape, np.float32),
            "none": None,
            "text": "S",
            "number": 0.0,
        }.get(how)
        if isinstance(how, str)
        else first.astype(how)
    )
    return type(state)(new, *state[1:])


def _typo(rng: random.Random, name: str) -> str:
    at = rng.randrange(len(name) - 1)
    return name[:at] + name[at + 1] + name[at] + name[at + 2 :]


def _change(rng: random.Random, operator: Operator, step: bool) -> tuple[str, Any] | None:
    """One argument and a bad value for it."""
    lead = (B,) if step else (B, T)
    shapes = {n: x.shape for n, x in _arrays(step).items()}
    makers: dict[str, Callable[[], Any]] = {
        **{n: partial(_wrong_array, rng, s) for n, s in shapes.items()},
        "scale": lambda: rng.choice([0, 0.0, -INF, *NOT_REAL]),
        "decay": lambda: rng.choice(
            [1.01, -0.1, 5, NAN, INF, True, "0.9", [0.9] * HKV, np.ones(HKV, np.float32), *STRANGE]
            + [
                partial(mx.ones, s, mx.float32)
                for s in ((HQ,), (T, HKV), (*lead, HQ), (1,), (), (*lead, HKV, 1))
            ]
            + [partial(mx.ones, (HKV,), t) for t in DTYPES]
        ),
        "normalize": lambda: rng.choice(NOT_BOOL),
        "eps": lambda: rng.choice([-1, -1e-9, *NOT_REAL]),
        "backend": lambda: rng.choice(["cuda", "METAL", "", 3, True, ["mlx"], mx.array(1), *STRANGE]),
        "unknown": lambda: 1.0,
        ("state" if step else "initial_state"): partial(_wrong_state, rng, operator, step),
    }
    if not step:
        makers["mask"] = lambda: rng.choice(
            ["causal", True, 1.0, [[True] * T] * B, np.ones((B, T), bool), *STRANGE]
            + [
                partial(mx.ones, s, mx.bool_)
                for s in ((T,), (B, T + 1), (B, T, 1), (B, T, T), (T, B), (1, T))
            ]
            + [partial(mx.ones, (B, T), t) for t in (mx.float32, mx.int32, mx.uint8)]
        )
        makers["segment_ids"] = lambda: rng.choice(
            ["a", 1, [[0] * T] * B, np.zeros((B, T), np.int32), *STRANGE]
            + [partial(mx.zeros, s, mx.int32) for s in ((T,), (B, T + 1), (B, T, 1), (T, B), (1, T), ())]
            + [partial(mx.zeros, (B, T), t) for t in (mx.float32, mx.bool_, mx.bfloat16)]
        )
    for option in operator.options:
        wrong = without(NOT_REAL, None)
        if option.per_token:
            shapes_ = ((HQ + 1,), (HKV,), (T, HQ), (*lead, HKV), (*lead, HQ, 1), ())
            wrong += [partial(mx.ones, s, mx.float32) for s in shapes_]
            wrong += [partial(mx.ones, (HQ,), t) for t in DTYPES]
        makers[option.name] = lambda wrong=wrong: rng.choice(wrong)
    if operator.name in ("hla2", "hla3"):
        makers["masked"] = lambda: rng.choice(NOT_BOOL)
    if operator.name == "hla3":
        makers["convention"] = lambda: rng.choice(
            ["exakt", "", "Paper", None, 3, True, mx.array(1), *STRANGE]
        )
    if operator.name == "hla":
        makers["order"] = lambda: rng.choice(
            [0, -1, 17, 10**30, 1.5, 2.0, "2", True, None, mx.array(2), *STRANGE]
        )
        makers["masked"] = lambda: rng.choice([True, False])
    name = rng.choice(list(makers))
    if name == "unknown":
        return _typo(rng, rng.choice(["scale", "decay", "normalize", "segment_ids", "backend"])), 1.0
    return name, makers[name]()


def cases() -> Iterator[Case]:
    for operator in ALL:
        for step in (False, True):
            rng = random.Random(f"{SEED} {operator.key} {step}")
            seen = set()
            for _ in range(10 * A_FUNCTION):
                name, value = _change(rng, operator, step)
                shown = label(value)
                key = f"operators:{operator.key}{'-step' if step else ''}-{name}={shown}"
                if key in seen or (name in ("k", "v") and _fits(name, value, step)):
                    continue
                seen.add(key)
                yield Case(key, lambda place, o=operator, s=step, c={name: value}: _call(o, s, c))
                if len(seen) == A_FUNCTION:
                    break


def _fits(name: str, value: Any, step: bool) -> bool:
    """Whether an array happens to be good for k or v: values may have any width."""
    if not isinstance(value, partial) or value.args[1] != mx.float32:
        return False
    shape, right = value.args[0], _arrays(step)[name].shape
    return shape == right or (name == "v" and 0 not in shape and shape[:-1] == right[:-1])
