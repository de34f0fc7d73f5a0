"""Fine-tuning: a folder of text to an adapter, on mlx-lm's LoRA and DoRA layers and in its file format.

Needs the extra `lm` (pip install 'mlx-hla[lm]'), which is imported when it is used.
"""

from mlx_hla.tune.adapters import fuse, load_adapted
from mlx_hla.tune.options import FinetuneConfig
from mlx_hla.tune.run import Finetuned, finetune, resume

__all__ = ["FinetuneConfig", "Finetuned", "finetune", "fuse", "load_adapted", "resume"]
