"""Exact float64 reverse mode of every operator, through one primitive.

LA_g(q, k, v): S_t = g_t S_{t-1} + k_t v_t^T, o_t = S_t^T q_t.  Its adjoint runs over the tokens backwards and
never divides by g, so exact zeros (resets) and tiny decays are exact:

    dS_t += q_t do_t^T;  dq_t = S_t do_t;  dk_t = dS_t v_t;  dv_t = dS_t^T k_t;
    dg_t = <dS_t, S_{t-1}>;  dS_{t-1} = g_t dS_t.

Each operator is a short program of such passes; its vjp walks the program backwards.

    vjp_hla2(q, k, v, decay, initial_state, do, dstate, **options) -> dict(q, k, v, decay, initial_state)

`do` [B, T, Hq, V] and `dstate` (a state, or None; None fields count as zero) are the incoming gradients.  The
gradient of `decay` has decay's shape (None if decay is None); that of `initial_state` is a state NamedTuple,
given also where `initial_state` is None and stands for zeros.  Options are those of the `serial_*` functions.
"""

from typing import NamedTuple

import numpy as np

from . import states
from .prepare import carried, expand_heads, part, prepare

CHECKPOINT = 64  # tokens between the states that the backward keeps


class Pass(NamedTuple):
    """out = LA_{g^power}(q, k, v) + ridge q, with its state; `exclusive` reads S_{t-1} in place of S_t."""

    out: str
    q: str
    k: str
    v: str
    state: str
    power: int = 1
    exclusive: bool = False
    ridge: float = 0.0


class Program(NamedTuple):
    """Passes in order, the signed outputs, the state class and its (matrix, vector | None) fields by name.

    A name with an index, as ("F", 1), is one member of a tuple field.
    """

    passes: tuple[Pass, ...]
    output: dict[str, float]
    state: type
    fields: dict


_KEY_HEADS = ("S", "SK", "P")  # states that one key-value head shares among its query heads


def linear_program():
    return Program((Pass("o", "q", "k", "v", "P"),), {"o": 1.0}, states.LinearState, {"P": "m"})


def hla2_program(masked=True, ridge=0.0):
    keys = Pass("kt", "q", "k", "k", "S", ridge=ridge)
    if masked:
        passes = (keys, Pass("o", "q", "kt", "v", "F", power=2))
        return Program(passes, {"o": 1.0}, states.HLA2State, {"S": None, "F": "eta"})
    passes = (keys, Pass("o", "kt", "q", "v", "C"))
    return Program(passes, {"o": 1.0}, states.HLA2UnmaskedState, {"S": None, "C": "m"})


def ahla_program():
    passes = (Pass("r", "q", "k", "v", "P"), Pass("o", "q", "k", "r", "E"))
    return Program(passes, {"o": 1.0}, states.AHLAState, {"P": "m", "E": "n"})


def hla3_program(masked=True, convention="exact"):
    if masked and convention == "exact":
        passes = (
            Pass("kt", "q", "k", "k", "S"),
            Pass("r", "q", "k", "v", "P"),
            Pass("o", "q", "kt", "r", "F", power=3),
        )
        return Program(passes, {"o": 1.0}, states.HLA3State, {"S": None, "P": "m", "F": "eta"})
    full = (
        Pass("kt", "q", "k", "k", "SK"),
        Pass("z", "kt", "q", "q", "SQ"),
        Pass("o", "z", "k", "v", "P"),
    )
    if not masked:
        return Program(full, {"o": 1.0}, states.HLA3UnmaskedState, {"SK": None, "SQ": None, "P": "m"})
    corrections = (
        Pass("u1", "k", "q", "q", "SQ", exclusive=True),
        Pass("w1", "u1", "k", "v", "P", exclusive=True),
        Pass("o1", "q", "k", "w1", "G1"),
        Pass("a2", "q", "k", "k", "SK", exclusive=True),
        Pass("r", "q", "k", "v", "P", exclusive=True),
        Pass("o2", "q", "a2", "r", "G2"),
        Pass("a3", "u1", "k", "k", "SK", exclusive=True),
        Pass("o3", "q", "a3", "v", "G3"),
    )
    fields = {"SK": None, "SQ": None, "P": "m", "G1": "h1", "G2": "h2", "G3": "h3"}
    output = {"o": 1.0, "o1": -1.0, "o2": -1.0, "o3": -1.0}
    return Program(full + corrections, output, states.HLA3PaperState, fields)


def hla_program(order):
    if order <= 3:
        return (linear_program, hla2_program, hla3_program)[order - 1]()
    passes, fields, u = [Pass("kt", "q", "k", "k", "S")], {"S": None}, "v"
    if order % 2:
        passes.append(Pass("u", "q", "k", "v", "P"))
        fields["P"], u = "m", "u"
    for i in range(order // 2):
        passes.append(Pass(f"u{i}", "q", "kt", u, ("F", i), power=2 * i + 2 + order % 2))
        fields["F", i], u = ("eta", i), f"u{i}"
    return Program(tuple(passes), {u: 1.0}, states.HLAState, fields)


def la_forward(q, k, v, g, S, exclusive=False, reset=None):
    """LA_g: q, k [B, T, H, D], v [B, T, H, V], g [B, T, H], S [B, H, D, V] -> o [B, T, H, V], final S.

    `exclusive`: o_t = S_{t-1}^T q_t, zero at a token where `reset` [B, T].
    """
    o = np.zeros(v.shape)
    for t in range(q.shape[1]):
        S, before = g[:, t, :, None, None] * S + k[:, t, :, :, None] * v[:, t, :, None, :], S
        o[:, t] = (q[:, t, :, None, :] @ (before if exclusive else S))[:, :, 0]
    if exclusive and reset is not None:
        o = o * ~reset[..., None, None]
    return o, S


def la_vjp(q, k, v, g, S, do, dS, exclusive=False, reset=None):
    """Adjoint of `la_forward`: -> dq, dk, dv, dg, dS of the initial state."""
    if exclusive and reset is not None:
        do = do * ~reset[..., None, None]
    T = q.shape[1]
    starts = list(range(0, T, CHECKPOINT))
    kept = [S]
    for a in starts[:-1]:
        kept.append(_states(k, v, g, kept[-1], a, a + CHECKPOINT)[-1])
    dq, dk, dv, dg = (np.zeros(x.shape) for x in (q, k, v, g))
    dS = dS.copy()
    for a, start in zip(reversed(starts), reversed(kept), strict=True):
        S_at = _states(k, v, g, start, a, min(a + CHECKPOINT, T))
        for t in range(min(a + CHECKPOINT, T) - 1, a - 1, -1):
            before, after = S_at[t - a], S_at[t - a + 1]
            read = q[:, t, :, :, None] * do[:, t, :, None, :]
            if not exclusive:
                dS = dS + read
            dq[:, t] = ((before if exclusive else after) @ do[:, t, :, :, None])[..., 0]
            dk[:, t] = (dS @ v[:, t, :, :, None])[..., 0]
            dv[:, t] = (k[:, t, :, None, :] @ dS)[:, :, 0]
            dg[:, t] = (dS * before).sum((-1, -2))
            dS = g[:, t, :, None, None] * dS
            if exclusive:
                dS = dS + read
    return dq, dk, dv, dg, dS


def _states(k, v, g, S, a, b):
    """[S_{a-1}, S_a, .., S_{b-1}]."""
    out = [S]
    for t in range(a, b):
        out.append(g[:, t, :, None, None] * out[-1] + k[:, t, :, :, None] * v[:, t, :, None, :])
    return out


def vjp_linear_attention(q, k, v, decay, initial_state, do, dstate=None, **options):
    """Gradients of `serial_linear_attention`."""
    return program_vjp(linear_program(), q, k, v, decay, initial_state, do, dstate, **options)


def vjp_hla2(q, k, v, decay, initial_state, do, dstate=None, *, masked=True, ridge=0.0, **options):
    """Gradients of `serial_hla2`."""
    program = hla2_program(masked, ridge)
    return program_vjp(program, q, k, v, decay, initial_state, do, dstate, **options)


def vjp_ahla(q, k, v, decay, initial_state, do, dstate=None, **options):
    """Gradients of `serial_ahla`."""
    return program_vjp(ahla_program(), q, k, v, decay, initial_state, do, dstate, **options)


def vjp_hla3(q, k, v, decay, initial_state, do, dstate=None, *, masked=True, convention="exact", **options):
    """Gradients of `serial_hla3`."""
    program = hla3_program(masked, convention)
    return program_vjp(program, q, k, v, decay, initial_state, do, dstate, **options)


def vjp_hla(q, k, v, decay, initial_state, do, dstate=None, *, order, **options):
    """Gradients of `serial_hla`."""
    return program_vjp(hla_program(order), q, k, v, decay, initial_state, do, dstate, **options)


def program_vjp(
    program,
    q,
    k,
    v,
    decay,
    initial_state,
    do,
    dstate=None,
    *,
    scale=1.0,
    normalize=False,
    eps=1e-6,
    mask=None,
    segment_ids=None,
):
    """Run a program forwards, then its passes' adjoints backwards."""
    x = prepare(q, k, v, scale=scale, decay=decay, mask=mask, segment_ids=segment_ids, normalize=normalize)
    Hq, Hkv = x.q.shape[2], x.k.shape[2]
    env = {"q": x.q, "k": expand_heads(x.k, Hq), "v": expand_heads(x.v, Hq)}
    g = expand_heads(x.g, Hq)
    start = {name: load_state(program, initial_state, name, x, normalize) for name in program.fields}
    for p in program.passes:
        env[p.out], _ = la_forward(
            env[p.q], env[p.k], env[p.v], g**p.power, start[p.state], p.exclusive, x.reset
        )
        env[p.out] += p.ridge * env["q"] if p.ridge else 0.0

    total = sum(sign * env[name] for name, sign in program.output.items())
    do = through_ratio(total, np.where(x.real[..., None, None], do, 0.0), normalize, eps)
    grad = {name: np.zeros(value.shape) for name, value in env.items()}
    for name, sign in program.output.items():
        grad[name] += sign * do
    dg = np.zeros(g.shape)
    dfinal = {name: load_state(program, dstate, name, x, normalize, gradient=True) for name in program.fields}
    dstart = {name: np.zeros(value.shape) for name, value in start.items()}
    for p in reversed(program.passes):
        if p.ridge:
            grad["q"] += p.ridge * grad[p.out]
        # A state that several passes carry is one state: its final gradient enters once.
        dS = dfinal.pop(p.state, 0.0) + np.zeros(start[p.state].shape)
        dq, dk, dv, dgp, dS = la_vjp(
            env[p.q], env[p.k], env[p.v], g**p.power, start[p.state], grad[p.out], dS, p.exclusive, x.reset
        )
        for name, d in ((p.q, dq), (p.k, dk), (p.v, dv)):
            grad[name] += d
        dg += p.power * g ** (p.power - 1) * dgp
        dstart[p.state] += dS

    out = to_inputs(x, grad, dg, decay, scale, normalize)
    out["initial_state"] = store_state(program, dstart, Hkv, normalize)
    return out


def to_inputs(x, grad, dg, decay, scale, normalize):
    """Gradients of the prepared and expanded q, k, v, g -> those of the arguments: dict(q, k, v, decay)."""
    Hkv = x.k.shape[2]
    dv = grad["v"][..., :-1] if normalize else grad["v"]
    dg = np.where(x.real[..., None] & ~x.reset[..., None], sum_groups(dg, Hkv, 2), 0.0)
    masked = {"q": scale * grad["q"], "k": sum_groups(grad["k"], Hkv, 2), "v": sum_groups(dv, Hkv, 2)}
    out = {name: np.where(x.real[..., None, None], d, 0.0) for name, d in masked.items()}
    out["decay"] = None if decay is None else unbroadcast(dg, np.shape(decay))
    return out


def through_ratio(total, do, normalize, eps):
    """Gradient of num / (den + ε) with respect to [num, den]."""
    if not normalize:
        return do
    num, den = total[..., :-1], total[..., -1:] + eps
    den = np.where(np.any(do, -1, keepdims=True), den, 1.0)  # masked tokens, where den may be 0
    return np.concatenate([do / den, -(do * num).sum(-1, keepdims=True) / den**2], -1)


def load_state(program, state, name, x, normalize, gradient=False):
    """One state of a NamedTuple (or zeros) with its heads expanded; of a gradient, each group's share."""
    B, _, Hq, D = x.q.shape
    vector = program.fields[name]
    field, index = name if isinstance(name, tuple) else (name, None)
    H = x.k.shape[2] if field in _KEY_HEADS else Hq
    shape = (B, H, D, x.v.shape[-1] if vector else D)
    if state is None:
        return np.zeros((B, Hq, *shape[2:]))
    vector_field = vector[0] if isinstance(vector, tuple) else vector
    matrix, vec = getattr(state, field), getattr(state, vector_field) if vector and normalize else None
    if index is not None:
        matrix, vec = matrix and matrix[index], vec and vec[index]
    if gradient:
        matrix = np.zeros((*shape[:3], shape[3] - bool(vector and normalize))) if matrix is None else matrix
        vec = np.zeros(shape[:3]) if vec is None and vector and normalize else vec
    pair = states.LinearState(matrix, vec)
    full = carried(pair, "P", "m" if vector else None, shape, normalize)
    return expand_heads(full, Hq, axis=1) / (Hq // H if gradient else 1)


def store_state(program, values, Hkv, normalize):
    """The states of `load_state`, back in the program's NamedTuple."""
    fields = dict.fromkeys(program.state._fields)
    for name, value in values.items():
        vector = program.fields[name]
        field = name[0] if isinstance(name, tuple) else name
        value = sum_groups(value, Hkv, 1) if field in _KEY_HEADS else value
        matrix, vec = part(value, normalize and vector is not None)
        if isinstance(name, tuple):
            fields[field] = (*(fields[field] or ()), matrix)
            fields[vector[0]] = (*(fields[vector[0]] or ()), vec) if normalize else None
        else:
            fields[field] = matrix
            if vector:
                fields[vector] = vec
    return program.state(**fields)


def sum_groups(x, H, axis):
    """Sum over the query heads of each key-value head."""
    return x.reshape(*x.shape[:axis], H, -1, *x.shape[axis + 1 :]).sum(axis + 1)


def unbroadcast(d, shape):
    """[B, T, H] -> the shape of what was given: (), [H] or [B, T, H]."""
    return d if len(shape) == 3 else d.sum((0, 1)) if len(shape) == 1 else d.sum()


def numerical_gradient(f, x, step=1e-6):
    """Central finite differences of the scalar f(x) with respect to the array x, one element at a time."""
    x = np.array(x, np.float64)
    out = np.zeros(x.shape)
    for i in np.ndindex(*x.shape):
        keep = x[i]
        x[i] = keep + step
        up = f(x)
        x[i] = keep - step
        out[i] = (up - f(x)) / (2 * step)
        x[i] = keep
    return out
