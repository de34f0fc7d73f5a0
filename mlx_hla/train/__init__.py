"""Training: settings and presets, the step, checkpoints, the loop."""

from mlx_hla.train.loop import Result, resume, train
from mlx_hla.train.presets import PRESETS, Preset, TrainConfig, preset

__all__ = ["PRESETS", "Preset", "Result", "TrainConfig", "preset", "resume", "train"]
