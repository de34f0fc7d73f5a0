"""Third-order HLA: exact masked, unmasked, and Algorithm 3 as the paper prints it.

    k̃_t = S_t q_t ,  S_t = g_t S_{t-1} + k_t k_tᵀ ,  P_t = g_t P_{t-1} + k_t v_tᵀ
    exact      F_t = g_t³ F_{t-1} + k̃_t (q_tᵀ P_t) ,   o_t = q_tᵀ F_t    =  tril(A Aᵀ) A V
    unmasked   o_t = q_tᵀ S^K_t S^Q_t P_t                                  (§7.1)
    paper      o_t = q_tᵀ (S^K_t S^Q_t P_t − G¹_t − G²_t − G³_t)           (Alg. 3; not the masked
                                                                           product, see the errata)

Names: S or SK key metric S^K, SQ query metric S^Q, P key-value moment P^KV, m its normaliser m^K,
F corrected state, η its normaliser, G1..G3 and h1..h3 the cross-summaries of Eq. 7.2 and 7.3.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import mlx.core as mx

from .backend import on_metal
from .checks import Call, canonical, canonical_step, check_state, fail
from .passes import Sequence, Token


class HLA3State(NamedTuple):
    """S `[B, Hkv, D, D]`, P `[B, Hkv, D, Dv]`, F `[B, Hq, D, Dv]`; normalising also m, eta; float32."""

    S: mx.array
    P: mx.array
    F: mx.array
    m: mx.array | None = None
    eta: mx.array | None = None


class HLA3UnmaskedState(NamedTuple):
    """SK `[B, Hkv, D, D]`, SQ `[B, Hq, D, D]`, P `[B, Hkv, D, Dv]`; normalising also m; float32."""

    SK: mx.array
    SQ: mx.array
    P: mx.array
    m: mx.array | None = None


class HLA3PaperState(NamedTuple):
    """What Alg. 3 keeps: SK, SQ, P, G1..G3 and, when normalising, m, h1..h3; float32.

    SK and P have one head per key-value head, the others one per query head.
    """

    SK: mx.array
    SQ: mx.array
    P: mx.array
    G1: mx.array
    G2: mx.array
    G3: mx.array
    m: mx.array | None = None
    h1: mx.array | None = None
    h2: mx.array | None = None
    h3: mx.array | None = None


def _check(call: Call, state, kind: type):
    if state is None:
        return None
    B, Hq, Hkv, D, V = call.dims
    norm = call.ones is not None
    shapes = {
        **dict.fromkeys(("S", "SK"), (B, Hkv, D, D)),
        "SQ": (B, Hq, D, D),
        "P": (B, Hkv, D, V),
        "m": (B, Hkv, D) if norm else None,
        **dict.fromkeys(("F", "G1", "G2", "G3"), (B, Hq, D, V)),
        **dict.fromkeys(("eta", "h1", "h2", "h3"), (B, Hq, D) if norm else None),
    }
    return check_state(call.op, state, kind, {name: shapes[name] for name in kind._fields})


def _exact(p: Sequence | Token, s: HLA3State | None):
    kt, S = p.la(p.q, p.k, p.k, 1, s and p.carry(s.S))  # k̃_t = S_t q_t
    r, P = p.la(p.q, p.k, p.v, 1, s and p.carry(s.P, s.m))  # r_t = q_tᵀ P_t
    o, F = p.la(p.q, kt, r, 3, s and p.carry(s.F, s.eta))  # o_t = q_tᵀ F_t
    (P, m), (F, eta) = p.split(P), p.split(F)
    return p.result(o), HLA3State(p.plain(S), P, F, m, eta)


def _unmasked(p: Sequence | Token, s: HLA3UnmaskedState | None):
    q = p.scaled_q
    y, SK = p.la(q, p.k, p.k, 1, s and p.carry(s.SK), scale=1.0)
    z, SQ = p.la(y, q, q, 1, s and p.carry(s.SQ), scale=1.0)
    o, P = p.la(z, p.k, p.v, 1, s and p.carry(s.P, s.m), scale=1.0)
    P, m = p.split(P)
    return p.result(o), HLA3UnmaskedState(p.plain(SK), p.plain(SQ), P, m)


def _paper(p: Sequence | Token, s: HLA3PaperState | None):
    q, k, v = p.scaled_q, p.k, p.v
    SK, SQ = s and p.carry(s.SK), s and p.carry(s.SQ)
    P = s and p.carry(s.P, s.m)
    G = [s and p.carry(*pair) for pair in zip(s[3:6], s[7:], strict=True)] if s else [None] * 3
    # Alg. 3, lines 9-11, with the summaries before token t
    u = p.la_before(_all_heads(k, q), q, q, SQ)  # u1 = u3 = S^Q k
    w = p.la_before(u, k, v, P)  # u1ᵀ P
    a2 = p.la_before(q, k, k, SK)  # S^K q
    r2 = p.la_before(q, k, v, P)  # qᵀ P
    a3 = p.la_before(u, k, k, SK)  # S^K u3
    # line 13: z = S^Q S^K q, termA = zᵀ P
    y, SK = p.la(q, k, k, 1, SK, scale=1.0)
    z, SQ = p.la(y, q, q, 1, SQ, scale=1.0)
    o, P = p.la(z, k, v, 1, P, scale=1.0)
    b, G1 = p.la(q, k, w, 1, G[0], scale=1.0)
    c, G2 = p.la(q, a2, r2, 1, G[1], scale=1.0)
    d, G3 = p.la(q, a3, v, 1, G[2], scale=1.0)
    (P, m), *pairs = (p.split(x) for x in (P, G1, G2, G3))
    matrices, vectors = zip(*pairs, strict=True)
    state = HLA3PaperState(p.plain(SK), p.plain(SQ), P, *matrices, m, *vectors)
    return p.result(o - b - c - d), state  # line 14


def _all_heads(k: mx.array, q: mx.array) -> mx.array:
    """k once for each query head: S^Q differs between them."""
    return mx.broadcast_to(k, (*q.shape[:-2], *k.shape[-2:]))


def _run(where: type, call: Call, state, kind: type, compose, backend: str | None):
    exact = kind is HLA3State
    pairs = [(state.S, None), (state.P, state.m), (state.F, state.eta)] if state and exact else None
    served = on_metal(call, "hla3" if exact else None, backend, pairs)
    if served:
        o, [(S, _), (P, m), (F, eta)] = served
        return o, HLA3State(S, P, F, m, eta)
    return compose(where(call), state)


def _choose(op: str, masked: bool, convention: str):
    if convention not in ("exact", "paper"):
        fail(op, "convention must be 'exact' or 'paper'", repr(convention))
    if not masked:
        return HLA3UnmaskedState, _unmasked
    return (HLA3State, _exact) if convention == "exact" else (HLA3PaperState, _paper)


def hla3(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float = 1.0,
    decay: float | mx.array | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
    masked: bool = True,
    convention: str = "exact",
    mask: mx.array | None = None,
    segment_ids: mx.array | None = None,
    initial_state: HLA3State | HLA3UnmaskedState | HLA3PaperState | None = None,
    backend: str | None = None,
) -> tuple[mx.array, HLA3State | HLA3UnmaskedState | HLA3PaperState]:
    """Third order: `o = tril(A Aᵀ) A V` with `A = L ⊙ scale·QKᵀ` (Thm 7.1's definition).

    The arguments, shapes and errors that all operators share are described in `mlx_hla.ops`.

    masked: False gives o_t = q_tᵀ S^K_t S^Q_t P_t (§7.1).
    convention: "exact", the masked product of Thm 7.1's proof, or "paper", Algorithm 3 as printed (with
        its decay on every summary), which differs from it.
    With `normalize` o_t is divided by the same operator on v = 1, plus ε (Alg. 3, line 17).
    """
    kind, compose = _choose("hla3", masked, convention)
    call = canonical("hla3", q, k, v, scale, decay, normalize, eps, mask, segment_ids)
    state = _check(call, initial_state, kind)
    # Algorithm 3 takes differences of growing numbers, in which rounded passes would not cancel.
    where = partial(Sequence, wide=kind is HLA3PaperState)
    return _run(where, call, state, kind, compose, backend)


def hla3_step(
    q,
    k,
    v,
    state,
    *,
    scale=1.0,
    decay=None,
    normalize=False,
    eps=1e-6,
    masked=True,
    convention="exact",
    backend=None,
) -> tuple[mx.array, HLA3State | HLA3UnmaskedState | HLA3PaperState]:
    """One token of `hla3` (the recurrences at the top of this file)."""
    kind, compose = _choose("hla3_step", masked, convention)
    call = canonical_step("hla3_step", q, k, v, scale, decay, normalize, eps)
    state = _check(call, state, kind)
    return _run(Token, call, state, kind, compose, backend)
