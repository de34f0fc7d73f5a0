"""Streaming, padding and packing: each must say what the plain sequence alone says."""

import copy
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from nn_reference import SOFTMAX, assert_close, make

from mlx_hla.nn import ShortConv
from mlx_hla.nn.cache import KVCache
from mlx_hla.ops.operator import choices

OPERATORS = [*choices(), 5, *SOFTMAX]
OPTIONS = {
    "default": {},
    "gqa-rope": {"num_kv_heads": 2, "rope": True, "output_gate": True, "bias": True},
    "fixed-noconv": {"decay": "fixed", "conv_size": None, "qk_norm": "l2"},
    "normalize-nodecay": {"decay": None, "normalize": True, "num_kv_heads": 1},
}
both = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
every = pytest.mark.parametrize("operator", OPERATORS, ids=str)


def build(operator="hla2", options=None, heads=4, dims=16, seed=5):
    mx.random.seed(seed)
    attention = make(operator, options or {}, dims, heads)
    if "decay_gate" in attention:
        attention.decay_gate.weight = 0.3 * mx.random.normal(attention.decay_gate.weight.shape)
    if "bias" in attention.out_proj:
        attention.out_proj.bias = attention.out_proj.bias + 1
    return attention


def stream(attention, x, cuts, cache=None, **arguments):
    """The layer over x in pieces that end at `cuts`; (y, cache)."""
    cache = attention.make_cache() if cache is None else cache
    edges = [0, *cuts, x.shape[1]]
    pieces = []
    for a, b in pairwise(edges):
        part = {name: array[:, a:b] for name, array in arguments.items()}
        pieces.append(attention(x[:, a:b], cache=cache, **part))
    return mx.concatenate(pieces, axis=1), cache


def tolerance(operator, options):
    """A signed denominator may come near zero, and so may readout's q̃ = q − S q / n before its norm."""
    return (1e-3 if options.get("normalize") else 1e-5) * (20 if operator == "readout" else 1)


def assert_same_cache(got, want, tol=1e-5):
    got, want = dict(tree_flatten(got.state)), dict(tree_flatten(want.state))
    assert got.keys() == want.keys()
    for name, array in want.items():
        if array is not None:
            assert_close(f"cache.{name}", got[name], array, tol)


@both
@every
def test_prefill_and_decode_equal_the_full_forward(operator, options):
    attention = build(operator, options)
    x = mx.random.normal((2, 90, 16))
    full = attention(x)
    whole = attention.make_cache()
    assert_close("with an empty cache", attention(x, cache=whole), full, 1e-6)
    # A first piece shorter than the filter, one token, long ones, then token by token.
    y, cache = stream(attention, x, [1, 3, 4, 70, *range(75, 90)])
    assert_close("y", y, full, tolerance(operator, options))
    assert_same_cache(cache, whole)


def test_the_cache_has_constant_size():
    attention = build("hla2", {"rope": True})
    cache = attention.make_cache()
    assert cache.empty()
    assert cache.nbytes == 0
    x = mx.random.normal((3, 700, 16))
    attention(x[:, :1], cache=cache)
    # S and F [3, 4, 4, 4], three inputs of q, k and v, one offset a row; float32 and int32.
    want = 4 * (2 * 3 * 4 * 4 * 4 + 3 * 3 * 48 + 3)
    assert cache.nbytes == want
    attention(x[:, 1:], cache=cache)
    assert cache.nbytes == want
    assert not cache.empty()
    assert not cache.is_trimmable()
    mx.eval(cache.state)
    before = mx.get_active_memory()
    del x
    mx.eval(cache.state)
    # What the cache holds are arrays of its own, no slices of the prompt's activations.
    assert before - mx.get_active_memory() >= 3 * 700 * 16 * 4


def test_a_saved_cache_continues(tmp_path):
    for operator in OPERATORS:
        attention = build(operator, {"rope": True})
        x = mx.random.normal((2, 20, 16))
        _, cache = stream(attention, x[:, :15], [])
        arrays = {name: a for name, a in tree_flatten(cache.state) if a is not None}
        missing = {name: None for name, a in tree_flatten(cache.state) if a is None}
        mx.save_safetensors(str(tmp_path / "cache.safetensors"), arrays)
        loaded = mx.load(str(tmp_path / "cache.safetensors"))
        state = tree_unflatten(list({**loaded, **missing}.items()))
        again = type(cache).from_state(state)
        assert again.nbytes == cache.nbytes
        assert_close("y", attention(x[:, 15:], cache=again), attention(x[:, 15:], cache=cache), 1e-6)


def test_a_copy_is_a_snapshot():
    attention = build("hla2", {"rope": True})
    x = mx.random.normal((1, 12, 16))
    _, cache = stream(attention, x[:, :8], [])
    snapshot = copy.copy(cache)
    first = attention(x[:, 8:], cache=cache)
    assert_close("y", attention(x[:, 8:], cache=snapshot), first, 0)


def test_a_copy_of_keys_and_values_is_a_snapshot():
    """The buffer has room for more: written in place, it would change under the snapshot."""
    cache = KVCache()
    some, more, other = (mx.random.normal((1, 2, n, 4)) for n in (5, 3, 3))
    cache.append(some, some)
    snapshot = copy.copy(cache)
    cache.append(more, more)
    again = copy.copy(snapshot)
    for branch, ending in ((snapshot, other), (cache, None), (again, more)):
        keys, values = branch.append(ending, ending) if ending is not None else branch.state[:2]
        want = mx.concatenate([some, more if ending is None else ending], axis=2)
        assert mx.array_equal(keys, want)
        assert mx.array_equal(values, want)
    assert mx.array_equal(cache.state[0], mx.concatenate([some, more], axis=2))


def test_one_token_is_written_into_the_buffer_and_copies_none():
    cache = KVCache()
    token = mx.zeros((1, 8, 1, 64))
    cache.append(mx.zeros((1, 8, 4000, 64)), mx.zeros((1, 8, 4000, 64)))
    mx.eval(cache.state)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for _ in range(4):
        cache.append(token, token)
        mx.eval(cache.keys, cache.values)
    assert mx.get_peak_memory() - before < cache.keys.nbytes / 2


def test_a_failed_call_leaves_the_cache_alone():
    attention = build()
    x = mx.random.normal((2, 8, 16))
    _, cache = stream(attention, x, [])
    state = cache.state
    with pytest.raises(ValueError, match="state"):
        attention(x[:1], cache=cache)
    cache.memory = cache.memory._replace(S=cache.memory.S[:1])
    with pytest.raises(ValueError, match="state"):
        attention(x, cache=cache)
    assert cache.conv is state[1]


MASKS = {
    "right": [[1, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0, 0]],
    "left": [[1, 1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0, 1]],
    "holes": [[1, 0, 1, 1, 0, 0, 1, 1, 0], [0, 1, 1, 0, 1, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0, 0]],
}
masks = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


@masks
@both
@every
def test_masked_tokens_do_not_exist(operator, options, mask):
    """A padded batch says, at its real tokens and in its cache, what each row says alone."""
    attention = build(operator, options)
    mask = np.array(mask, bool)
    real = mx.random.normal((3, 9, 16))
    x = mx.where(mx.array(mask)[..., None], real, mx.array(float("nan")))
    cache = attention.make_cache()
    y = attention(x, mask=mx.array(mask), cache=cache)
    # Then a second piece, masked as well: the carried state has to be right, and used rightly.
    later = mx.random.normal((3, 5, 16))
    later_mask = np.array([[1, 1, 0, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 0, 0]], bool)
    z = attention(later, mask=mx.array(later_mask), cache=cache)
    w = attention(later[:, :1], mask=mx.array([[True], [False], [True]]), cache=cache)
    assert np.all(np.asarray(y)[~mask] == 0)
    assert np.all(np.asarray(z)[~later_mask] == 0)
    assert np.all(np.asarray(w)[1] == 0)
    tol = tolerance(operator, options)
    for b in range(3):
        alone = attention.make_cache()
        picked = [(real, mask), (later, later_mask), (later[:, :1], np.array([[True], [False], [True]]))]
        for name, got, (source, keep) in zip("yzw", (y, z, w), picked, strict=True):
            keep = np.flatnonzero(keep[b])
            if len(keep):
                want = attention(source[b : b + 1, mx.array(keep)], cache=alone)
                assert_close(f"{name}[{b}]", np.asarray(got)[b : b + 1, keep], want, tol)
        if cache.constant:  # keys and values of everything read have room for the padding too
            assert_same_cache(type(cache).from_state(_row(cache.state, b)), alone)


def _row(state, b):
    return tree_unflatten([(k, a if a is None else a[b : b + 1]) for k, a in tree_flatten(state)])


@both
@every
def test_packed_documents_equal_each_alone(operator, options):
    attention = build(operator, options)
    lengths = [5, 1, 2, 9, 1, 70]
    ids = np.repeat([7, 3, 7, 0, 3, 7], lengths)  # an id may come back: it is another document
    x = mx.random.normal((1, sum(lengths), 16))
    cache = attention.make_cache()
    y = attention(x, segment_ids=mx.array(ids)[None], cache=cache)
    ends, tol = np.cumsum(lengths), tolerance(operator, options)
    for start, end in zip(ends - lengths, ends, strict=True):
        alone = attention.make_cache()
        assert_close(f"document at {start}", y[:, start:end], attention(x[:, start:end], cache=alone), tol)
    more = mx.random.normal((1, 3, 16))
    assert_close("what follows", attention(more, cache=cache), attention(more, cache=alone), tol)
    if cache.constant and not options.get("rope"):  # positions run on: the rotated memories cannot agree
        assert_same_cache(cache, alone)


@pytest.mark.parametrize("operator", ["hla2", *SOFTMAX])
@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_cache_after_packing_forgets_the_earlier_documents(length, operator):
    """The last document is shorter than the filter: its inputs only are carried."""
    attention = build(operator, {"decay": None, "rope": None})
    x, more = mx.random.normal((1, 8, 16)), mx.random.normal((1, 6, 16))
    ids = mx.array([[0] * (8 - length) + [1] * length])
    cache, alone = attention.make_cache(), attention.make_cache()
    attention(x, segment_ids=ids, cache=cache)
    attention(x[:, 8 - length :], cache=alone)
    if operator == "hla2":
        assert_same_cache(cache, alone)
    assert_close("next", attention(more, cache=cache), attention(more, cache=alone), 1e-5)


@pytest.mark.parametrize("operator", ["hla2", *SOFTMAX])
def test_segments_with_a_mask(operator):
    """The border lies between real tokens, wherever the padding is and whatever ids it has."""
    attention = build(operator, {"rope": True})
    x = mx.random.normal((1, 10, 16))
    mask = mx.array([[True, False, True, True, False, False, True, True, True, False]])
    ids = mx.array([[4, 9, 4, 4, 4, 5, 5, 5, 5, 8]])
    y = attention(x, mask=mask, segment_ids=ids)
    for keep in ([0, 2, 3], [6, 7, 8]):
        keep = mx.array(keep)
        assert_close("document", y[:, keep], attention(x[:, keep]), 1e-5)


@pytest.mark.parametrize("operator", ["hla2", *SOFTMAX])
def test_the_first_token_continues_the_cache(operator):
    attention = build(operator)
    x = mx.random.normal((2, 12, 16))
    want = attention(x)
    ids = mx.array([[1] * 6 + [2] * 6] * 2)
    y, _ = stream(attention, x, [6, 11], segment_ids=ids)
    assert_close("y", y, want, 1e-5)


def test_conv_state_ignores_right_padding():
    mx.random.seed(1)
    conv = ShortConv(3, 4)
    x, before = mx.random.normal((3, 5, 3)), mx.random.normal((3, 3, 3))
    _, state = conv(x, before, lengths=mx.array([5, 2, 0]))
    want = [x[0, 2:], mx.concatenate([before[1, 2:], x[1, :2]]), before[2]]
    assert_close("state", state, mx.stack(want), 0)
