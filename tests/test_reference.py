"""The ground truth: sums written out, dense against serial, printed algorithms, options, gradients."""

import itertools

import numpy as np
import pytest
from reference_cases import (
    DECAYS,
    OPERATORS,
    assert_close,
    attenuation,
    dense,
    each_operator,
    gates,
    inputs,
    leaves,
    rebuild,
    serial,
    vjp,
)

from mlx_hla import reference as R
from mlx_hla.reference import paper, paper_third


@each_operator
@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "ratio"])
@pytest.mark.parametrize("decay", DECAYS)
def test_serial_equals_dense(op, decay, normalize):
    q, k, v = inputs(positive=normalize)
    options = {"decay": DECAYS[decay], "normalize": normalize, "eps": 0.1, "scale": 0.7}
    o, _ = serial(op, q, k, v, **options)
    # Algorithm 3 subtracts numbers that grow from one another.
    assert_close(op, o, dense(op, q, k, v, **options), 1e-9 if op == "hla3-paper" else 1e-12)


SUMS = {
    # indices of the summed tokens, the condition on them, and the product of affinities
    "hla2": (2, lambda t, i, j: i <= j, lambda A, t, i, j: A[t, i] * A[j, i]),
    "hla2-free": (2, lambda t, i, j: True, lambda A, t, i, j: A[t, i] * A[j, i]),
    "hla3": (3, lambda t, i, u, j: i <= u and j <= u, lambda A, t, i, u, j: A[t, i] * A[u, i] * A[u, j]),
    "order4": (
        4,
        lambda t, i, u, j, w: i <= u and j <= w <= u,
        lambda A, t, i, u, j, w: A[t, i] * A[u, i] * A[u, j] * A[w, j],
    ),
}


@pytest.mark.parametrize("name", SUMS)
def test_dense_equals_the_sum_written_out(name):
    """Every summed token is attenuated up to t: the definition of decay in all symmetric orders."""
    q, k, v = inputs(B=1, T=5, Hq=1, Hkv=1)
    g = np.array([0.9, 0.5, 0.7, 0.0, 0.8])
    A, values = q[0, :, 0] @ k[0, :, 0].T, v[0, :, 0]
    count, allowed, product = SUMS[name]
    want = np.zeros(values.shape)
    for t in range(5):
        for tokens in itertools.product(range(t + 1), repeat=count):
            if allowed(t, *tokens):
                weight = np.prod([attenuation(g, s, t) for s in tokens])
                want[t] += weight * product(A, t, *tokens) * values[tokens[-1]]
    op, extra = (
        ("hla2", {"masked": False}) if name == "hla2-free" else (OPERATORS[name][0], OPERATORS[name][1])
    )
    got = getattr(R, f"dense_{op}")(q, k, v, decay=g[None, :, None], **extra)
    assert_close(name, got[0, :, 0], want)


def test_ahla_equals_the_sum_written_out():
    """Eq. 6.1 with Alg. 2's decay: from j to t by way of i, attenuated once."""
    q, k, v = inputs(B=1, T=6, Hq=1, Hkv=1)
    g = np.array([0.9, 0.5, 0.7, 0.0, 0.8, 0.6])
    A, values = q[0, :, 0] @ k[0, :, 0].T, v[0, :, 0]
    want = np.zeros(values.shape)
    for t, i, j in itertools.product(range(6), repeat=3):
        if j <= i <= t:
            want[t] += attenuation(g, j, t) * A[t, i] * A[i, j] * values[j]
    assert_close("ahla", R.dense_ahla(q, k, v, decay=g[None, :, None])[0, :, 0], want)


def test_no_decay_is_powers_of_the_affinity():
    q, k, v = inputs(Hq=2)
    q1, k1, v1 = (x.swapaxes(1, 2) for x in (q, k, v))
    A = np.tril(q1 @ k1.swapaxes(-1, -2))
    pair = np.tril(A @ A.swapaxes(-1, -2))
    expected = {
        "first": A,
        "hla2": pair,
        "ahla": A @ A,
        "hla3": pair @ A,
        "order4": pair @ pair,
        "order5": pair @ pair @ A,
    }
    for op, matrix in expected.items():
        assert_close(op, dense(op, q, k, v), (matrix @ v1).swapaxes(1, 2))


@each_operator
@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "ratio"])
def test_a_carried_state_continues_the_run(op, normalize):
    q, k, v = inputs(positive=normalize)
    g, cut = gates(zeros=False), 7
    options = {"normalize": normalize, "eps": 0.1}
    o, state = serial(op, q, k, v, decay=g, **options)
    first, carry = serial(op, *(x[:, :cut] for x in (q, k, v)), decay=g[:, :cut], **options)
    rest, final = serial(
        op, *(x[:, cut:] for x in (q, k, v)), decay=g[:, cut:], initial_state=carry, **options
    )
    tol = 1e-9 if op == "hla3-paper" else 1e-12
    assert_close(op, np.concatenate([first, rest], 1), o, tol)
    for name, got, want in zip(itertools.count(), leaves(final), leaves(state), strict=False):
        assert_close(f"{op} state {name}", got, want, tol)


@each_operator
def test_grouped_heads_are_repeated_key_value_heads(op):
    q, k, v = inputs()
    g = gates()
    o, _ = serial(op, q, k, v, decay=g)
    want, _ = serial(op, q, *(np.repeat(x, 2, axis=2) for x in (k, v)), decay=np.repeat(g, 2, axis=2))
    assert_close(op, o, want)


@each_operator
def test_scale_multiplies_the_queries(op):
    q, k, v = inputs()
    o, state = serial(op, q, k, v, scale=0.6, decay=0.9)
    want, same = serial(op, 0.6 * q, k, v, decay=0.9)
    assert_close(op, o, want)
    for got, expected in zip(leaves(state), leaves(same), strict=True):
        assert_close(op, got, expected)


@each_operator
@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "ratio"])
def test_masked_tokens_are_as_if_absent(op, normalize):
    q, k, v = inputs(B=1, positive=normalize)
    g = gates(B=1)
    real = np.random.default_rng(5).random((1, 19)) < 0.6
    options = {"normalize": normalize, "eps": 0.0 if normalize else 1e-6}
    want, state = serial(op, *(x[:, real[0]] for x in (q, k, v)), decay=g[:, real[0]], **options)
    for x in (q, k, v, g):
        x[:, ~real[0]] = np.nan  # nothing of a masked token may be read
    o, same = serial(op, q, k, v, decay=g, mask=real, **options)
    assert_close(op, o[:, real[0]], want)
    assert not o[:, ~real[0]].any()
    assert_close(op, o, dense(op, q, k, v, decay=g, mask=real, **options), 1e-9)
    for got, expected in zip(leaves(same), leaves(state), strict=True):
        assert_close(op, got, expected)


@each_operator
def test_segments_are_separate_runs(op):
    q, k, v = inputs(B=1)
    g = gates(B=1, zeros=False)
    ids = np.array([[4] * 6 + [2] * 8 + [4] * 5])
    o, state = serial(op, q, k, v, decay=g, segment_ids=ids)
    spans = [slice(0, 6), slice(6, 14), slice(14, 19)]
    runs = [serial(op, *(x[:, s] for x in (q, k, v)), decay=g[:, s]) for s in spans]
    assert_close(op, o, np.concatenate([run[0] for run in runs], 1))
    assert_close(op, o, dense(op, q, k, v, decay=g, segment_ids=ids), 1e-9)
    for got, want in zip(leaves(state), leaves(runs[-1][1]), strict=True):
        assert_close(op, got, want)


def test_segment_borders_look_past_masked_tokens():
    real = np.array([[False, True, True, False, True, True, True]])
    ids = np.array([[9, 1, 1, 5, 1, 2, 2]])
    got = R.prepare.reset_points(real, ids)
    assert got.tolist() == [[False, False, False, False, False, True, False]]


def test_the_first_token_continues_the_initial_state():
    q, k, v = inputs(T=4)
    _, carry = serial("hla2", q, k, v)
    o, _ = serial("hla2", q, k, v, initial_state=carry, segment_ids=np.full((2, 4), 3))
    assert_close("hla2", o, serial("hla2", q, k, v, initial_state=carry)[0])


def test_a_constant_value_survives_normalisation():
    q, k, v = inputs(positive=True)
    o, _ = serial("hla2", q, k, np.ones_like(v), normalize=True, eps=0.0)
    assert_close("hla2", o, np.ones(o.shape))


def lay(x):
    return x[None, :, None]


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "ratio"])
def test_algorithms_as_printed(normalize):
    """Algs. 1 and 2 are the operators (Alg. 1 at γ = 1), Algs. 3 and 4 are convention='paper'."""
    q, k, v = (x[0, :, 0] for x in inputs(T=13, positive=normalize))
    options = {"normalize": normalize, "eps": 0.1}

    def check(name, got, op, tol=1e-12, **extra):
        assert_close(name, got, dense(op, lay(q), lay(k), lay(v), **options, **extra)[0, :, 0], tol)

    check("Algorithm 1", paper.algorithm_1(q, k, v, **options), "hla2", 1e-10)
    check("§3.1", paper.serial_section_4_3(q, k, v, **options), "hla2", 1e-10)
    for gamma in (1.0, 0.8):
        check("Algorithm 2", paper.algorithm_2(q, k, v, gamma=gamma, **options), "ahla", decay=gamma)
        check(
            "Algorithm 3",
            paper_third.algorithm_3(q, k, v, gamma=gamma, **options),
            "hla3-paper",
            1e-9,
            decay=gamma,
        )
    check("repaired", paper_third.algorithm_3(q, k, v, repaired=True, **options), "hla3", 1e-9)
    for chunk in (1, 4, 13, 20):
        check("Algorithm 4", paper_third.algorithm_4(q, k, v, chunk=chunk, **options), "hla3-paper", 1e-9)
    check("Eq. 7.5", paper_third.serial_equation_7_5(q, k, v, **options), "hla3-paper", 1e-9)


def test_ridge_is_algorithm_1s_without_decay():
    q, k, v = (x[0, :, 0] for x in inputs())
    got = R.dense_hla2(lay(q), lay(k), lay(v), ridge=0.4)[0, :, 0]
    assert_close("ridge", got, paper.algorithm_1(q, k, v, ridge=0.4))


@each_operator
@pytest.mark.parametrize("case", ["heads-packed", "gates-ratio"])
def test_gradients_against_finite_differences(op, case):
    q, k, v = inputs(B=1, T=5, Hq=2, Hkv=1, D=2, V=2, positive=True)
    options = {"scale": 0.8}
    if case == "heads-packed":
        decay = np.array([0.8])
        options["mask"] = np.array([[1, 0, 1, 1, 1]]) > 0
        options["segment_ids"] = np.array([[3, 8, 3, 5, 5]])
    else:
        decay = np.array([0.9, 0.6, 0.0, 0.8, 0.7])[None, :, None]
        options |= {"normalize": True, "eps": 5.0}
    rng = np.random.default_rng(3)
    o, shape = serial(op, q, k, v, decay=decay, **options)
    start = rebuild(shape, [rng.uniform(0.3, 1.0, x.shape) for x in leaves(shape)])
    do, dstate = rng.normal(size=o.shape), rebuild(shape, [rng.normal(size=x.shape) for x in leaves(shape)])
    got = vjp(op, q, k, v, decay, start, do, dstate, **options)

    def loss(q=q, k=k, v=v, decay=decay, start=start):
        o, state = serial(op, q, k, v, decay=decay, initial_state=start, **options)
        return (o * do).sum() + sum((a * b).sum() for a, b in zip(leaves(state), leaves(dstate), strict=True))

    for name, x in {"q": q, "k": k, "v": v, "decay": decay}.items():
        want = R.numerical_gradient(lambda y, name=name: loss(**{name: y}), x, 1e-5)
        assert_close(f"{op} d{name}", got[name], want, 1e-6)
    given = list(leaves(start))
    for i, (x, d) in enumerate(zip(given, leaves(got["initial_state"]), strict=True)):
        want = R.numerical_gradient(
            lambda y, i=i: loss(start=rebuild(start, [*given[:i], y, *given[i + 1 :]])), x, 1e-5
        )
        assert np.abs(d - want).max() <= 1e-6 * max(1.0, np.abs(want).max()), f"{op} dstate {i}"


def test_gradients_across_checkpoints():
    """A run longer than the backward's checkpoint distance, with zero and tiny decays, in one direction."""
    q, k, v = inputs(B=1, T=150, Hq=2, Hkv=1)
    q, k = q / 3, k / 3
    g = gates(B=1, T=150, Hkv=1)
    rng = np.random.default_rng(7)
    step = {"q": q, "k": k, "v": v, "decay": g}
    step = {name: rng.normal(size=x.shape) for name, x in step.items()}
    do = rng.normal(size=(1, 150, 2, 3))
    got = vjp("hla3", q, k, v, g, None, do)
    want = sum((got[name] * d).sum() for name, d in step.items())

    def along(h):
        moved = [x + h * step[name] for name, x in (("q", q), ("k", k), ("v", v), ("decay", g))]
        return (serial("hla3", *moved[:3], decay=moved[3])[0] * do).sum()

    slope = (8 * (along(1e-4) - along(-1e-4)) - (along(2e-4) - along(-2e-4))) / 12e-4
    assert_close("slope", slope, want, 1e-7)


def test_a_reset_and_a_masked_token_take_no_gradient():
    q, k, v = inputs(B=1)
    ids, real = np.array([[0] * 9 + [1] * 10]), np.arange(19)[None] != 4
    got = vjp("hla2", q, k, v, gates(B=1), None, np.ones((1, 19, 4, 3)), mask=real, segment_ids=ids)
    assert not got["decay"][0, [4, 9]].any()
    assert not any(got[name][0, 4].any() for name in "qkv")
    assert got["decay"][0, 10].any()


def test_bad_input_is_named():
    q, k, v = inputs()
    with pytest.raises(ValueError, match="must be \\[B, T, H, D\\]"):
        R.serial_hla2(q[0], k, v)
    with pytest.raises(ValueError, match="do not fit"):
        R.dense_hla2(q, k[..., :3], v)
    with pytest.raises(ValueError, match="convention"):
        R.serial_hla3(q, k, v, convention="other")
    with pytest.raises(ValueError, match="order"):
        R.serial_hla(q, k, v, order=0)
    _, carry = R.serial_hla2(q, k, v)
    with pytest.raises(ValueError, match="'eta'"):
        R.serial_hla2(q, k, v, normalize=True, initial_state=carry)
    with pytest.raises(ValueError, match="'F' must be"):
        R.serial_hla2(q, k, v[..., :2], initial_state=carry)
