"""Hand-built layers do two hops, at once and token by token; and what stands in the way of the others."""

import itertools
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_hla.nn import HLAttention

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "study"))
import handbuilt

ALL = list(itertools.product(handbuilt.TASKS, handbuilt.OPERATORS))
SMALL = 6
build = lru_cache(handbuilt.build)


@pytest.mark.parametrize("pairs", [1, 3, 8, 16])
@pytest.mark.parametrize(("task", "operator"), ALL)
def test_every_answer_is_right(task, operator, pairs):
    built = build(task, operator)
    wrong_order = built.layer.num_heads > 1
    tokens = handbuilt.sequences(task, pairs, 200 // pairs if wrong_order else 200, seed=pairs)
    assert tokens.shape[1] == 4 * pairs + 1
    accuracy, margin = handbuilt.score(built, tokens, handbuilt.brute_force(tokens))
    assert accuracy == 1.0
    assert margin > 0.99


@pytest.mark.parametrize(("task", "operator"), ALL)
def test_token_by_token_gives_the_same(task, operator):
    built = build(task, operator, SMALL)
    tokens = handbuilt.sequences(task, SMALL, 200, symbols=SMALL, seed=3)
    once, stepped = (handbuilt.logits(built, tokens, stream=stream) for stream in (False, True))
    assert np.array_equal(stepped.argmax(-1), handbuilt.brute_force(tokens, SMALL))
    assert np.allclose(stepped, once, atol=1e-5)


@pytest.mark.parametrize(("task", "operator"), ALL)
def test_the_right_order_takes_one_head_and_the_wrong_one_a_head_per_name_and_value(task, operator):
    layer = build(task, operator, SMALL).layer
    wrong = (task == "alias") == (operator == "hla2") and operator != "hla3"
    assert layer.num_heads == (SMALL**2 if wrong else 1)


@pytest.mark.parametrize(("task", "operator"), [("alias", "ahla"), ("join", "hla2")])
def test_32_symbols_fit_a_head_of_64(task, operator):
    built = build(task, operator, 32)
    assert built.layer.head_dim == 64
    assert built.layer.dims <= 128
    tokens = handbuilt.sequences(task, 32, 50, symbols=32)
    assert handbuilt.score(built, tokens, handbuilt.brute_force(tokens, 32))[0] == 1.0


def test_brute_force_on_sequences_spelt_out():
    contents, links = [(0, 8), (1, 9)], [(4, 1), (5, 0)]
    alias = handbuilt.spell("alias", contents, links, 4)
    assert alias == [0, 8, 1, 9, 4, 1, 5, 0, 4]
    back = handbuilt.spell("reversed", contents, links, 5)
    assert back == [4, 1, 5, 0, 0, 8, 1, 9, 5]
    join = handbuilt.spell("join", contents, links, 4)
    assert join == [1, 4, 0, 5, 0, 8, 1, 9, 4]
    assert handbuilt.brute_force(np.array([alias, back, join]), 4).tolist() == [9, 8, 9]


def test_the_two_builders_name_their_tasks():
    for built, task in (
        (handbuilt.build_alias("hla2", symbols=4), "alias"),
        (handbuilt.build_alias("hla2", values_first=False, symbols=4), "reversed"),
        (handbuilt.build_join("hla2", symbols=4), "join"),
    ):
        tokens = handbuilt.sequences(task, 4, 50, symbols=4)
        assert handbuilt.score(built, tokens, handbuilt.brute_force(tokens, 4))[0] == 1.0


def random_layer(operator, symbols, heads, seed, **options):
    mx.random.seed(seed)
    layer = HLAttention(
        3 * symbols, heads, head_dim=16, operator=operator, output_norm=False, **({"decay": None} | options)
    )
    return handbuilt.Built(mx.eye(3 * symbols), layer, mx.random.normal((3 * symbols, 3 * symbols)))


def rectangle(task, symbols):
    """Two halves, each in two ways, and the answers: (A, B), (A', B'), (A', B), (A, B')."""
    y, v = symbols, 2 * symbols
    rest, also = [(2, v + 2), (3, v + 3)], [(y + 2, 2), (y + 3, 3)]
    A = [[(0, v), (1, v + 1), *rest], [(0, v + 1), (1, v), *rest]]
    B = [[(y, 0), (y + 1, 1), *also], [(y, 1), (y + 1, 0), *also]]
    tokens = [handbuilt.spell(task, A[i], B[j], y) for i, j in ((0, 0), (1, 1), (1, 0), (0, 1))]
    return np.array(tokens)


def mixed(built, tokens):
    """L(A,B) + L(A',B') − L(A',B) − L(A,B'), as a part of the largest logit."""
    a, b, c, d = handbuilt.logits(built, tokens).astype(np.float64)
    return np.abs(a + b - c - d).max() / max(np.abs(x).max() for x in (a, b, c, d))


@pytest.mark.parametrize("task", handbuilt.TASKS)
@pytest.mark.parametrize(
    "options", [{}, {"decay": "fixed", "output_gate": True}], ids=["plain", "decay-gate"]
)
def test_first_order_adds_up_the_halves_but_the_answers_do_not(task, options):
    tokens = rectangle(task, SMALL)
    p, r = 2 * SMALL, 2 * SMALL + 1
    assert handbuilt.brute_force(tokens, SMALL).tolist() == [p, p, r, r]
    for seed in range(5):
        assert mixed(random_layer("first", SMALL, 8, seed, **options), tokens) < 1e-5
    for operator in handbuilt.OPERATORS:
        assert mixed(random_layer(operator, SMALL, 8, 0, **options), tokens) > 1e-4
        assert mixed(build(task, operator, SMALL), tokens) > 0.5


def test_an_output_norm_makes_two_hops_of_first_order():
    """Head (x, v) counts s = [q names x] + [x has v] beside a 1; its norm takes both to (s, 1) / √(s² + 1).

    (λs + 1) / √(s² + 1) with λ = √2 − 1 is 1 at s = 0 and s = 1 and less at 2, where both are true.
    """
    keys, names, values = (list(kind) for kind in handbuilt.kinds(SMALL))
    dims, pairs = 3 * SMALL, [(x, u) for x in keys for u in values]
    q = [[*((y, handbuilt.HERE) for y in names), (list(range(dims)), handbuilt.HERE)]] * len(pairs)
    k = [[*((y, handbuilt.BEFORE) for y in names), (x, handbuilt.BEFORE)] for x, _ in pairs]
    v = [[([x, u], handbuilt.HERE), (names, handbuilt.BEFORE)] for x, u in pairs]
    out = -np.eye(dims)[:, [u for _, u in pairs for _ in "sr"]] * np.tile([2**0.5 - 1, 1], len(pairs))
    built = handbuilt.wire("first", q, k, v, out)
    readout = np.eye(dims)
    readout[: values[0], values] = 1  # no token but a value is an answer: their logits are lower than any
    built = built._replace(readout=mx.array(readout.astype(np.float32)))
    for n in (1, 3, SMALL):
        tokens = handbuilt.sequences("alias", n, 300, symbols=SMALL, seed=n)
        accuracy, margin = handbuilt.score(built, tokens, handbuilt.brute_force(tokens, SMALL))
        assert accuracy == 1.0
        assert margin > 1e-3
    assert mixed(built, rectangle("alias", SMALL)) > 1e-3


N, CONV = 12, handbuilt.CONV  # the pairs with a free value, and as many fixed ones between them
MANY = 2 * N + 1  # one more: the last two are fixed


def columns(built, task, i):
    """M_ki of the proof in `handbuilt` for all names k (rows) and N permutations π (columns)."""
    n, symbols = N, MANY
    y, v = symbols, 2 * symbols
    tokens = []
    for k, shift, flip, sign in itertools.product(range(n), range(n), (1, -1), (1, -1)):
        bits = sign * np.where(np.arange(n) == i, flip, 1)
        free = [(2 * j, v + int(b < 0)) for j, b in enumerate(bits)]
        contents = [c for j, pair in enumerate(free) for c in (pair, (2 * j + 1, v + 2))]
        contents.append((2 * n, v + 2))
        links = [(y + m, 2 * ((m + shift) % n)) for m in range(n)]
        links += [(y + n, 1), (y + n + 1, 3)]
        tokens.append(handbuilt.spell(task, contents, links, y + k))
    out = handbuilt.logits(built, np.array(tokens)).astype(np.float64)
    L = (out[:, v] - out[:, v + 1]).reshape(n, n, 2, 2)
    odd = (L[..., 0] - L[..., 1]) / 2  # Σ_i M_ki b_i, for b_i = 1 and −1
    return (odd[..., 0] - odd[..., 1]) / 2


def rank(matrix, tol=1e-4):
    s = np.linalg.svd(matrix, compute_uv=False)
    return int((s > tol * s[0]).sum())


@pytest.mark.parametrize("options", [{}, {"decay": "fixed"}], ids=["plain", "decay"])
@pytest.mark.parametrize(("task", "operator"), sorted(handbuilt.WRONG_ORDER))
def test_one_head_in_the_wrong_order_has_too_few_dimensions(task, operator, options):
    assert 2 * CONV + 1 < N
    got = [rank(columns(random_layer(operator, MANY, 1, seed, **options), task, 5)) for seed in range(2)]
    assert max(got) <= 2 * CONV + 1, got


def test_the_rank_is_that_of_the_heads():
    for heads, want in (1, 2 * CONV + 1), (2, N):
        assert rank(columns(random_layer("hla2", MANY, heads, 0), "alias", 5)) == want
    assert rank(columns(random_layer("ahla", MANY, 1, 0), "alias", 5)) == N
    assert rank(columns(random_layer("first", MANY, 1, 0), "alias", 5)) == 1


@pytest.mark.parametrize(("task", "operator"), [("alias", "ahla"), ("reversed", "hla2"), ("join", "hla2")])
def test_one_head_in_the_right_order_has_all_dimensions(task, operator):
    M = columns(build(task, operator, MANY), task, 5)
    assert rank(M) == N
    want = [[(k + shift) % N == 5 for shift in range(N)] for k in range(N)]
    assert np.allclose(M, M.max() * np.array(want), atol=1e-5)


@pytest.mark.parametrize("operator", ["first", "softmax"])
def test_other_operators_are_refused(operator):
    with pytest.raises(ValueError, match="operator must be one of ahla, hla2, hla3"):
        handbuilt.build_alias(operator)


def test_main_prints_its_table():
    command = [sys.executable, handbuilt.__file__]
    small = [*command, "--symbols", "4", "--pairs", "3", "--sequences", "20"]
    result = subprocess.run(small, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()[1:]]
    assert [tuple(row[:2]) for row in rows] == ALL
    assert all(row[5:] == ["1.000", "1.000"] for row in rows)
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, timeout=60).stdout
    assert "default:" in shown
