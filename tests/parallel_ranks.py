"""Run by `mlx.launch` on every rank: operators over a split sequence beside the whole. See test_parallel."""

import itertools
import os
import sys

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

import mlx_hla

CALLS = {
    "first": (mlx_hla.linear_attention, {}),
    "hla2": (mlx_hla.hla2, {"ridge": 0.3}),
    "unmasked": (mlx_hla.hla2, {"masked": False}),
    "ahla": (mlx_hla.ahla, {}),
    "hla3": (mlx_hla.hla3, {}),
    "order 4": (mlx_hla.hla, {"order": 4}),
    "mixed": (mlx_hla.mixed, {}),
    "readout": (mlx_hla.readout, {"beta": "array"}),
}
# Tokens of each rank: uneven, one of them, none of them.
STRETCHES = {1: (13,), 2: (70, 9), 3: (4, 0, 17), 4: (0, 5, 1, 66)}
CASES = [
    {"decay": "none"},
    {"decay": "gates", "carried": True},
    {"decay": "gates", "mask": True, "segments": True, "carried": True},
    {"decay": "heads", "segments": True, "normalize": True},
]


def problem(case, T, seed):
    """(arrays of the whole sequence by name, options)."""
    rng = np.random.default_rng(seed)
    B, Hq, Hkv, D, Dv = 2, 4, 2, 6, 5

    def normal(*shape):
        return mx.array(rng.normal(size=shape).astype(np.float32))

    arrays = {"q": normal(B, T, Hq, D), "k": normal(B, T, Hkv, D), "v": normal(B, T, Hkv, Dv)}
    options = {"scale": D**-0.5}
    if case["decay"] == "gates":
        g = rng.uniform(0.7, 1, (B, T, Hkv))
        g[:, :: max(1, T // 3)] = 0
        arrays["decay"] = mx.array(g.astype(np.float32))
    elif case["decay"] == "heads":
        options["decay"] = mx.array([0.9, 0.97])
    if case.get("mask"):
        options["mask"] = mx.array(rng.random((B, T)) < 0.7)
    if case.get("segments"):
        options["segment_ids"] = mx.array(np.cumsum(rng.random((B, T)) < 0.15, axis=1))
    if case.get("normalize"):
        arrays["q"], arrays["k"] = mx.abs(arrays["q"]), mx.abs(arrays["k"])
        options["normalize"] = True
    return arrays, options


def leaves_of(state):
    return [(name, x) for name, x in tree_flatten(state) if x is not None]


def rebuilt(state, leaves):
    """A state like this one of other arrays."""
    fields = tree_unflatten(list(leaves.items()))
    return type(state)(*(tuple(x) if isinstance(x, list) else x for x in fields))


def run(name, case, lengths, group):
    """The largest relative error of values, states and gradients of this rank."""
    rank, T = group.rank(), sum(lengths)
    f, own = CALLS[name]
    arrays, options = problem(case, T, seed=len(name) + T)
    own = dict(own)
    if own.get("beta") == "array":
        arrays["beta"] = mx.random.normal((2, T, 4), key=mx.random.key(1)) * 0.3
        del own["beta"]
    start, state = {}, None
    if case.get("carried"):
        before, _ = problem({"decay": "none"}, 7, seed=99)
        _, state = f(before["q"], before["k"], before["v"], **own, scale=options["scale"])
        start = dict(leaves_of(state))
    begin = sum(lengths[:rank])
    stretch = slice(begin, begin + lengths[rank])
    target = mx.random.normal((2, T, 4, 5), key=mx.random.key(2))

    def split(x):
        timed = isinstance(x, mx.array) and x.ndim > 1 and x.shape[1] == T
        return x[:, stretch] if timed else x

    def outputs(arrays, start, target, options, group):
        rest = {k: x for k, x in arrays.items() if k not in "qkv"}
        held = None if state is None else rebuilt(state, start)
        o, after = f(
            arrays["q"], arrays["k"], arrays["v"], initial_state=held, group=group, **rest, **own, **options
        )
        leaves = [x for _, x in leaves_of(after)]
        # The state is the same on every rank: each has its share of that part of the loss.
        share = 1 if group is None else group.size()
        return (o * target).sum() + sum((x * x).sum() for x in leaves) / share, (o, leaves)

    def both(arrays, start, target, options, group):
        def loss(arrays, start):
            return outputs(arrays, start, target, options, group)

        (_, (o, leaves)), (d_arrays, d_start) = mx.value_and_grad(loss, argnums=(0, 1))(arrays, start)
        return {"o": o, **{f"state {i}": x for i, x in enumerate(leaves)}}, d_arrays, d_start

    mine, said = ({k: split(x) for k, x in d.items()} for d in (arrays, options))
    got = both(mine, start, split(target), said, group)
    mx.eval(got)
    want = both(arrays, start, target, options, None)
    worst = (0.0, "")
    for kind, mine, whole in zip(("", "d", "d initial "), got, want, strict=True):
        assert mine.keys() == whole.keys()
        for key, x in mine.items():
            y = split(whole[key]) if key in ("o", *arrays) else whole[key]
            assert x.shape == y.shape, (name, case, key, x.shape, y.shape)
            if x.size:
                # Behind a decay of zero a gradient is 1e-30 of what it was: nothing.
                scale = max(1e-6, np.abs(np.array(whole[key])).max())
                error = np.abs(np.array(x) - np.array(y)).max() / scale
                worst = max(worst, (float(error), kind + key))
    return worst


def main():
    launched = "MLX_RANK" in os.environ
    group = mx.distributed.init(strict=True, backend="ring") if launched else mx.distributed.init()
    lengths = STRETCHES[group.size()]
    wanted = sys.argv[1:] or list(CALLS)
    for name, case in itertools.product(wanted, CASES):
        if case.get("normalize") and name in ("hla3", "order 4", "readout"):
            continue  # signed denominators
        error, where = run(name, case, lengths, group)
        print(f"rank {group.rank()} {name} {case}: {error:.1e} {where}", flush=True)
        assert error < 1e-5, (name, case, error, where)
    if group.size() > 1:
        q = mx.ones((1, 2, 1, 4))
        with pytest.raises(
            ValueError, match=r"\[hla3\] group must be None: this variant reads states before"
        ):
            mlx_hla.hla3(q, q, q, convention="paper", group=group)
    print(f"rank {group.rank()} done", flush=True)


if __name__ == "__main__":
    main()
