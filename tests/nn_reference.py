"""The attention layer once more, in NumPy float64 and token by token: what its tests compare with."""

import numpy as np
from mlx.utils import tree_flatten

from mlx_hla import reference
from mlx_hla.nn import HLAttention, SoftmaxAttention, WindowAttention
from mlx_hla.ops.order import operator_of

# Mixers of softmax attention: the class, and what it is built with beside the shared options.
SOFTMAX = {"window": (WindowAttention, {"window": 7}), "softmax": (SoftmaxAttention, {})}
_NOT_SOFTMAX = {"decay", "normalize", "output_norm"}


def make(kind, options, dims, heads):
    """A mixer: an operator's `HLAttention`, or one of softmax attention with those of the options it has."""
    if kind not in SOFTMAX:
        return HLAttention(dims, heads, operator=kind, **options)
    cls, own = SOFTMAX[kind]
    shared = {name: value for name, value in options.items() if name not in _NOT_SOFTMAX}
    if shared.get("qk_norm") == "l2":
        del shared["qk_norm"]
    return cls(dims, heads, **own, **shared)


def assert_close(name, got, want, tol):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"{name}: shape {got.shape}, expected {want.shape}"
    error = np.abs(got - want)
    scale = max(1.0, float(np.abs(want).max(initial=0.0)))
    assert error.max(initial=0.0) <= tol * scale, (
        f"{name}: max error {error.max():.3g}, mean {error.mean():.3g}, scale {scale:.3g}, tol {tol:.1g}"
    )


def _silu(x):
    return x / (1 + np.exp(-x))


def _rms(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def _rotate(x, base):
    """x [T, H, D] by its position: halves are the two coordinates of each plane."""
    T, _, D = x.shape
    angle = np.arange(T)[:, None] * base ** (-np.arange(0, D, 2) / D)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x[..., : D // 2], x[..., D // 2 :]
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def _look_back(attention, q, k, v):
    """One head of softmax attention: q, k [T, D] with the scale in q, v [T, Dv]."""
    t = np.arange(len(q))
    seen = t[:, None] >= t
    if hasattr(attention, "window"):
        seen &= t[:, None] - t < attention.window
    scores = np.where(seen, q @ k.T, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


def _operate(attention, q, k, v, g, step=None):
    """One head: q, k [T, D] with the scale in q, v [T, Dv], g [T], by the operator's float64 recurrence."""
    if not isinstance(attention, HLAttention):
        return _look_back(attention, q, k, v)
    operator = operator_of(attention.operator)
    serial = getattr(reference, f"serial_{operator.name}")
    q, k, v, g = (x[None, :, None] for x in (q, k, v, g))
    own = {}
    if operator.name == "readout" and attention.qk_norm:  # normalised keys have the length √D, or here 1
        own["beta"] = -1.0 if attention.qk_norm == "l2" else -1.0 / attention.head_dim
    if step is not None:  # [T]: of readout a factor, of mixed over the decayed count 1 / (1 − g) too
        step = step[None, :, None]
        own["beta"] = own.get("beta", -1.0) * step if operator.name == "readout" else step * (1 - g)
    return serial(q, k, v, decay=g, **operator.selected, **own)[0][0, :, 0]


def parameters(attention):
    """The layer's parameters by name, float64."""
    return {name: np.asarray(p.tolist(), np.float64) for name, p in tree_flatten(attention.parameters())}


def layer(attention, x, weights=None):
    """`attention(x)` for x [T, dims] in float64, with its own parameters or other ones."""
    a, T = attention, len(x)
    w = parameters(a) if weights is None else weights
    x = np.asarray(x, np.float64)

    def project(name, z):
        return z @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    Hq, Hkv, D, Dv = a.num_heads, a.num_kv_heads, a.head_dim, a.value_dim
    qkv = project("qkv_proj", x)
    if "conv" in a:
        taps = w["conv.weight"].T
        padded = np.concatenate([np.zeros((len(taps) - 1, qkv.shape[1])), qkv])
        qkv = _silu(sum(padded[i : i + T] * tap for i, tap in enumerate(taps)))
    q = qkv[:, : Hq * D].reshape(T, Hq, D)
    k = qkv[:, Hq * D : (Hq + Hkv) * D].reshape(T, Hkv, D)
    v = qkv[:, (Hq + Hkv) * D :].reshape(T, Hkv, Dv)
    scale = D**-0.5
    if a.qk_norm == "rms":
        q, k = _rms(q, w["q_norm.weight"], 1e-6), _rms(k, w["k_norm.weight"], 1e-6)
    elif a.qk_norm == "l2":
        q, k = (z / np.sqrt((z * z).sum(-1, keepdims=True) + D * 1e-6) for z in (q, k))
        scale = 1.0
    if a.rope is not None:
        q, k = _rotate(q, a.rope), _rotate(k, a.rope)
    decay = getattr(a, "decay", None)
    if decay == "gate":
        z = x @ w["decay_gate.weight"].T + w["decay_gate.bias"]
        g = np.exp(-np.log1p(np.exp(z)))
    elif decay == "fixed":
        # Memories of 8 to 512 tokens, even in log: g = exp(-1 / memory).
        memory = np.geomspace(8, 512, Hkv) if Hkv > 1 else np.array([64.0])
        g = np.broadcast_to(np.exp(-1 / memory), (T, Hkv))
    else:
        g = np.ones((T, Hkv))
    steps = None
    if "step_gate" in a:
        steps = 2 / (1 + np.exp(-(x @ w["step_gate.weight"].T + w["step_gate.bias"])))
    o = np.zeros((T, Hq, Dv))
    for h in range(Hq):
        j = h * Hkv // Hq
        step = None if steps is None else steps[:, h]
        o[:, h] = _operate(a, scale * q[:, h], k[:, j], v[:, j], g[:, j], step)
        if getattr(a, "normalize", False):
            o[:, h] /= _operate(a, scale * q[:, h], k[:, j], np.ones((T, 1)), g[:, j]) + 1e-6
    if "out_norm" in a:
        o = _rms(o, w["out_norm.weight"], 1e-5)
    o = o.reshape(T, Hq * Dv)
    if a.output_gate:
        z = project("gate_proj", x)
        o = o * (_silu(z) if a.output_gate == "silu" else 1 / (1 + np.exp(-z)))
    return project("out_proj", o)
