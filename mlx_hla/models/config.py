"""What a language model is made of, checked before anything is allocated."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from mlx_hla.errors import InputError
from mlx_hla.ops.operator import MAX_ORDER, OPERATORS, choices
from mlx_hla.settings import check_types, from_dict, option, read_json

# The mixers that a config may name: two of softmax attention, and the operators.
MIXERS = ("softmax", "window", *choices())
# Largest value of each size, and of their products: a config is read from files that nobody vouches for.
LIMITS = {
    "vocab_size": 1 << 20,
    "dims": 1 << 15,
    "num_layers": 512,
    "num_heads": 512,
    "num_kv_heads": 512,
    "head_dim": 512,
    "hidden_dims": 1 << 18,
    "window": 1 << 20,
    "conv_size": 64,
    "context": 1 << 24,
}
MAX_PARAMETERS = 10**10


def learns(mixer: str | int) -> bool:
    """Whether the mixer is an operator with a coefficient that a layer can learn."""
    operator = OPERATORS.get(str(mixer))
    return operator is not None and any(o.learned for o in operator.options)


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of pre-norm blocks, mixer and SwiGLU, with tied embeddings.

    `layers` is a pattern of mixers, cycled over depth: with ("window", "readout") blocks 0, 2, 4, ... have a
    window. `coefficients`, `decay`, `output_norm` and `normalize` are for the HLA operators only. Softmax and
    windows have rotary positions, `rope_theta` 10000 unless given, the operators only if given.
    """

    vocab_size: int = option(4096, "tokens of the vocabulary")
    dims: int = option(256, "width of the residual stream")
    num_layers: int = option(6, "blocks")
    num_heads: int = option(4, "query heads")
    num_kv_heads: int | None = option(None, "key-value heads; none: as many as query heads")
    head_dim: int | None = option(None, "width of a head; none: dims / num_heads")
    hidden_dims: int = option(704, "width inside SwiGLU")
    operator: str | int = option("hla2", f"mixer of every block: {', '.join(MIXERS)}, or an order from 1")
    layers: tuple[str, ...] | None = option(
        None, "mixers by depth, cycled, as window,readout; none: the operator in every block"
    )
    window: int = option(128, "tokens that a window sees")
    conv_size: int = option(4, "width of the short convolution on q, k and v; 0: none")
    rope_theta: float | None = option(None, "base of rotary positions; none: without (softmax: 10000)")
    coefficients: str | None = option(
        None, "of mixed and readout: learned (per token and head), or none: the operator's own"
    )
    decay: str | None = option("gate", "gate (learned, per token and head), fixed (per head) or none")
    qk_norm: str | None = option("rms", "normalisation of q and k: rms, l2 or none")
    output_norm: bool = option(True, "normalise each head's output")
    output_gate: bool = option(False, "multiply the output by a projection of the input")
    normalize: bool = option(False, "divide by the operator's normaliser")
    norm_eps: float = option(1e-5, "epsilon of the blocks' norms")
    context: int = option(1024, "tokens in a training sequence")

    def __post_init__(self):
        check_types(self)
        for name, most in LIMITS.items():
            value = getattr(self, name)
            least = 0 if name == "conv_size" else 1
            if value is not None and not least <= value <= most:
                raise InputError(f"{name} must be from {least} to {most}, got {value}")
        for field, names in {"operator": (self.operator,), "layers": self.layers or ()}.items():
            for name in names:
                if isinstance(name, str) and name not in MIXERS:
                    order = " or an order" if field == "operator" else ""
                    raise InputError(f"{field} must be of {', '.join(MIXERS)}{order}, got {repr(name)[:60]}")
        if self.layers is not None and not 1 <= len(self.layers) <= self.num_layers:
            raise InputError(
                f"layers must name 1 to num_layers={self.num_layers} mixers, got {len(self.layers)}"
            )
        if isinstance(self.operator, int) and not 1 <= self.operator <= MAX_ORDER:
            raise InputError(f"an operator's order must be from 1 to {MAX_ORDER}, got {self.operator}")
        if self.coefficients not in (None, "learned"):
            raise InputError(f"coefficients must be learned or none, got {repr(self.coefficients)[:60]}")
        if self.coefficients and not any(map(learns, self.mixers)):
            raise InputError(f"coefficients are learned of mixed and readout, not of {self.mixer_name}")
        for name, allowed in {"decay": ("gate", "fixed", None), "qk_norm": ("rms", "l2", None)}.items():
            value = getattr(self, name)
            if value not in allowed:
                raise InputError(f"{name} must be {', '.join(map(str, allowed))}, got {repr(value)[:60]}")
        if self.looks_back and self.qk_norm == "l2":
            raise InputError("softmax and window take qk_norm rms or None, got l2")
        if self.conv_size == 1:
            raise InputError("conv_size must be 0 (none) or at least 2, got 1")
        if self.head_dim is None and self.dims % self.num_heads:
            raise InputError(f"dims {self.dims} is no multiple of num_heads {self.num_heads}; set head_dim")
        if self.num_heads % self.kv_heads:
            raise InputError(f"num_kv_heads {self.kv_heads} does not divide num_heads {self.num_heads}")
        if self.rotates and self.key_dim % 2:
            raise InputError(f"rotary positions (rope_theta) need an even head_dim, got {self.key_dim}")
        if self.rope_theta is not None and not 1 <= self.rope_theta <= 1e12:
            raise InputError(f"rope_theta must be from 1 to 1e12, got {self.rope_theta}")
        if not 0 < self.norm_eps <= 0.1:
            raise InputError(f"norm_eps must be above 0 and at most 0.1, got {self.norm_eps}")
        if self.matrix_parameters > MAX_PARAMETERS:
            raise InputError(f"about {self.matrix_parameters:.1e} parameters, more than {MAX_PARAMETERS:.0e}")

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def key_dim(self) -> int:
        return self.head_dim or self.dims // self.num_heads

    @property
    def mixers(self) -> tuple[str | int, ...]:
        """The mixer of each block."""
        pattern = self.layers or (self.operator,)
        return tuple(pattern[i % len(pattern)] for i in range(self.num_layers))

    @property
    def mixer_name(self) -> str:
        """The mixers in a word or two."""
        return "+".join(map(str, self.layers or (self.operator,)))

    @property
    def looks_back(self) -> bool:
        """Whether a mixer is softmax attention, over all that was read or a window of it."""
        return not {"softmax", "window"}.isdisjoint(self.mixers)

    @property
    def constant_state(self) -> bool:
        """Whether the state has a size that does not grow with what is read."""
        return "softmax" not in self.mixers

    @property
    def rotates(self) -> bool:
        return self.looks_back or self.rope_theta is not None

    @property
    def matrix_parameters(self) -> int:
        """Parameters in matrices: all but gates, convolutions and norms, which are under 2% of a model."""
        mixer = self.dims * self.key_dim * (2 + self.output_gate) * self.num_heads
        mixer += self.dims * self.key_dim * 2 * self.kv_heads
        return self.vocab_size * self.dims + self.num_layers * (mixer + 3 * self.dims * self.hidden_dims)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_dict(cls, values: object, name: str = "config") -> ModelConfig:
        return from_dict(cls, values, name)

    @classmethod
    def load(cls, path: str | Path) -> ModelConfig:
        return cls.from_dict(read_json(path), str(path))
