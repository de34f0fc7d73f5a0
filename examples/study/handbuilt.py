"""What one layer can represent: two-hop lookups solved by weights that are written down, not trained.

    python examples/study/handbuilt.py             accuracy and margin of every layer that is built here

Keys x, names y and values v are disjoint sets of tokens. Two halves of n pairs in random order, then a name:

    alias      x v ... x v   y x ... y x   y → v      values first, then the names of their keys
    reversed   y x ... y x   x v ... x v   y → v      the names first
    join       x y ... x y   x v ... x v   y → v      the names first, each behind its key

The layer is `HLAttention` as it comes (convolution of width 4 with SiLU, norms of q, k and output), without
decay. Tokens are one-hot, so a channel says "token c is here" (tap 0) or "was one before" (tap 1), SiLU keeps
zeros and signs, and every product below is 0 or positive. u is a value, w_u its row of the read-out.

Why the order matters. A head adds up chains: query t, window i, window j, answer u (a window is what the
convolution sees at a token):

    AHLA   (q_t·k_i) (q_i·k_j) (v_j·w_u)   j ≤ i      the bridge i is read after the value j
    HLA2   (q_t·k_i) (k_i·q_j) (v_j·w_u)   i ≤ j      the bridge i is read before the value j

Both are right with i = the link, which knows y and x, and j = "x v". So one head is enough, for any number of
pairs, for AHLA on alias and for HLA2 on reversed and join. HLA3, (q_t·k_i) (k_i·q_l) (q_l·k_j) (v_j·w_u) with
i, j ≤ l, may take l = i or l = j: it holds both chains, and one head does any of the three tasks.

In the wrong order i must be "x v" and j the link, and the value goes through scalars, q_t·k_i and k_i·q_j:
v_j knows y and x but not v. One head per (y, v), with q_t·k_i = [q = y][v_i = v] and v_j = [y_j = y], still
does it: symbols² heads, built here. How many are needed?

First order, a sum (q_t·k_j) (v_j·w_u) over single windows, cannot. Take half A as it is or with two contents
swapped (A'), and half B likewise: four sequences in which no window sees the swapped tokens of both halves.
Then L = a(A) + b(B), so L(A,B) + L(A',B') = L(A',B) + L(A,B'). But the answers are p, p and r, r: L_p − L_r
would have to be positive on the left and negative on the right. This holds for any number of heads, norms of
q and k, fixed decay, output gate. An output norm over several heads is a nonlinearity, and lets symbols²
heads of first order do alias (the tests build them).

The wrong order needs heads in proportion to the pairs. Let H heads of any D and Dv (norms of q and k, fixed
decay; no output gate, and no output norm unless H = 1) and a convolution of width C solve alias by HLA2, or
reversed or join by AHLA. Let b_i = ±1 say which of the values p, r key i has, i = 1..n, with fixed pairs
between so that a window sees at most one b_i, and let name k be that of key π(k), with fixed pairs after both
halves so that the query's window sees neither b nor π. For query k, L_p − L_r is

    a_k(b) + c_k(π) + Σ_{h,i,w} F_h(k, w, b_i) E_h(π, w, b_i)

where w runs over the C windows that see b_i: F = q_t·k_w cannot know π, and the rest of the chain, E, cannot
know k. Its odd part in b, Σ_i M_ki b_i, must have its sign, that of b_π(k), for all b: for every k and π

    |M_k,π(k)| > Σ_{i≠π(k)} |M_ki|

But whatever π is, column i of M lies in one space W_i, that of the linear part of a_k and the F_h(·, w, ±1):
dim W_i ≤ 2CH + 1. Were that below n, take z_i ≠ 0 orthogonal to W_i, and a smallest set I of columns such
that the z_i, i ∈ I, live on a set K of no more rows. By Hall's theorem I matches K inside their support; for
the matching σ with the largest product of |z_i,σ(i)|, duality gives λ, μ > 0 with |z_ik| ≤ λ_k μ_i, equal at
k = σ(i). Choose π with π(σ(i)) = i. Σ_k z_ik M_ki = 0 says λ_σ(i) |M_σ(i),i| ≤ Σ_{k∈K, k≠σ(i)} λ_k |M_ki|,
and the sum over I contradicts the rows' dominance. So H ≥ (n − 1) / 2C, however wide the heads, where the
right order takes one. With C = 4 every second pair is a fixed one and the last two are: 2n + 1 pairs, and one
head fails from 21 pairs on. What lies between this bound and symbols² heads is not settled here.
"""

import argparse
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_hla.nn import HLAttention

TASKS = ("alias", "reversed", "join")
OPERATORS = ("ahla", "hla2", "hla3")
SYMBOLS = 16  # of each kind: keys, names, values, in this order
CONV = 4
HERE, BEFORE, BOTH = (0,), (1,), (0, 1)


class Taps(NamedTuple):
    """Where q and k look for names and keys: at the token itself, at the one before, or at both."""

    q_name: tuple[int, ...]
    k_name: tuple[int, ...]
    q_key: tuple[int, ...]
    k_key: tuple[int, ...]


# Where they look for both, HLA3 does: its l = i needs q_i·k_i > 0, its l = j needs q_j·k_j > 0.
TAPS = {
    "alias": Taps(q_name=BOTH, k_name=BEFORE, q_key=HERE, k_key=BEFORE),
    "reversed": Taps(q_name=HERE, k_name=BEFORE, q_key=BEFORE, k_key=BOTH),
    "join": Taps(q_name=HERE, k_name=HERE, q_key=BEFORE, k_key=BEFORE),
}
WRONG_ORDER = {("alias", "hla2"), ("reversed", "ahla"), ("join", "ahla")}


class Built(NamedTuple):
    """logits = layer(embedding[tokens]) @ readoutᵀ, answer = argmax of the last token's."""

    embedding: mx.array  # [vocabulary, dims]
    layer: HLAttention
    readout: mx.array  # [vocabulary, dims]


def build_alias(operator: str, *, values_first: bool = True, symbols: int = SYMBOLS) -> Built:
    """Weights for alias, or for reversed where the names come first."""
    return build("alias" if values_first else "reversed", operator, symbols)


def build_join(operator: str, *, symbols: int = SYMBOLS) -> Built:
    return build("join", operator, symbols)


def build(task: str, operator: str, symbols: int = SYMBOLS) -> Built:
    if operator not in OPERATORS:
        raise ValueError(f"[build] operator must be one of {', '.join(OPERATORS)}, got {operator!r}")
    keys, names, values = kinds(symbols)
    taps, here = TAPS[task], [(u, HERE) for u in values]
    q, k = [(x, taps.q_key) for x in keys], [(x, taps.k_key) for x in keys]
    if (task, operator) not in WRONG_ORDER:
        q, k = [(y, taps.q_name) for y in names] + q, [(y, taps.k_name) for y in names] + k
        return wire(operator, [q], [k], [here], np.eye(3 * symbols)[:, values])
    pairs = [(y, u) for y in names for u in values]
    heads = [[(y, HERE), *q] for y, _ in pairs], [[(u, HERE), *k] for _, u in pairs]
    marks = [[(y, taps.k_name)] for y, _ in pairs]
    return wire(operator, *heads, marks, np.eye(3 * symbols)[:, [u for _, u in pairs]])


def kinds(symbols: int) -> list[range]:
    """The tokens that are keys, names and values."""
    return [range(i * symbols, (i + 1) * symbols) for i in range(3)]


def wire(operator: str, q, k, v, out: np.ndarray) -> Built:
    """The layer with channels q, k, v, [heads][channels] of (token or tokens, taps); out [dims, channels]."""
    dims = len(out)
    sizes = {"head_dim": len(q[0]), "value_dim": len(v[0])}
    layer = HLAttention(dims, len(q), operator=operator, decay=None, conv_size=CONV, **sizes)
    channels = [c for part in (q, k, v) for head in part for c in head]
    weight, conv = np.zeros((len(channels), dims)), np.zeros((len(channels), CONV))
    for row, (tokens, taps) in enumerate(channels):
        weight[row, tokens] = 1
        conv[row, [CONV - 1 - tap for tap in taps]] = 1
    for module, w in ((layer.qkv_proj, weight), (layer.conv, conv), (layer.out_proj, out)):
        module.weight = mx.array(w.astype(np.float32))
    layer.eval()
    return Built(mx.eye(dims), layer, mx.eye(dims))


def logits(built: Built, tokens: np.ndarray, *, stream: bool = False) -> np.ndarray:
    """Of the last token, [sequences, vocabulary]; stream: one token after the other through a cache."""
    x = built.embedding[mx.array(tokens)]
    if stream:
        cache = built.layer.make_cache()
        for t in range(x.shape[1]):
            y = built.layer(x[:, t : t + 1], cache=cache)
    else:
        y = built.layer(x)
    return np.array(y[:, -1] @ built.readout.T)


def spell(task: str, contents, links, query) -> list[int]:
    """The tokens of one sequence from (key, value) and (name, key) pairs."""
    values = [token for pair in contents for token in pair]
    linked = [token for y, x in links for token in ((x, y) if task == "join" else (y, x))]
    return [*values, *linked, query] if task == "alias" else [*linked, *values, query]


def sequences(task: str, pairs: int, count: int, *, symbols: int = SYMBOLS, seed: int = 0) -> np.ndarray:
    """Random sequences [count, 4 pairs + 1]: keys and names differ within one, values may repeat."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        keys = rng.permutation(symbols)[:pairs]
        names = rng.permutation(symbols)[:pairs] + symbols
        values = rng.integers(symbols, size=pairs) + 2 * symbols
        contents = list(zip(keys, values, strict=True))
        links = [(names[i], keys[i]) for i in rng.permutation(pairs)]
        rows.append(spell(task, contents, links, rng.choice(names)))
    return np.array(rows)


def brute_force(tokens: np.ndarray, symbols: int = SYMBOLS) -> np.ndarray:
    """The answers, by two dictionaries that are filled pair by pair."""
    answers = []
    for *body, query in tokens.tolist():
        value, key = {}, {}
        for pair in zip(body[::2], body[1::2], strict=True):
            a, b = sorted(pair)  # keys < names < values
            if b >= 2 * symbols:
                value[a] = b
            else:
                key[b] = a
        answers.append(value[key[query]])
    return np.array(answers)


def score(built: Built, tokens, answers, *, stream: bool = False, batch: int = 100) -> tuple[float, float]:
    """Accuracy, and the least of (right − best other) / |largest logit| over the sequences."""
    parts = [logits(built, tokens[i : i + batch], stream=stream) for i in range(0, len(tokens), batch)]
    got, rows = np.concatenate(parts), np.arange(len(tokens))
    right, others = got[rows, answers], got.copy()
    others[rows, answers] = -np.inf
    margin = (right - others.max(-1)) / np.abs(got).max(-1)
    return float(np.mean(margin > 0)), float(margin.min())


def main():
    parser = argparse.ArgumentParser(
        description="Hand-built layers that look up in two hops.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--pairs", type=int, default=8, help="pairs in each half")
    parser.add_argument("--symbols", type=int, default=SYMBOLS, help="keys, names and values, of each")
    parser.add_argument("--sequences", type=int, default=1000, help="random sequences per row")
    parser.add_argument("--seed", type=int, default=0, help="of the sequences")
    args = parser.parse_args()
    if not 1 <= args.pairs <= args.symbols:
        parser.error(f"--pairs must be 1 to {args.symbols} (--symbols), got {args.pairs}")
    print("task      operator  heads  key dim  value dim  accuracy  margin")
    for task in TASKS:
        tokens = sequences(task, args.pairs, args.sequences, symbols=args.symbols, seed=args.seed)
        answers = brute_force(tokens, args.symbols)
        for operator in OPERATORS:
            built = build(task, operator, args.symbols)
            layer, (accuracy, margin) = built.layer, score(built, tokens, answers)
            shape = f"{layer.num_heads:>5}  {layer.head_dim:>7}  {layer.value_dim:>9}"
            print(f"{task:<8}  {operator:<8}  {shape}  {accuracy:>8.3f}  {margin:>6.3f}")


if __name__ == "__main__":
    main()
