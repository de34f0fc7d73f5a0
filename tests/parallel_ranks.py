"""Run by `mlx.launch` on every rank: operators over a split sequence beside the whole. See test_parallel."""

import copy
import dataclasses
import itertools
import os
import sys

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

import mlx_hla
from mlx_hla.errors import InputError
from mlx_hla.generate import read
from mlx_hla.losses import token_losses
from mlx_hla.models import LanguageModel, ModelConfig
from mlx_hla.models.lm import Place
from mlx_hla.nn import HLAttention, SoftmaxAttention, WindowAttention

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


LAYERS = {
    "hla": {"operator": "hla2", "num_kv_heads": 2},
    "rope": {"operator": "first", "rope": True, "conv_size": 3},
    "plain": {"operator": "ahla", "conv_size": 0},
    "turned": {"operator": "readout", "conv_size": 0, "rope": True, "coefficients": "learned"},
    "window": {"window": 6, "num_kv_heads": 2},
    "wide": {"window": 40, "conv_size": 0},
}
LAYER_CASES = [
    {},
    {"carried": True},
    {"mask": True, "carried": True},
    {"segments": True},
    {"mask": True, "segments": True, "carried": True},
]


def layer(name):
    mx.random.seed(4)
    options = LAYERS[name]
    kind = WindowAttention if "window" in options else HLAttention
    made = kind(16, 4, **options)
    for gate in ("decay_gate", "step_gate"):
        if gate in made:
            made[gate].weight = 0.3 * mx.random.normal(made[gate].weight.shape)
    return made


def run_layer(name, case, lengths, group):
    """As `run`, of a layer: outputs, caches, gradients of inputs and, over the ranks, of parameters."""
    rank, T = group.rank(), sum(lengths)
    rng = np.random.default_rng(len(name) + 10 * T)
    x, target = (mx.array(rng.normal(size=(2, T, 16)).astype(np.float32)) for _ in range(2))
    mask = mx.array(rng.random((2, T)) < 0.6) if case.get("mask") else None
    ids = mx.array(np.cumsum(rng.random((2, T)) < 0.1, axis=1)) if case.get("segments") else None
    begin = sum(lengths[:rank])
    stretch = slice(begin, begin + lengths[rank])
    more = mx.array(rng.normal(size=(2, 5, 16)).astype(np.float32))

    def both(x, target, mask, ids, group):
        made = layer(name)
        cache = made.make_cache()
        if case.get("carried"):
            made(more, cache=cache)

        def loss(params, x):
            made.update(params)
            held = copy.copy(cache)
            y = made(x, mask, ids, held, group)
            return (y * target).sum(), (y, held)

        params = made.trainable_parameters()
        (_, (y, held)), (d_params, dx) = mx.value_and_grad(loss, argnums=(0, 1))(params, x)
        d_params = dict(tree_flatten(d_params))
        mx.eval(y, dx, d_params)
        if group is not None:  # one after the other, in one order
            for key in sorted(d_params):
                d_params[key] = mx.distributed.all_sum(d_params[key], group=group)
                mx.eval(d_params[key])
        made.update(params)
        after = made(more, cache=held)  # what the cache says of what comes next
        return {"y": y, "dx": dx}, {**d_params, "after": after}

    def split(a):
        return None if a is None else a[:, stretch]

    got, got_whole = both(split(x), split(target), split(mask), split(ids), group)
    want, want_whole = both(x, target, mask, ids, None)
    pairs = [(k, got[k], split(want[k]), want[k]) for k in got]
    pairs += [(k, got_whole[k], want_whole[k], want_whole[k]) for k in got_whole]
    worst = (0.0, "")
    for key, a, b, whole in pairs:
        assert a.shape == b.shape, (name, case, key, a.shape, b.shape)
        if a.size:
            scale = max(1e-6, np.abs(np.array(whole)).max())
            worst = max(worst, (float(np.abs(np.array(a) - np.array(b)).max() / scale), key))
    return worst


def run_model(lengths, group):
    config = ModelConfig(
        vocab_size=50, dims=32, num_layers=4, num_heads=2, hidden_dims=40, layers=("window", "hla2"), window=9
    )
    model, T, rank = LanguageModel(config, seed=1), sum(lengths), group.rank()
    tokens = mx.random.randint(0, 50, (2, T), key=mx.random.key(3))
    begin = sum(lengths[:rank])
    cache, whole = model.make_cache(), model.make_cache()
    got = model(tokens[:, begin : begin + lengths[rank]], cache, group=group)
    mx.eval(got, [c.state for c in cache])
    want = model(tokens, whole)[:, begin : begin + lengths[rank]]
    then = model(tokens[:, :3], cache), model(tokens[:, :3], whole)
    error = max((float(mx.abs(a - b).max()) for a, b in ((got, want), then) if a.size), default=0.0)
    return error, "logits"


def run_compiled(group):
    """A step's losses and gradients of a split model, compiled, beside those that are not."""
    config = ModelConfig(vocab_size=50, dims=16, num_layers=2, num_heads=2, hidden_dims=24, window=3)
    config = dataclasses.replace(config, layers=("hla2", "window"))
    model, rank = LanguageModel(config, seed=1), group.rank()
    params = model.trainable_parameters()

    def loss(params, tokens, key):
        options = {"group": group, "dropout": 0.1, "key": key, "place": Place(0, 2, rank, group.size())}
        return token_losses(model, params, tokens, **options).sum()

    plain = mx.value_and_grad(loss)
    compiled, worst = mx.compile(plain), 0.0
    for n, T in enumerate((9, 9, 12)):  # a length that was compiled, and a new one
        tokens = mx.random.randint(0, 50, (2, T), key=mx.random.key(10 * n + rank))
        got, want = (f(params, tokens, mx.random.key(n)) for f in (compiled, plain))
        mx.eval(got)
        mx.eval(want)
        for (name, a), (_, b) in zip(tree_flatten(got), tree_flatten(want), strict=True):
            assert a.shape == b.shape, name
            worst = max(worst, float(mx.abs(a - b).max() / (mx.abs(b).max() + 1e-3)))
    return worst


def unlike(group):
    """Calls in which rank 1 differs: an error on every rank, and the next call is as good as ever."""
    rank, fresh = group.rank(), itertools.count(1)

    def arrays(B=1, H=2, D=4, dtype=mx.float32):
        q = mx.ones((B, 3 + rank, H, D), dtype)
        return {"q": q, "k": q[:, :, :1], "v": q[:, :, :1]}

    cases = [
        ("B", arrays(B=1 + rank), {}),
        ("Hq", arrays(H=2 + rank), {}),
        ("D", arrays(D=4 + rank), {}),
        ("dtype", arrays(dtype=mx.bfloat16 if rank else mx.float32), {}),
        ("variant", arrays(), {"masked": not rank}),
        ("scale", arrays(), {"scale": 1.0 + rank}),
        ("ridge", arrays(), {"ridge": 0.5 * rank}),
        ("decay", arrays(), {"decay": mx.array([0.5]) if rank else 0.5}),
        ("normalize", arrays(), {"normalize": bool(rank)}),
        ("segment_ids", arrays(), {"segment_ids": mx.zeros((1, 4), mx.int32) if rank else None}),
    ]
    for name, given, options in cases:
        options = {"eps": 1e-3 * next(fresh), **options}  # only a new kind of call is told of
        with pytest.raises(
            ValueError, match=rf"\[hla2\] in a group: the ranks differ in {name}: rank 0 has "
        ):
            mlx_hla.hla2(**given, **options, group=group)
        mx.eval(mlx_hla.hla2(**arrays(), group=group))
    x = mx.ones((1 + rank, 5, 16))
    for made in (HLAttention(16, 4), WindowAttention(16, 4, window=3)):
        with pytest.raises(ValueError, match="in a group: the ranks differ in B: rank 0 has 1, rank 1 has 2"):
            made(x, group=group)
    with pytest.raises(ValueError, match="the ranks differ in the layer"):
        HLAttention(16, 4, operator=("hla2", "ahla")[min(rank, 1)])(x[:1], group=group)

    config = ModelConfig(vocab_size=50, dims=16, num_layers=1, num_heads=2, hidden_dims=24)
    model, tokens = LanguageModel(config, seed=1), list(range(40))
    for name, (m, ids, chunk) in {
        "the model": (LanguageModel(config, seed=1 + rank), tokens, 8),
        "the prompt": (model, tokens[: 40 - rank], 8),
        "chunk": (model, tokens, 8 + rank),
    }.items():
        with pytest.raises(InputError, match=f"reading a prompt: the ranks differ in {name}: "):
            read(m, ids, chunk=chunk, group=group)
    assert read(model, tokens, chunk=8, group=group).length == 40


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
    if not sys.argv[1:]:
        # Four processes on two cores wait for each other: there a part of them has to do.
        cases = LAYER_CASES if group.size() < 4 else LAYER_CASES[-1:]
        for name, case in itertools.product(LAYERS, cases):
            error, where = run_layer(name, case, lengths, group)
            print(f"rank {group.rank()} {name} {case}: {error:.1e} {where}", flush=True)
            assert error < 2e-5, (name, case, error, where)  # gains of norms: sums that nearly cancel
        error, _ = run_model(lengths, group)
        print(f"rank {group.rank()} model: {error:.1e}", flush=True)
        assert error < 1e-4, error
    if group.size() == 2 and not sys.argv[1:]:
        error = run_compiled(group)
        print(f"rank {group.rank()} compiled: {error:.1e}", flush=True)
        assert error < 1e-5, error
        unlike(group)
    if group.size() > 1:
        q = mx.ones((1, 2, 1, 4))
        with pytest.raises(
            ValueError, match=r"\[hla3\] group must be None: this variant reads states before"
        ):
            mlx_hla.hla3(q, q, q, convention="paper", group=group)
        with pytest.raises(ValueError, match=r"\[SoftmaxAttention\] group must be None: it looks at every"):
            SoftmaxAttention(16, 4)(mx.ones((1, 2, 16)), group=group)
    print(f"rank {group.rank()} done", flush=True)


if __name__ == "__main__":
    main()
