"""Which functions and which state an operator's name stands for."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from mlx_hla import ops
from mlx_hla.ops.order import MAX_ORDER


class Operator(NamedTuple):
    name: str | int
    order: int
    forward: Callable
    step: Callable
    state: type

    def restore(self, memory):
        """The operator's NamedTuple from the plain lists that a saved cache comes back as."""
        if memory is None or isinstance(memory, self.state):
            return memory
        return self.state(*(tuple(field) if isinstance(field, list) else field for field in memory))


_NAMED = {
    "first": Operator("first", 1, ops.linear_attention, ops.linear_attention_step, ops.LinearState),
    "hla2": Operator("hla2", 2, ops.hla2, ops.hla2_step, ops.HLA2State),
    "ahla": Operator("ahla", 2, ops.ahla, ops.ahla_step, ops.AHLAState),
    "hla3": Operator("hla3", 3, ops.hla3, ops.hla3_step, ops.HLA3State),
}
_OF_ORDER = {1: "first", 2: "hla2", 3: "hla3"}


def find_operator(operator: str | int) -> Operator:
    """`operator`: a name, or an order ≥ 1, of which 1, 2 and 3 are "first", "hla2" and "hla3"."""
    if isinstance(operator, str) and operator in _NAMED:
        return _NAMED[operator]
    if not isinstance(operator, int) or isinstance(operator, bool) or not 1 <= operator <= MAX_ORDER:
        raise ValueError(
            f"[HLAttention] operator must be one of {', '.join(_NAMED)} or an order from 1 to "
            f"{MAX_ORDER}, got {operator!r}"
        )
    if operator in _OF_ORDER:
        return _NAMED[_OF_ORDER[operator]]
    forward, step = (partial(f, order=operator) for f in (ops.hla, ops.hla_step))
    return Operator(operator, operator, forward, step, ops.HLAState)
