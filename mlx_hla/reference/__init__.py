"""Ground truth in NumPy float64.

The paper's algorithms as printed, dense definitions, serial recurrences and exact gradients.
Nothing here imports MLX or shares code with the operators that it judges.
"""

from .dense import (
    decay_matrix,
    dense_ahla,
    dense_hla,
    dense_hla2,
    dense_hla3,
    dense_linear_attention,
)
from .gradients import (
    la_forward,
    la_vjp,
    numerical_gradient,
    vjp_ahla,
    vjp_hla,
    vjp_hla2,
    vjp_hla3,
    vjp_linear_attention,
)
from .mixtures import (
    dense_mixed,
    dense_readout,
    serial_mixed,
    serial_readout,
    vjp_mixed,
    vjp_readout,
)
from .serial import serial_ahla, serial_hla, serial_hla2, serial_hla3, serial_linear_attention
from .states import (
    AHLAState,
    HLA2State,
    HLA2UnmaskedState,
    HLA3PaperState,
    HLA3State,
    HLA3UnmaskedState,
    HLAState,
    LinearState,
    MixedState,
    ReadoutState,
)

__all__ = [
    "AHLAState",
    "HLA2State",
    "HLA2UnmaskedState",
    "HLA3PaperState",
    "HLA3State",
    "HLA3UnmaskedState",
    "HLAState",
    "LinearState",
    "MixedState",
    "ReadoutState",
    "decay_matrix",
    "dense_ahla",
    "dense_hla",
    "dense_hla2",
    "dense_hla3",
    "dense_linear_attention",
    "dense_mixed",
    "dense_readout",
    "la_forward",
    "la_vjp",
    "numerical_gradient",
    "serial_ahla",
    "serial_hla",
    "serial_hla2",
    "serial_hla3",
    "serial_linear_attention",
    "serial_mixed",
    "serial_readout",
    "vjp_ahla",
    "vjp_hla",
    "vjp_hla2",
    "vjp_hla3",
    "vjp_linear_attention",
    "vjp_mixed",
    "vjp_readout",
]
