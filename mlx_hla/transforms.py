"""Functions of named arrays with a reverse mode of their own, which MLX can differentiate and map.

`mx.custom_function` knows arrays by their places. Here a function takes one NamedTuple of arrays and returns
one; fields may be None or NamedTuples themselves, and every array begins with the batch axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import mlx.core as mx


def leaves(tree: Any) -> list[mx.array]:
    """The arrays of nested tuples, in order, without the Nones."""
    if isinstance(tree, tuple | list):
        return [x for field in tree for x in leaves(field)]
    return [] if tree is None else [tree]


def form_of(tree: Any) -> Any:
    """The tree with True for every array: what a function's reverse mode must know, and hashable."""
    if isinstance(tree, tuple):
        fields = map(form_of, tree)
        return type(tree)(*fields) if hasattr(tree, "_fields") else tuple(fields)
    return None if tree is None else True


def filled(form: Any, arrays: Sequence[mx.array] | Iterator[mx.array]) -> Any:
    """The inverse of `leaves` for a tree of this form."""
    arrays = iter(arrays)
    if isinstance(form, tuple):
        fields = (filled(field, arrays) for field in form)
        return type(form)(*fields) if hasattr(form, "_fields") else tuple(fields)
    return None if form is None else next(arrays)


def _beside(form: Any, tree: Any) -> list[mx.array | None]:
    """A field of `tree` for every array of `form`: None where it has none."""
    if isinstance(form, tuple):
        fields = (None,) * len(form) if tree is None else tree
        return [x for pair in zip(form, fields, strict=True) for x in _beside(*pair)]
    return [] if form is None else [tree]


def _listed(arrays) -> list[mx.array]:
    """MLX hands over a lone array as it is."""
    return [arrays] if isinstance(arrays, mx.array) else list(arrays)


def _twice(*_):
    raise NotImplementedError("[mlx_hla] the operators' gradients cannot be differentiated in reverse again")


@mx.custom_function
def _same(*arrays):
    return list(arrays)


_same.vjp(_twice)


def once(tree: Any) -> Any:
    """The same arrays, which let no gradient through: to differentiate what is made of them raises.

    For a reverse mode that MLX can map and run forwards by itself. `differentiable` would keep all that a
    gradient reads until the last of its results is there.
    """
    return filled(form_of(tree), _listed(_same(*leaves(tree))))


def _mapped(function: Callable, vjp: Callable) -> Any:
    """`function` of arrays with its reverse mode, also under vmap: the mapped axis joins the batch."""
    run: Any = mx.custom_function(function)
    run.vjp(vjp)

    @run.vmap
    def run_vmap(arrays, axes):
        size = next(x.shape[a] for x, a in zip(arrays, axes, strict=True) if a is not None and a >= 0)

        def fold(x, axis):
            mapped = axis is not None and axis >= 0
            x = mx.moveaxis(x, axis, 0) if mapped else mx.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        out = run(*(fold(x, a) for x, a in zip(arrays, axes, strict=True)))
        return [x.reshape(size, -1, *x.shape[1:]) for x in out], [0] * len(out)

    return run


class _Built(NamedTuple):
    run: Callable
    outputs: list[Any]  # the form of what it returns, known after its first call


def differentiable(forward: Callable, backward: Callable | None = None) -> Callable:
    """`forward(inputs)`, whose reverse mode is `backward(inputs, outputs, cotangents)`.

    inputs and outputs are NamedTuples. backward returns a NamedTuple like inputs, None for a gradient of 0.
    Without it the function is itself a gradient, and to differentiate it in reverse raises.
    """

    @lru_cache(maxsize=64)
    def built(form) -> _Built:
        outputs: list[Any] = []

        def run(*arrays):
            result = forward(filled(form, arrays))
            outputs[:] = [form_of(result)]
            return leaves(result)

        def run_vjp(primals, cotangents, results):
            primals = _listed(primals)
            after = (filled(outputs[0], _listed(x)) for x in (results, cotangents))
            grads = _beside(form, backward(filled(form, primals), *after))
            return [mx.zeros_like(x) if d is None else d for x, d in zip(primals, grads, strict=True)]

        return _Built(_mapped(run, run_vjp if backward else _twice), outputs)

    def call(inputs):
        function = built(form_of(inputs))
        arrays = function.run(*leaves(inputs))
        return filled(function.outputs[0], arrays)

    return call
