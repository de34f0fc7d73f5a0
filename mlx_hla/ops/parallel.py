"""One sequence split over the ranks of a group: each holds a stretch of T, in the order of the ranks.

A pass LA_g over stretches 0, 1, .. needs of the others what each would leave alone, and how it decays what
came before it. With S_j the sum and ρ_j the decay product of stretch j, and S the state before all of them,

    before_0 = S ,   before_{j+1} = ρ_j before_j + S_j        the monoid of Thm 4.1, one pass at a time

So a pass sends a state and B·H decays, whatever T is, and goes on from `before_rank`; the state after the
last rank is the whole sequence's, on every rank. A gradient is that of the sum of what the ranks
differentiate, each its own loss.

Collectives must meet in one order on all ranks, and ranks with stretches of other lengths have other graphs.
So every collective of a run waits for the one before it, forward and backward: it takes a `turn` and passes
on the next, and its cotangent takes and passes on the turn's.

Before the first of them, ranks whose calls differ in more than T would hang or read each other's numbers as
their own. So the first call of a kind (`alike`) exchanges under a kilobyte, at once: there, all ranks must
have evaluated the same of what came before. Later calls of that kind exchange nothing for it.
"""

# B batch, T time, H heads, D key dim, V value dim, R ranks

from __future__ import annotations

from typing import Any, cast

import mlx.core as mx

from mlx_hla.ranks import agree, gathered, is_group, summed

from .scan import TINY

_known: set[tuple] = set()  # kinds of calls that all ranks have made alike


def usable(who: str, group: Any) -> Any:
    """The group, None where it has one rank; ValueError if it is none."""
    if group is not None and not is_group(group):
        got = type(group).__name__
        raise ValueError(f"[{who}] group must be None or an mx.distributed.Group, got {got}")
    return None if group is None or group.size() == 1 else group


def alike(who: str, group: Any, about: dict[str, object]) -> None:
    """ValueError on every rank unless all of them call `who` with the same shapes and options but for T."""
    kind = (who, group.size(), *((name, str(value)) for name, value in about.items()))
    if kind not in _known:
        agree(group, f"[{who}] in a group", about)
        _known.add(kind)


class Turns:
    """The order of a run's collectives, and its group. The first waits for `start`, what the run reads."""

    def __init__(self, group: Any, start: mx.array):
        self.group, self._turn = group, _after(mx.zeros(()), mx.stop_gradient(start))

    def gathered(self, x: mx.array) -> mx.array:
        """x of every rank, `[R, ..]`; a gradient comes back from all of them."""
        group = self.group

        @mx.custom_function
        def run(x, turn):
            every = gathered(_after(x, turn), group)
            return every, _after(turn, every)

        @run.vjp
        def _(primals, d, out):
            # After the forward ones too: what is differentiated need not depend on them.
            total = summed(_after(d[0], out[1], d[1]), group)
            return total[group.rank()], _after(d[1], total)

        every, self._turn = cast("tuple[mx.array, mx.array]", run(x, self._turn))
        return every

    def counted(self, x: mx.array) -> mx.array:
        """x of every rank, `[R, ..]`, of integers."""
        turn = mx.stop_gradient(self._turn)
        every = gathered(_after(x, turn), self.group)
        self._turn = _after(self._turn, every)
        return mx.stop_gradient(every)

    def last_ids(self, ids: mx.array, real: mx.array | None) -> tuple[mx.array, mx.array]:
        """(id of the last real token of the ranks before this one, whether there is any), both `[B]`.

        ids: segment ids `[B, T]`; real: the mask, or None for all.
        """
        T = ids.shape[1]
        end = mx.full(ids.shape[:1], T - 1) if real is None else mx.where(real, mx.arange(T), -1).max(axis=1)
        own = mx.take_along_axis(ids.astype(mx.int64), mx.maximum(end, 0)[:, None], axis=1)[:, 0]
        every = self.counted(mx.stack([own, (end >= 0).astype(mx.int64)]))
        state = mx.zeros_like(every[0])
        before = []
        for each in every:
            before.append(state)
            state = mx.where(each[1] > 0, each, state)
        found = mx.stack(before)[self.group.rank()]
        return found[0].astype(ids.dtype), found[1] > 0

    def shared(self, x: mx.array) -> mx.array:
        """x, the same on every rank, whose gradient is the sum over the ranks."""
        group = self.group

        @mx.custom_function
        def run(x, turn):
            return x + 0, turn + 0

        @run.vjp
        def _(primals, d, out):
            total = summed(_after(d[0], out[1], d[1]), group)
            return total, _after(d[1], total)

        x, self._turn = cast("tuple[mx.array, mx.array]", run(x, self._turn))
        return x

    def joined(self, first: mx.array | None, own: mx.array, through: mx.array) -> tuple[mx.array, mx.array]:
        """(the state before this rank's stretch, the state after all), of the stretches' states and decays.

        first: the state before the whole sequence, the same on every rank. through: in a shape that
        multiplies states.
        """
        state = mx.zeros_like(own) if first is None else self.shared(first)
        sums = self.gathered(mx.concatenate([own.reshape(-1), through.reshape(-1)]))
        before = []
        for each in sums:
            before.append(state)
            own_j, through_j = each[: own.size].reshape(own.shape), each[own.size :].reshape(through.shape)
            state = through_j * state + own_j
        # Taken from a stack and not from the list: no rank may go without what all the others wait for.
        return mx.stack(before)[self.group.rank()], state


def left(k: mx.array, v: mx.array, g: mx.array | None, power: int) -> mx.array:
    """What a stretch leaves alone, Σ_j (Π_{s>j} g_s^power) k_j v_jᵀ, float32 `[.., D, V]`: one product.

    k `[.., T, D]`, v `[.., T, V]`, g `[.., T, 1]` or None. A decay of zero counts as TINY, as in all passes.
    """
    k, v = k.astype(mx.float32), v.astype(mx.float32)
    if g is not None:
        rest = mx.cumsum(mx.log(g + TINY), axis=-2, reverse=True, inclusive=False)
        k = k * mx.exp(power * rest)
    return k.swapaxes(-1, -2) @ v


def _after(x: mx.array, *others: mx.array) -> mx.array:
    """x, which is not computed before the others are."""
    return mx.depends([x], list(others))[0]
