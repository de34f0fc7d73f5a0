"""The language model, its configuration and files."""

from mlx_hla.models.config import ModelConfig
from mlx_hla.models.io import PRETRAINED, load, save
from mlx_hla.models.lm import LanguageModel

__all__ = ["PRETRAINED", "LanguageModel", "ModelConfig", "load", "save"]
