"""Gates per token and head: the decay of the memories, learned or fixed, and steps of learned length.

A memory of M tokens means g = exp(-1/M): what a token left fades to 1/e in M tokens. Heads start, or stay, at
memories spread evenly in log M, so that some follow the last words and some the page.
"""

# B batch, T time, H key-value heads

import math

import mlx.core as mx
import mlx.nn as nn

from mlx_hla.settings import check_number, check_whole

from .inputs import check_input

SHORTEST_MEMORY = 8.0
LONGEST_MEMORY = 512.0


def spread_memories(
    heads: int, shortest: float = SHORTEST_MEMORY, longest: float = LONGEST_MEMORY
) -> list[float]:
    """`heads` memory lengths in tokens, evenly spaced in log; one head gets the geometric mean."""
    check_whole("[spread_memories] heads", heads, 1)
    for name, value in {"shortest": shortest, "longest": longest}.items():
        check_number(f"[spread_memories] {name}", value)
    if not 0 < shortest <= longest:
        raise ValueError(
            f"[spread_memories] need 0 < shortest <= longest, got shortest={shortest}, longest={longest}"
        )
    if heads == 1:
        return [math.sqrt(shortest * longest)]
    ratio = math.log(longest / shortest) / (heads - 1)
    return [shortest * math.exp(ratio * h) for h in range(heads)]


def fixed_decay(heads: int, shortest: float = SHORTEST_MEMORY, longest: float = LONGEST_MEMORY) -> mx.array:
    """Constant decay per head, float32 [H]: g = exp(-1/M)."""
    return mx.array([math.exp(-1.0 / m) for m in spread_memories(heads, shortest, longest)])


class DecayGate(nn.Module):
    """One decay per token and head, g = exp(-softplus(w·x + b)) in (0, 1), always computed in float32.

    The bias starts at softplus(b) = 1/M with M spread from `shortest` to `longest` tokens; the weight starts
    at zero, so these are the memories of the first step whatever the input. Not an `nn.Linear`, on purpose:
    the long memories live in the last digits below g = 1, and quantising these few rows would save nothing.
    """

    def __init__(
        self, dims: int, heads: int, shortest: float = SHORTEST_MEMORY, longest: float = LONGEST_MEMORY
    ):
        super().__init__()
        check_whole("[DecayGate] dims", dims, 1)
        check_whole("[DecayGate] heads", heads, 1)
        self.weight = mx.zeros((heads, dims))
        # softplus(b) = 1/M  <=>  b = log(exp(1/M) - 1)
        self.bias = mx.array(
            [math.log(math.expm1(1.0 / m)) for m in spread_memories(heads, shortest, longest)]
        )

    def _extra_repr(self):
        return f"{self.weight.shape[1]}, heads={self.weight.shape[0]}"

    def __call__(self, x: mx.array) -> mx.array:
        """x [B, T, dims] to decay [B, T, H], float32."""
        logits = _logits(self, x)
        # exp(-softplus(z)) = 1 / (1 + e^z): the sigmoid has no overflow and no 0 * inf in its gradient.
        return mx.sigmoid(-logits)


class StepGate(nn.Module):
    """A step per token and query head, 2 σ(w·x + b) in (0, 2), in float32; it starts at 1 whatever the input.

    A step of 2 / λ is the longest that gradient descent on a quadratic form may take whose largest
    eigenvalue is λ; the operators' own coefficients, which it multiplies, are made for λ at most 1.
    """

    def __init__(self, dims: int, heads: int):
        super().__init__()
        check_whole("[StepGate] dims", dims, 1)
        check_whole("[StepGate] heads", heads, 1)
        self.weight = mx.zeros((heads, dims))
        self.bias = mx.zeros((heads,))

    def _extra_repr(self):
        return f"{self.weight.shape[1]}, heads={self.weight.shape[0]}"

    def __call__(self, x: mx.array) -> mx.array:
        """x [B, T, dims] to steps [B, T, H], float32."""
        return 2 * mx.sigmoid(_logits(self, x))


def _logits(gate: nn.Module, x: mx.array) -> mx.array:
    check_input(type(gate).__name__, x, gate.weight.shape[1])
    return x.astype(mx.float32) @ gate.weight.astype(mx.float32).T + gate.bias.astype(mx.float32)
