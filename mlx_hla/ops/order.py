"""Any order: `o = tril(A Aᵀ)^p A^{n−2p} V`, p = n // 2 pairs and one A more where n is odd.

    x = V or LA_g(Q, K, V);  then p times  x ← LA_{g^order so far}(Q, K̃, x),  K̃ = LA_g(Q, K, K)

Orders 1, 2 and 3 are `linear_attention`, `hla2` and `hla3`; each pair more costs one state F more.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from .backend import on_metal
from .checks import Call, canonical, canonical_step, check_state, fail
from .hla2 import hla2, hla2_step
from .hla3 import hla3, hla3_step
from .linear import linear_attention, linear_attention_step
from .passes import Sequence, Token

MAX_ORDER = 16


class HLAState(NamedTuple):
    """State of order n ≥ 4: S `[B, Hkv, D, D]`, F a tuple of n // 2 `[B, Hq, D, Dv]`; float32.

    P `[B, Hkv, D, Dv]` where n is odd; normalising also m `[B, Hkv, D]` (n odd) and eta, a tuple of
    `[B, Hq, D]` beside F.
    """

    S: mx.array
    F: tuple[mx.array, ...]
    P: mx.array | None = None
    m: mx.array | None = None
    eta: tuple[mx.array, ...] | None = None


class _Pair(NamedTuple):
    F: mx.array
    eta: mx.array | None


def _check(call: Call, state: HLAState | None, order: int) -> HLAState | None:
    if state is None:
        return None
    want = f"the state must be an HLAState with a tuple of {order // 2} F"
    if not isinstance(state, HLAState) or not isinstance(state.F, tuple | list):
        fail(call.op, want, type(state).__name__)
    if len(state.F) != order // 2:
        fail(call.op, want, f"{len(state.F)} F")
    B, Hq, Hkv, D, V = call.dims
    odd, norm = order % 2 == 1, call.ones is not None
    shapes = {
        "S": (B, Hkv, D, D),
        "P": (B, Hkv, D, V) if odd else None,
        "m": (B, Hkv, D) if odd and norm else None,
    }
    check_state(call.op, state, HLAState, shapes)
    if norm != (state.eta is not None) or (norm and len(state.eta) != len(state.F)):
        want = f"a tuple of {order // 2} arrays" if norm else "None: it belongs to normalize=True"
        fail(
            call.op, f"state.eta must be {want}", "None" if state.eta is None else f"{len(state.eta)} arrays"
        )
    for F, eta in zip(state.F, state.eta or (None,) * len(state.F), strict=True):
        check_state(call.op, _Pair(F, eta), _Pair, {"F": (B, Hq, D, V), "eta": (B, Hq, D) if norm else None})
    return state


def _compose(p: Sequence | Token, s: HLAState | None, order: int):
    kt, S = p.la(p.q, p.k, p.k, 1, s and p.carry(s.S))  # k̃_t = S_t q_t
    x, so_far, P, m, Fs = p.v, 0, None, None, []
    if order % 2:
        x, P = p.la(p.q, p.k, x, 1, s and p.carry(s.P, s.m))
        (P, m), so_far = p.split(P), 1
    for i in range(order // 2):
        so_far += 2
        first = s and p.carry(s.F[i], None if s.eta is None else s.eta[i])
        x, F = p.la(p.q, kt, x, so_far, first)
        Fs.append(p.split(F))
    matrices, vectors = zip(*Fs, strict=True)
    eta = None if vectors[0] is None else vectors
    return p.result(x), HLAState(p.plain(S), matrices, P, m, eta)


def _order(op: str, order) -> int:
    if isinstance(order, bool) or not isinstance(order, int) or not 1 <= order <= MAX_ORDER:
        fail(op, f"order must be an integer from 1 to {MAX_ORDER}", repr(order))
    return order


def hla(q, k, v, *, order: int, **options):
    """HLA of any order: 1 `linear_attention`, 2 `hla2`, 3 `hla3`, n ≥ 4 `tril(A Aᵀ)^p A^{n−2p} V`.

    The arguments, shapes and errors that all operators share are described in `mlx_hla.ops`; orders 2
    and 3 also take their operators' own options.
    """
    low = {1: linear_attention, 2: hla2, 3: hla3}
    if _order("hla", order) in low:
        return low[order](q, k, v, **options)
    return _high(q, k, v, order, **options)


def _high(
    q,
    k,
    v,
    order,
    *,
    scale=1.0,
    decay=None,
    normalize=False,
    eps=1e-6,
    mask=None,
    segment_ids=None,
    initial_state=None,
    backend=None,
):
    call = canonical("hla", q, k, v, scale, decay, normalize, eps, mask, segment_ids)
    state = _check(call, initial_state, order)
    on_metal(call, None, backend, None)  # no kernel of its own: raises where one was asked for
    return _compose(Sequence(call), state, order)


def hla_step(q, k, v, state, *, order: int, **options):
    """One token of `hla`: the step of the same order."""
    low = {1: linear_attention_step, 2: hla2_step, 3: hla3_step}
    if _order("hla_step", order) in low:
        return low[order](q, k, v, state, **options)
    return _high_step(q, k, v, state, order, **options)


def _high_step(q, k, v, state, order, *, scale=1.0, decay=None, normalize=False, eps=1e-6, backend=None):
    call = canonical_step("hla_step", q, k, v, scale, decay, normalize, eps)
    state = _check(call, state, order)
    on_metal(call, None, backend, None)  # no kernel of its own: raises where one was asked for
    return _compose(Token(call), state, order)
