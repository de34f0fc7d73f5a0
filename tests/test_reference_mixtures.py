"""`mixed` and `readout` with coefficients of every shape: serial, dense, sums written out, gradients."""

import numpy as np
import pytest
from reference_cases import assert_close, attenuation, dense, gates, inputs, leaves, rebuild, serial, vjp

from mlx_hla import reference as R

MIXTURES = ("mixed", "readout")
each_mixture = pytest.mark.parametrize("op", MIXTURES)


def coefficients(kind, seed=0, shape=(2, 19, 4)):
    """alpha and beta of either sign: numbers, one a head, or one a token and head."""
    rng = np.random.default_rng(seed + 2)
    if kind == "number":
        return {"alpha": 0.8, "beta": -0.6}
    size = shape[-1:] if kind == "heads" else shape
    return {"alpha": rng.uniform(0.2, 1.0, size), "beta": rng.uniform(-0.5, 0.5, size)}


each_kind = pytest.mark.parametrize("kind", ["number", "heads", "tokens"])


@each_mixture
@each_kind
@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "ratio"])
def test_mixtures_with_coefficients(op, kind, normalize):
    """Serial against dense, with masks, segments and NaN in what is masked; whole against pieces."""
    q, k, v = inputs(positive=normalize)
    g, weights = gates(), coefficients(kind)
    real = np.random.default_rng(5).random((2, 19)) < 0.7
    real[:, 0] = False  # n is 0 there
    for x in (q, k, v, g, *(w for w in weights.values() if kind == "tokens")):
        x[~real] = np.nan
    ids = np.array([[4] * 6 + [2] * 8 + [4] * 5, [1] * 19])
    options = {"scale": 0.6, "normalize": normalize, "eps": 3.0}
    cut = {"mask": real, "segment_ids": ids}
    o, _ = serial(op, q, k, v, decay=g, **cut, **weights, **options)
    assert np.isfinite(o).all()
    assert not o[~real].any()
    assert_close(op, o, dense(op, q, k, v, decay=g, **cut, **weights, **options))

    o, state = serial(op, q, k, v, decay=g, mask=real, **weights, **options)
    pieces, carry = [], None
    for s in (slice(0, 1), slice(1, 8), slice(8, 19)):
        here = {name: w[:, s] if kind == "tokens" else w for name, w in weights.items()}
        part, carry = serial(
            op,
            *(x[:, s] for x in (q, k, v)),
            decay=g[:, s],
            mask=real[:, s],
            initial_state=carry,
            **here,
            **options,
        )
        pieces.append(part)
    assert_close(op, np.concatenate(pieces, 1), o)
    for got, want in zip(leaves(carry), leaves(state), strict=True):
        assert_close(op, got, want)


def test_mixtures_equal_the_sums_written_out():
    q, k, v = inputs(B=1, T=6, Hq=1, Hkv=1)
    g = np.array([0.9, 0.5, 0.7, 0.0, 0.8, 0.6])
    weights = coefficients("tokens", shape=(1, 6, 1))
    alpha, beta = (weights[name][0, :, 0] for name in ("alpha", "beta"))
    q1, k1, v1 = (x[0, :, 0] for x in (q, k, v))
    mixed, readout, scale = np.zeros(v1.shape), np.zeros(v1.shape), 0.7

    def second(t):
        return sum(attenuation(g, i, t) * np.outer(k1[i], k1[i]) for i in range(t + 1))

    for t in range(6):
        count = sum(attenuation(g, i, t) for i in range(t + 1))
        query = alpha[t] * q1[t] + beta[t] / count * second(t) @ q1[t]
        for j in range(t + 1):
            key = alpha[j] * k1[j] + beta[j] * scale * second(j) @ q1[j]
            mixed[t] += attenuation(g, j, t) * scale * (q1[t] @ key) * v1[j]
            readout[t] += attenuation(g, j, t) * scale * (query @ k1[j]) * v1[j]
    for op, want in (("mixed", mixed), ("readout", readout)):
        got = dense(op, q, k, v, scale=scale, decay=g[None, :, None], **weights)
        assert_close(op, got[0, :, 0], want)


def test_mixtures_contain_first_and_second_order():
    q, k, v = inputs()
    options = {"scale": 0.7, "decay": gates()}
    first, _ = serial("first", q, k, v, **options)
    for op in MIXTURES:
        assert_close(op, serial(op, q, k, v, beta=0.0, **options)[0], first)
    second, state = serial("hla2", q, k, v, scale=0.7)
    o, same = serial("mixed", q, k, v, scale=0.7, alpha=0.0)
    assert_close("mixed", o, second)
    assert_close("mixed F", same.F, state.F)


def test_without_decay_mixtures_are_products_of_the_affinity():
    q, k, v = inputs(Hq=2)
    q1, k1, v1 = (x.swapaxes(1, 2) for x in (q, k, v))
    weights = coefficients("tokens", shape=(2, 19, 2))
    alpha, beta = (weights[name].swapaxes(1, 2) for name in ("alpha", "beta"))
    A = 0.7 * np.tril(q1 @ k1.swapaxes(-1, -2))
    n = np.arange(1, 20)
    mixed = A * alpha[:, :, None] + np.tril(A @ A.swapaxes(-1, -2)) * beta[:, :, None]
    readout = alpha[..., None] * A + (beta / n)[..., None] * np.tril(A @ k1 @ k1.swapaxes(-1, -2))
    for op, matrix in (("mixed", mixed), ("readout", readout)):
        assert_close(op, dense(op, q, k, v, scale=0.7, **weights), (matrix @ v1).swapaxes(1, 2))


def test_readout_counts_the_real_tokens_of_the_segment():
    q, k, v = inputs(B=1, T=7)
    real = np.array([[0, 1, 1, 0, 1, 1, 0]]) > 0
    ids = np.array([[1, 1, 1, 1, 1, 2, 2]])
    for T, n in ((1, 0), (2, 1), (4, 2), (5, 3), (6, 1), (7, 1)):
        cut = {"mask": real[:, :T], "segment_ids": ids[:, :T]}
        _, state = serial("readout", *(x[:, :T] for x in (q, k, v)), **cut)
        assert (state.n == n).all()


@each_mixture
@each_kind
@pytest.mark.parametrize("decay", ["float", "heads", "gates"])
@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "ratio"])
def test_gradients_of_mixtures(op, kind, decay, normalize):
    """Of all arguments, through o and the final state, with a masked first token, NaN in it, and a border."""
    q, k, v = inputs(T=5, Hq=2, Hkv=1, D=2, V=2, positive=True)
    weights = coefficients(kind, shape=(2, 5, 2))
    rows = np.array([[0.9, 0.6, 0.0, 0.8, 0.7], [0.9, 0.5, 0.7, 1.0, 0.6]])[..., None]
    g = {"float": np.array(0.8), "heads": np.array([0.7]), "gates": rows}[decay]
    real = np.array([[0, 1, 1, 1, 1], [1, 1, 0, 1, 1]]) > 0
    ids = np.array([[3, 3, 3, 3, 3], [3, 3, 8, 5, 5]])
    options = {"scale": 0.8, "mask": real, "segment_ids": ids, "normalize": normalize, "eps": 5.0}
    rng = np.random.default_rng(3)
    o, shape = serial(op, q, k, v, decay=g, **weights, **options)
    start = rebuild(shape, [rng.uniform(0.3, 1.0, x.shape) for x in leaves(shape)])
    do, dstate = rng.normal(size=o.shape), rebuild(shape, [rng.normal(size=x.shape) for x in leaves(shape)])
    given = {"q": q, "k": k, "v": v, "decay": g, **weights}
    given |= {f"state.{i}": x for i, x in enumerate(leaves(start))}

    def loss(**changed):
        x = given | changed
        carry = rebuild(shape, [x[f"state.{i}"] for i in range(len(list(leaves(shape))))])
        names = ("decay", "alpha", "beta")
        o, state = serial(
            op, x["q"], x["k"], x["v"], initial_state=carry, **{n: x[n] for n in names}, **options
        )
        return (o * do).sum() + sum((a * b).sum() for a, b in zip(leaves(state), leaves(dstate), strict=True))

    want = {
        name: R.numerical_gradient(lambda y, name=name: loss(**{name: y}), x, 1e-5)
        for name, x in given.items()
    }
    for x in given.values():  # what a masked token holds reaches no gradient
        if np.shape(x)[:2] == real.shape and np.ndim(x) > 2 and x is not g:
            x[~real] = np.nan
    if decay == "gates":
        g = np.where(real[..., None], g, np.nan)
    given |= {"decay": g}
    got = vjp(
        op, q, k, v, g, start, np.where(real[..., None, None], do, np.nan), dstate, **weights, **options
    )
    got |= {f"state.{i}": x for i, x in enumerate(leaves(got.pop("initial_state")))}
    assert set(got) == set(want)
    for name, expected in want.items():
        assert np.shape(got[name]) == expected.shape, name
        assert np.abs(got[name] - expected).max() <= 1e-6 * max(1.0, np.abs(expected).max()), f"{op} d{name}"


@each_mixture
def test_gradients_of_what_was_not_given_are_none(op):
    q, k, v = inputs()
    got = vjp(op, q, k, v, None, None, np.ones((2, 19, 4, 3)))
    assert got["alpha"] is got["beta"] is got["decay"] is None
    assert got["initial_state"].S.shape == (2, 2, 5, 5)
    same = vjp(
        op, q, k, v, None, None, np.ones((2, 19, 4, 3)), alpha=1.0, beta=1.0 if op == "mixed" else -1.0
    )
    for name in "qkv":
        assert_close(name, got[name], same[name])


def test_bad_input_is_named():
    q, k, v = inputs()
    with pytest.raises(ValueError, match="alpha must be"):
        R.serial_mixed(q, k, v, alpha=np.ones(2))
    with pytest.raises(ValueError, match="beta must be"):
        R.vjp_readout(q, k, v, None, None, np.ones((2, 19, 4, 3)), beta=np.ones((2, 1, 4)))
    _, carry = R.serial_readout(q, k, v)
    with pytest.raises(ValueError, match="'n' must be"):
        R.serial_readout(q, k, v, initial_state=carry._replace(n=np.ones(2)))
