"""What an operator is: its names, state, composition, options and kernels, in one record.

Everything that lists or handles operators derives it from here: state checks, zero states, steps, the calls
of the kernels, the layer's and the configuration's choices, the self-test and the tests. A new operator is
one file of this folder with a record and its two public functions, and its reference in float64.
"""

# B batch, T time, Hq query heads, Hkv key-value heads, D key dim, Dv value dim

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx

from .checks import Call, Dims, Option, fail

MAX_ORDER = 16
Shape = tuple[int, ...]


class Slot(NamedTuple):
    """One array of a state.

    name: its field. heads: "kv", one for each key-value head, or "q", one for each query head.
    normaliser: the field of the same sum for the value 1, `[B, heads, D]`, in use where a call normalises. A
    slot that has one holds values, `[B, heads, D, Dv]`; one that has none holds keys, `[B, heads, D, D]`, or
    is a count of tokens, `[B, heads]`. symmetric: equal to its transpose.
    member: its place where the field is a tuple of arrays.
    """

    name: str
    heads: str = "kv"
    normaliser: str | None = None
    symmetric: bool = False
    counts: bool = False
    member: int | None = None

    @property
    def key(self) -> str:
        """What compositions call it."""
        return self.name if self.member is None else f"{self.name}{self.member}"

    def shape(self, dims: Dims) -> tuple[int, ...]:
        heads = dims.Hkv if self.heads == "kv" else dims.Hq
        if self.counts:
            return dims.B, heads
        return dims.B, heads, dims.D, dims.Dv if self.normaliser else dims.D


class Held(NamedTuple):
    """A slot's array and its normaliser, None unless the call normalises."""

    matrix: mx.array
    vector: mx.array | None = None


@dataclass(frozen=True, eq=False)
class Operator:
    """One operator, or one variant of it.

    name: of its public function; `<name>_step` is the step, and `serial_<name>`, `dense_<name>`, `vjp_<name>`
        of `mlx_hla.reference` define it in float64.
    order: how many times a query meets the past.
    state, slots: the NamedTuple that it returns, and the arrays in it.
    compose: `compose(place) -> o`, made of passes `place.la(slot, q, k, v)`, see `places`.
    degree: o is homogeneous in `scale`, of this degree; None if it is not.
    alias: what layers and configurations call it, if not by its name.
    family: of the kernels made for it; without one its passes run on the kernels of first order.
    selected: the public function's arguments that select this variant, of which `variant` is the name.
    wide: it takes differences in which rounded passes would not cancel, so it runs in float32.
    """

    name: str
    order: int
    state: type
    slots: tuple[Slot, ...]
    compose: Callable[..., mx.array]
    degree: int | None
    alias: str | None = None
    family: str | None = None
    options: tuple[Option, ...] = ()
    selected: Mapping[str, Any] = field(default_factory=dict)
    variant: str | None = None
    wide: bool = False

    @property
    def key(self) -> str:
        """A name of its own for every variant."""
        return "-".join((self.label, *([self.variant] if self.variant else [])))

    @property
    def label(self) -> str:
        """What layers and configurations call it."""
        return self.alias or self.name

    # ---- states: slots by key <-> the fields of the public NamedTuple

    def held(self, state: Any) -> dict[str, Held]:
        """The slots of a state."""

        def one(name: str | None, index: int | None) -> Any:
            x = None if name is None else getattr(state, name)
            return x if x is None or index is None else x[index]

        return {s.key: Held(one(s.name, s.member), one(s.normaliser, s.member)) for s in self.slots}

    def state_of(self, held: Mapping[str, Held]) -> Any:
        """The inverse of `held`."""
        fields: dict[str, Any] = {}
        for s in self.slots:
            for name, x in zip((s.name, s.normaliser), held[s.key], strict=True):
                if name is None or x is None:
                    continue
                fields[name] = x if s.member is None else (*fields.get(name, ()), x)
        return self.state(**fields)

    def shapes(self, dims: Dims, normalize: bool) -> dict[str, tuple[Shape, Shape | None]]:
        """(shape, shape of the normaliser or None) of every slot."""
        out: dict[str, tuple[Shape, Shape | None]] = {}
        for s in self.slots:
            shape = s.shape(dims)
            out[s.key] = shape, shape[:3] if normalize and s.normaliser else None
        return out

    def zeros(self, dims: Dims, normalize: bool) -> Any:
        """The state before the first token."""
        shapes = self.shapes(dims, normalize).items()
        return self.state_of(
            {k: Held(mx.zeros(a), None if b is None else mx.zeros(b)) for k, (a, b) in shapes}
        )

    def restore(self, memory: Any) -> Any:
        """The state's NamedTuple from the plain lists that a saved one comes back as."""
        # A state of another operator is none of this one's, whatever its fields: `check` says so.
        if not isinstance(memory, tuple | list) or hasattr(memory, "_fields"):
            return memory
        kind: Any = self.state
        if not 0 <= len(kind._fields) - len(memory) <= len(kind._field_defaults):
            return memory
        return kind(*(tuple(x) if isinstance(x, list) else x for x in memory))

    def check(self, call: Call, state: Any) -> Any:
        """The state, or a ValueError that says what is wrong with it."""
        if state is None:
            return None
        kind: Any = self.state
        tuples = {s.name: s.member + 1 for s in self.slots if s.member is not None}
        want = f"the state must be {'an' if kind.__name__[0] in 'AH' else 'a'} {kind.__name__}"
        want += "".join(f" with a tuple of {n} {name}" for name, n in tuples.items())
        if not isinstance(state, kind):
            fail(call.op, want, type(state).__name__)
        for several in tuples:
            n = _length(getattr(state, several))
            if n != tuples[several]:
                fail(call.op, want, f"{n} {several}")
        shapes: dict[str, list[Shape]] = {}
        for s, (shape, vector) in zip(
            self.slots, self.shapes(call.dims, call.normalize).values(), strict=True
        ):
            shapes.setdefault(s.name, []).append(shape)
            if s.normaliser and vector:
                shapes.setdefault(s.normaliser, []).append(vector)
        for name in kind._fields:
            _check_field(call.op, name, getattr(state, name), shapes.get(name, []))
        return state


def _length(x: Any) -> int:
    return len(x) if isinstance(x, tuple | list) else 0


def _check_field(op: str, name: str, x: Any, shapes: list[Shape]) -> None:
    """A field of a state: None without a shape, an array of one shape, or several of them."""
    if not shapes:
        if x is not None:
            fail(
                op,
                f"state.{name} must be None: it belongs to normalize=True, or to another order",
                "an array",
            )
        return
    if len(shapes) > 1 and _length(x) != len(shapes):
        fail(op, f"state.{name} must be a tuple of {len(shapes)} arrays", repr(x)[:60])
    for one, shape in zip(x if len(shapes) > 1 else [x], shapes, strict=True):
        if not isinstance(one, mx.array) or one.shape != shape or one.dtype != mx.float32:
            got = f"{one.dtype} {one.shape}" if isinstance(one, mx.array) else repr(one)
            fail(op, f"state.{name} must be float32 {list(shape)}", got)


# ---- all of them

OPERATORS: dict[str, Operator] = {}


def register(operator: Operator) -> Operator:
    """The record, which everything that goes by a list of operators knows from here on."""
    OPERATORS[operator.key] = operator
    return operator


def choices() -> tuple[str, ...]:
    """What layers and configurations take, lowest order first."""
    return tuple(o.label for o in sorted(OPERATORS.values(), key=lambda o: o.order) if o.variant is None)


def find(name: str) -> Operator:
    """The operator of this label; ValueError if there is none."""
    found = OPERATORS.get(name)
    if found is None or found.variant is not None:
        raise ValueError(
            f"operator must be one of {', '.join(choices())} or an order from 1 to {MAX_ORDER}, got {name!r}"
        )
    return found
