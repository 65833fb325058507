"""The configuration of a run: one YAML file, or the same as a mapping."""

from hybridengine.config.model import (
    Config,
    DataConfig,
    EvaluateConfig,
    LogConfig,
    ModelConfig,
    TrainConfig,
    split_entry,
)
from hybridengine.config.source import Source, apply_overrides, describe, load_config, read_source

__all__ = [
    "Config",
    "DataConfig",
    "EvaluateConfig",
    "LogConfig",
    "ModelConfig",
    "Source",
    "TrainConfig",
    "apply_overrides",
    "describe",
    "load_config",
    "read_source",
    "split_entry",
]
