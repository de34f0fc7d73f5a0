"""Learned mixtures of first and second order: `mixed` where a value is written, `readout` where it is read.

mixed:    S_t = g S_{t-1} + k k^T,  k̃_t = α_t k_t + β_t scale S_t^T q_t,  F_t = g F_{t-1} + k̃_t v_t^T,
          o_t = scale F_t^T q_t
readout:  n_t = g n_{t-1} + 1,  q̃_t = α_t q_t + (β_t / n_t) S_t^T q_t,    P_t = g P_{t-1} + k_t v_t^T,
          o_t = scale P_t^T q̃_t

α, β (`alpha`, `beta`): a number, [Hq], [B, T, Hq], or None: α = 1, and β = 1 (mixed) or −1 (readout).
Both are linear combinations of passes of `gradients.la_forward`, with K̃ = LA_g(Q, K, K):

mixed:    LA_g(Q, αK + βK̃, V)        readout:  LA_g(αQ + (β / n) K̃, K, V),  n = LA_g(1, 1, 1)

`prepare` puts `scale` on the queries.  Readout is linear in q, so there too it comes out once, outside.
A masked token adds nothing, not to n either.  n is 0 only at masked tokens before any real one.

# B batch, T time, H heads, D key dim, V value dim.   Arguments and layouts as in `serial`.
"""

import numpy as np

from .dense import Dense
from .gradients import (
    Program,
    la_forward,
    la_vjp,
    load_state,
    store_state,
    sum_groups,
    through_ratio,
    to_inputs,
    unbroadcast,
)
from .prepare import expand_heads, part, prepare
from .serial import Run, outer, per_head, read
from .states import MixedState, ReadoutState

MIXED_BETA, READOUT_BETA = 1.0, -1.0


def serial_mixed(
    q,
    k,
    v,
    *,
    scale=1.0,
    decay=None,
    normalize=False,
    eps=1e-6,
    mask=None,
    segment_ids=None,
    initial_state=None,
    alpha=None,
    beta=None,
):
    """First and second order under one key: k̃_t = α_t k_t + β_t scale S_t^T q_t, all with the decay g."""
    run = Run(q, k, v, scale, decay, normalize, eps, mask, segment_ids, initial_state)
    a, b = _grouped(run, _coefficients(run.inputs, alpha, beta, MIXED_BETA))
    S = run.state("S", None, per_query=False)
    F = run.state("F", "eta")
    for t, q_t, k_t, v_t, g in run.tokens():
        S = g * S + outer(k_t, k_t)
        kt_t = a[:, t] * k_t[:, :, None] + b[:, t] * (q_t @ S)
        F = per_head(g) * F + outer(kt_t, v_t[:, :, None])
        run.o[:, t] = read(q_t, F)
    return run.output(), MixedState(S, *run.public(F))


def serial_readout(
    q,
    k,
    v,
    *,
    scale=1.0,
    decay=None,
    normalize=False,
    eps=1e-6,
    mask=None,
    segment_ids=None,
    initial_state=None,
    alpha=None,
    beta=None,
):
    """First order, read by q̃_t = α_t q_t + (β_t / n_t) S_t^T q_t: β < 0 is one step towards least squares."""
    run = Run(q, k, v, scale, decay, normalize, eps, mask, segment_ids, initial_state)
    a, b = _grouped(run, _coefficients(run.inputs, alpha, beta, READOUT_BETA))
    S = run.state("S", None, per_query=False)
    P = run.state("P", "m", per_query=False)
    n = _count(initial_state, run.B, run.Hkv)
    for t, q_t, k_t, v_t, g in run.tokens():
        S = g * S + outer(k_t, k_t)
        P = g * P + outer(k_t, v_t)
        n = g[..., 0, 0] * n + run.inputs.real[:, t, None]
        run.o[:, t] = (a[:, t] * q_t + b[:, t] / _divisor(n)[..., None, None] * (q_t @ S)) @ P
    P, m = part(P, normalize)
    return run.output(), ReadoutState(S, P, n, m)


def dense_mixed(
    q,
    k,
    v,
    *,
    scale=1.0,
    decay=None,
    normalize=False,
    eps=1e-6,
    mask=None,
    segment_ids=None,
    alpha=None,
    beta=None,
):
    """M_tj = D_tj (α_j A₀_tj + β_j Σ_i A₀_ti D_ji A₀_ji) over i ≤ j ≤ t."""
    d = Dense(q, k, v, scale, decay, normalize, eps, mask, segment_ids)
    a, b = (x.swapaxes(1, 2)[:, :, None, :] for x in _coefficients(d.inputs, alpha, beta, MIXED_BETA))
    return d.apply(d.D * (a * d.A0 + b * (d.A0 @ (d.D * d.A0).swapaxes(-1, -2))))


def dense_readout(
    q,
    k,
    v,
    *,
    scale=1.0,
    decay=None,
    normalize=False,
    eps=1e-6,
    mask=None,
    segment_ids=None,
    alpha=None,
    beta=None,
):
    """M_tj = D_tj (α_t A₀_tj + (β_t / n_t) Σ_i D_ti A₀_ti k_i·k_j) over i, j ≤ t, with n_t = Σ_i D_ti."""
    d = Dense(q, k, v, scale, decay, normalize, eps, mask, segment_ids)
    a, b = (x.swapaxes(1, 2)[..., None] for x in _coefficients(d.inputs, alpha, beta, READOUT_BETA))
    n = d.D @ d.inputs.real[:, None, :, None]
    return d.apply(d.D * (a * d.A0 + b / _divisor(n) * (d.D * d.A0 @ (d.k @ d.k.swapaxes(-1, -2)))))


def vjp_mixed(q, k, v, decay, initial_state, do, dstate=None, *, alpha=None, beta=None, **options):
    """Gradients of `serial_mixed`, those of `alpha` and `beta` among them (None where they are None)."""
    r = _Reverse(MixedState, {"S": None, "F": "eta"}, q, k, v, decay, initial_state, dstate, options)
    a, b = r.coefficients(alpha, beta, MIXED_BETA)
    S, F = r.start["S"], r.start["F"]
    kt, _ = la_forward(r.q, r.k, r.k, r.g, S)
    mixed = a * r.k + b * kt
    do = r.through_output(la_forward(r.q, mixed, r.v, r.g, F)[0], do)

    dq, dmixed, dv, dg, dF = la_vjp(r.q, mixed, r.v, r.g, F, do, r.final["F"])
    dq2, dk2, dk3, dg2, dS = la_vjp(r.q, r.k, r.k, r.g, S, b * dmixed, r.final["S"])
    grad = {"q": dq + dq2, "k": a * dmixed + dk2 + dk3, "v": dv}
    out = r.collect(grad, dg + dg2, {"S": dS, "F": dF})
    return out | r.collect_coefficients(alpha, (dmixed * r.k).sum(-1), beta, (dmixed * kt).sum(-1))


def vjp_readout(q, k, v, decay, initial_state, do, dstate=None, *, alpha=None, beta=None, **options):
    """Gradients of `serial_readout`, those of `alpha` and `beta` among them (None where they are None)."""
    r = _Reverse(ReadoutState, {"S": None, "P": "m"}, q, k, v, decay, initial_state, dstate, options)
    a, b = r.coefficients(alpha, beta, READOUT_BETA)
    S, P = r.start["S"], r.start["P"]
    one = np.ones((*r.g.shape, 1))
    here = one * r.inputs.real[..., None, None]
    n0 = r.count(initial_state)
    n = _divisor(la_forward(one, here, one, r.g, n0)[0])
    kt, _ = la_forward(r.q, r.k, r.k, r.g, S)
    query = a * r.q + b / n * kt
    do = r.through_output(la_forward(query, r.k, r.v, r.g, P)[0], do)

    dquery, dk, dv, dg, dP = la_vjp(query, r.k, r.v, r.g, P, do, r.final["P"])
    dq, dk2, dk3, dg2, dS = la_vjp(r.q, r.k, r.k, r.g, S, b / n * dquery, r.final["S"])
    along = (dquery * kt).sum(-1, keepdims=True)
    dn_final = r.count(dstate) / r.groups  # the share of each query head, as `load_state` has it
    *_, dg3, dn = la_vjp(one, here, one, r.g, n0, -b / n**2 * along, dn_final)
    grad = {"q": a * dquery + dq, "k": dk + dk2 + dk3, "v": dv}
    out = r.collect(grad, dg + dg2 + dg3, {"S": dS, "P": dP})
    out["initial_state"] = out["initial_state"]._replace(n=sum_groups(dn[..., 0, 0], r.Hkv, 1))
    return out | r.collect_coefficients(alpha, (dquery * r.q).sum(-1), beta, (along / n)[..., 0])


class _Reverse:
    """What both vjps do around their passes: inputs and states with heads expanded, and the way back."""

    def __init__(self, state, fields, q, k, v, decay, initial_state, dstate, options):
        self.decay, self.scale, self.eps = decay, options.get("scale", 1.0), options.pop("eps", 1e-6)
        self.normalize = options.get("normalize", False)
        self.inputs = x = prepare(q, k, v, decay=decay, **options)
        self.Hkv, self.groups = x.k.shape[2], x.q.shape[2] // x.k.shape[2]
        self.q, (self.k, self.v, self.g) = x.q, (self.expand(y) for y in (x.k, x.v, x.g))
        self.program = Program((), {}, state, fields)  # has no passes: it names the states
        known = x, self.normalize
        self.start = {f: load_state(self.program, initial_state, f, *known) for f in fields}
        self.final = {f: load_state(self.program, dstate, f, *known, gradient=True) for f in fields}

    def expand(self, x, axis=2):
        return expand_heads(x, self.Hkv * self.groups, axis)

    def coefficients(self, alpha, beta, default):
        return (x[..., None] for x in _coefficients(self.inputs, alpha, beta, default))

    def count(self, state):
        return self.expand(_count(state, len(self.q), self.Hkv), axis=1)[..., None, None]

    def through_output(self, o, do):
        do = np.where(self.inputs.real[..., None, None], do, 0.0)
        return through_ratio(o, do, self.normalize, self.eps)

    def collect(self, grad, dg, dstart):
        out = to_inputs(self.inputs, grad, dg, self.decay, self.scale, self.normalize)
        out["initial_state"] = store_state(self.program, dstart, self.Hkv, self.normalize)
        return out

    def collect_coefficients(self, alpha, dalpha, beta, dbeta):
        """[B, T, Hq] each, 0 at masked tokens as q, k and v are -> the shapes of what was given."""
        given = {"alpha": (alpha, dalpha), "beta": (beta, dbeta)}
        return {name: None if x is None else unbroadcast(d, np.shape(x)) for name, (x, d) in given.items()}


def _coefficients(inputs, alpha, beta, default):
    """α and β as [B, T, Hq], 0 at masked tokens whatever stands there."""
    shape = inputs.q.shape[:3]
    for name, x, other in (("alpha", alpha, 1.0), ("beta", beta, default)):
        x = np.asarray(other if x is None else x, np.float64)
        if x.shape not in ((), shape[2:], shape):
            raise ValueError(f"[reference] {name} must be a number, {shape[2:]} or {shape}, got {x.shape}")
        yield np.where(inputs.real[..., None], np.broadcast_to(x, shape), 0.0)


def _grouped(run, coefficients):
    """[B, T, Hq] -> [B, T, Hkv, G, 1] each, as `Run.tokens` has the queries."""
    return (x.reshape(run.B, run.T, run.Hkv, run.G, 1) for x in coefficients)


def _count(state, B, Hkv):
    """n [B, Hkv] of a state or of a state's gradient: zeros where it is None."""
    n = getattr(state, "n", None)
    n = np.zeros((B, Hkv)) if n is None else np.array(n, np.float64)
    if n.shape != (B, Hkv):
        raise ValueError(f"[reference] initial state 'n' must be {(B, Hkv)}, got {n.shape}")
    return n


def _divisor(n):
    return np.where(n == 0, 1.0, n)
