"""The arms: what stands in the place of attention, at equal parameters and equal bytes of state.

The measure is H heads of D with two D × D matrices each (HLA2, AHLA, readout ..): H D = dims, 2 H D² numbers.
One matrix per head (first order, GDN) has H / 2 heads of 2 D; three (HLA3) the nearest heads there are; a
window keeps W = D tokens' keys and values. An arm's name may end in options, each after a `+`:

    +window      a window layer below each such layer: half of the layers are windows
    +curriculum  a member trains on few pairs until it has learnt those, see tasks.Pairs
    +fixed       training draws no number of pairs: every sequence has all
    +long        decay gates start at memories of 256 to 4,096 tokens, not of 8 to 512
    +nodecay     no decay
    +steps       twice the steps
    +gate        an output gate
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from gdn import GDNAttention
from mlx.utils import tree_flatten
from operators import FIRST_AHLA, mesa, registered

from mlx_hla.models.lm import SwiGLU
from mlx_hla.nn import DecayGate, HLAttention, SoftmaxAttention, WindowAttention

OPTIONS = ("window", "curriculum", "fixed", "long", "nodecay", "steps", "gate")


@dataclass(frozen=True)
class Geometry:
    dims: int
    heads: int
    head_dim: int


def geometry(dims: int, head_dim: int, matrices: int) -> Geometry:
    """The heads with this many matrices each whose bytes and width come nearest to the measure's."""
    if dims % head_dim or (dims // head_dim) % 2:
        raise ValueError(f"dims must be an even multiple of head_dim={head_dim}, got {dims}")
    budget = 2 * dims * head_dim

    def off(heads: int, dim: int) -> float:
        return abs(matrices * heads * dim**2 / budget - 1) + abs(heads * dim / dims - 1)

    shapes = [(h, d) for h in range(1, 2 * dims // head_dim + 1) for d in range(1, 2 * head_dim + 1)]
    return Geometry(dims, *min(shapes, key=lambda s: off(*s)))


def _higher(operator: str, qk_norm: str = "rms") -> Callable[..., nn.Module]:
    def build(g: Geometry, **options: Any) -> nn.Module:
        if operator in ("mixed", "readout"):
            options["coefficients"] = "learned"
        with registered(FIRST_AHLA, mesa()):
            return HLAttention(
                g.dims, g.heads, head_dim=g.head_dim, operator=operator, qk_norm=qk_norm, **options
            )

    return build


def _gdn(g: Geometry, **options: Any) -> nn.Module:
    return GDNAttention(g.dims, g.heads, head_dim=g.head_dim, **options)


def _softmax(g: Geometry, output_gate: bool = False, **_: Any) -> nn.Module:
    return SoftmaxAttention(g.dims, g.heads, head_dim=g.head_dim, output_gate=output_gate)


def _window(g: Geometry, output_gate: bool = False, **_: Any) -> nn.Module:
    return WindowAttention(g.dims, g.heads, head_dim=g.head_dim, window=g.head_dim, output_gate=output_gate)


@dataclass(frozen=True)
class Arm:
    """matrices: of D × D that each head's state has, as the measure for its heads."""

    matrices: int
    build: Callable[..., nn.Module]


ARMS = {
    "softmax": Arm(2, _softmax),
    "window": Arm(2, _window),
    "first": Arm(1, _higher("first")),
    "gdn": Arm(1, _gdn),
    "hla2": Arm(2, _higher("hla2")),
    "ahla": Arm(2, _higher("ahla")),
    "hla3": Arm(3, _higher("hla3")),
    "mixed": Arm(2, _higher("mixed")),
    "readout": Arm(2, _higher("readout", "l2")),
    "mesa": Arm(2, _higher("mesa", "l2")),
    "first_ahla": Arm(2, _higher("first_ahla")),
}


def parse(name: str) -> tuple[str, frozenset[str]]:
    """An arm's name and its options; ValueError where there is no such arm."""
    base, *options = name.split("+")
    if base not in ARMS:
        raise ValueError(f"arm must be one of {', '.join(ARMS)}, got {base!r}")
    for option in options:
        if option not in OPTIONS:
            raise ValueError(f"an arm's options are {', '.join(OPTIONS)}, got {option!r}")
    return base, frozenset(options)


def mixer(name: str, dims: int, head_dim: int) -> nn.Module:
    base, options = parse(name)
    arm = ARMS[base]
    g = geometry(dims, head_dim, arm.matrices)
    layer = arm.build(g, decay=None if "nodecay" in options else "gate", output_gate="gate" in options)
    if "long" in options and "decay_gate" in layer:
        layer.decay_gate = DecayGate(dims, layer.num_kv_heads, 256.0, 4096.0)
    return layer


class Block(nn.Module):
    def __init__(self, mixer: nn.Module, dims: int, hidden: int):
        super().__init__()
        self.mixer_norm, self.mlp_norm = nn.RMSNorm(dims), nn.RMSNorm(dims)
        self.mixer, self.mlp = mixer, SwiGLU(dims, hidden)

    def __call__(self, x, cache=None):
        x = x + self.mixer(self.mixer_norm(x), cache=cache)
        return x + self.mlp(self.mlp_norm(x))


def one_hot(x: mx.array, n: int) -> mx.array:
    return (x[..., None] == mx.arange(n)).astype(mx.float32)


class Model(nn.Module):
    """Tokens `[B, T]` or vectors `[B, T, F]` to `[B, T, outputs]`: blocks of a mixer and SwiGLU, pre-norm."""

    def __init__(
        self, arm: str, *, inputs: int, outputs: int, real: bool, layers: int, dims: int, head_dim: int
    ):
        super().__init__()
        self.real = real
        self.embed = nn.Linear(inputs, dims) if real else nn.Embedding(inputs, dims)
        names = ["window" if "window" in parse(arm)[1] and i % 2 == 0 else arm for i in range(layers)]
        self.layers = [Block(mixer(name, dims, head_dim), dims, 2 * dims) for name in names]
        self.norm, self.head = nn.RMSNorm(dims), nn.Linear(dims, outputs, bias=False)

    def __call__(self, x, cache=None):
        # Rows of the embedding by a product: its gradient needs no scatter.
        x = self.embed(x) if self.real else one_hot(x, self.embed.weight.shape[0]) @ self.embed.weight
        for i, layer in enumerate(self.layers):
            x = layer(x, None if cache is None else cache[i])
        return self.head(self.norm(x))


def sizes(model: Model, tokens: int = 256) -> dict[str, Any]:
    """Parameters, and bytes of what every layer carries after reading `tokens` tokens, from its own cache.

    state: the operator's memory, or the keys and values; carried: the whole cache, convolution included.
    """
    width = model.norm.weight.shape[0]
    out: dict[str, Any] = {"parameters": sum(x.size for _, x in _leaves(model)), "mixers": []}
    for layer in model.layers:
        cache = layer.mixer.make_cache()
        layer.mixer(mx.random.normal((1, tokens, width), key=mx.random.key(0)), cache=cache)
        conv = cache.conv.nbytes if getattr(cache, "conv", None) is not None else 0
        position = cache.offset.nbytes if isinstance(getattr(cache, "offset", None), mx.array) else 0
        out["mixers"].append(
            {
                "kind": getattr(layer.mixer, "operator", type(layer.mixer).__name__),
                "heads": layer.mixer.num_heads,
                "head_dim": layer.mixer.head_dim,
                "parameters": sum(x.size for _, x in _leaves(layer.mixer)),
                "state_bytes": cache.nbytes - conv - position,
                "carried_bytes": cache.nbytes,
            }
        )
    return out


def _leaves(module: nn.Module) -> list[tuple[str, mx.array]]:
    return tree_flatten(module.trainable_parameters())
