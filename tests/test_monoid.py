"""Any bracketing of segments gives the serial states, a scan the serial outputs (Thms 4.1, 7.2, mended)."""

from functools import reduce

import mlx.core as mx
import numpy as np
import pytest

from mlx_hla import monoid as M
from mlx_hla import reference as R
from mlx_hla.ops.operator import find

T, D, V = 23, 4, 3
OPERATORS = {kind: getattr(R, f"serial_{find(kind).name}") for kind in M.KINDS}
DECAYS = ("none", "fixed", "gates with zeros")
each_kind = pytest.mark.parametrize("kind", M.KINDS)
each_decay = pytest.mark.parametrize("decay", DECAYS)


def sequence(decay="fixed", seed=0):
    """q, k, v of one head and a decay per token.  Positive q, k keep the denominators away from 0."""
    rng = np.random.default_rng(seed)
    q, k, v = rng.uniform(0.2, 1.0, (T, D)), rng.uniform(0.2, 1.0, (T, D)), rng.normal(size=(T, V))
    g = {"none": np.ones(T), "fixed": np.full(T, 0.9), "gates with zeros": rng.uniform(0.3, 1.0, T)}[decay]
    if "zeros" in decay:
        g[[5, 6, 17]], g[12] = 0.0, 1e-30
    return q, k, v, g


def tokens_of(kind, q, k, v, g, normalize=True):
    return [M.from_token(kind, *x, normalize=normalize) for x in zip(q, k, v, g, strict=True)]


def serial(kind, q, k, v, g, **options):
    """(o [T, V], state) of one head."""
    q, k, v, g = (x[None, :, None] for x in (q, k, v, g))
    o, state = OPERATORS[kind](q, k, v, decay=g, **options)
    return o[0, :, 0], type(state)(*(None if x is None else x[0, 0] for x in state))


def assert_close(got, want, tol=1e-12):
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) <= tol * np.linalg.norm(want)


def assert_same_segment(got, want, tol=1e-12):
    for field, a, b in zip(got._fields, got, want, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert np.linalg.norm(a - b) <= tol * max(np.linalg.norm(b), 1e-300), field


def bracket(tokens, rng):
    """The tokens combined in a random order of neighbours."""
    tokens = list(tokens)
    while len(tokens) > 1:
        i = rng.integers(len(tokens) - 1)
        tokens[i : i + 2] = [M.combine(tokens[i], tokens[i + 1])]
    return tokens[0]


@each_kind
@each_decay
def test_any_bracketing_gives_the_serial_state(kind, decay):
    x = sequence(decay)
    tokens = tokens_of(kind, *x)
    _, state = serial(kind, *x, normalize=True)
    left = reduce(M.combine, tokens)
    for seed in range(5):
        whole = bracket(tokens, np.random.default_rng(seed))
        assert_same_segment(whole, left)
        for field in set(state._fields) & set(whole._fields):
            got, want = getattr(whole, field), getattr(state, field)
            assert_close(got[:, 0] if want.ndim == 1 else got, want)


@each_kind
@each_decay
@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "ratio"])
def test_the_scan_gives_the_serial_outputs(kind, decay, normalize):
    x = sequence(decay)
    start = M.identity(kind, D, V, normalize=normalize)
    prefixes = M.associative_scan(tokens_of(kind, *x, normalize), M.combine, start)
    unmasked = [True, False] if kind in ("hla2", "hla3") else [True]
    for masked in unmasked:
        options = {} if masked else {"masked": False}
        want, _ = serial(kind, *x, normalize=normalize, eps=0.1, **options)
        got = [M.output(p, q, masked, normalize, 0.1) for p, q in zip(prefixes, x[0], strict=True)]
        assert_close(np.stack(got), want)


@each_kind
def test_chunk_summaries_carry_into_chunks(kind):
    """Two levels, as the paper runs it: carry ⊕ local exclusive prefix ⊕ token."""
    x = sequence("gates with zeros")
    tokens, start = tokens_of(kind, *x), M.identity(kind, D, V, normalize=True)
    chunks = [tokens[a : a + 5] for a in range(0, T, 5)]
    carries = M.associative_scan([reduce(M.combine, c) for c in chunks], M.combine, start, inclusive=False)
    got = []
    for carry, chunk in zip(carries, chunks, strict=True):
        local = M.associative_scan(chunk, M.combine, start, inclusive=False)
        got += [M.combine(M.combine(carry, p), t) for p, t in zip(local, chunk, strict=True)]
    for a, b in zip(got, M.associative_scan(tokens, M.combine, start), strict=True):
        assert_same_segment(a, b)


@each_kind
def test_the_identity_is_neutral(kind):
    token = tokens_of(kind, *sequence())[0]
    empty = M.identity(kind, D, V, normalize=True)
    assert_same_segment(M.combine(empty, token), token)
    assert_same_segment(M.combine(token, empty), token)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 8, 9, 64, 100])
def test_scan_of_any_length_in_order_and_linear_work(n):
    """Strings under concatenation: associative, not commutative."""
    calls = []

    def concatenate(a, b):
        calls.append((a, b))
        return a + b

    items = [f"{i}," for i in range(n)]
    exclusive = M.associative_scan(items, concatenate, "", inclusive=False)
    assert exclusive == ["".join(items[:i]) for i in range(n)]
    assert len(calls) <= 2 * n
    calls.clear()
    assert M.associative_scan(items, concatenate, "") == ["".join(items[: i + 1]) for i in range(n)]
    assert len(calls) <= 3 * n


@each_kind
def test_the_same_code_runs_on_mlx_arrays(kind):
    x = sequence("gates with zeros")
    arrays = tuple(mx.array(a.astype(np.float32)) for a in x)
    tokens = [M.from_token(kind, *(a[t] for a in arrays), normalize=True) for t in range(T)]
    start = M.identity(kind, D, V, normalize=True, zeros=mx.zeros)
    prefixes = M.associative_scan(tokens, M.combine, start)
    got = mx.stack(
        [M.output(p, q, normalize=True, eps=0.1) for p, q in zip(prefixes, arrays[0], strict=True)]
    )
    want, _ = serial(kind, *x, normalize=True, eps=0.1)
    assert_close(got, want, 1e-5)


@each_kind
def test_leading_axes_are_batched(kind):
    heads = [sequence("gates with zeros", seed) for seed in (1, 2)]
    q, k, v, g = (np.stack(x, 1) for x in zip(*heads, strict=True))  # [T, H, ..]
    tokens = [M.from_token(kind, q[t], k[t], v[t], g[t, :, None, None]) for t in range(T)]
    whole = reduce(M.combine, tokens)
    for h, head in enumerate(heads):
        want, _ = serial(kind, *head)
        assert_close(M.output(whole, q[-1])[h], want[-1])


def test_bad_input_is_named():
    q, k, v, _ = sequence()
    with pytest.raises(ValueError, match="kind must be one of first, hla2, ahla, hla3, got 'hla4'"):
        M.from_token("hla4", q[0], k[0], v[0])
    with pytest.raises(ValueError, match="kind must be"):
        M.identity("hla4", D, V)
    token = M.from_token("hla2", q[0], k[0], v[0])
    with pytest.raises(ValueError, match="HLA2Segment with AHLASegment"):
        M.combine(token, M.from_token("ahla", q[0], k[0], v[0]))
    with pytest.raises(ValueError, match="normalize=True"):
        M.output(token, q[0], normalize=True)


@each_kind
def test_the_order_in_which_64_ranks_combine_costs_no_accuracy(kind):
    """Each rank's tokens to a segment; then one rank after the other, or by a tree: as the serial state."""
    ranks, each = 64, 5
    rng = np.random.default_rng(6)
    q, k = rng.uniform(0.2, 1.0, (2, ranks * each, D))
    v, g = rng.normal(size=(ranks * each, V)), rng.uniform(0.9, 1.0, ranks * each)
    tokens = tokens_of(kind, q, k, v, g)
    segments = [reduce(M.combine, tokens[i * each : (i + 1) * each]) for i in range(ranks)]
    chain, tree = reduce(M.combine, segments), list(segments)
    while len(tree) > 1:
        tree = [M.combine(a, b) for a, b in zip(tree[::2], tree[1::2], strict=True)]
    assert_same_segment(tree[0], chain, 1e-13)
    o, _ = serial(kind, q, k, v, g)
    assert_close(M.output(chain, q[-1]).reshape(-1), o[-1], 1e-12)
    assert_close(M.output(tree[0], q[-1]).reshape(-1), o[-1], 1e-12)
