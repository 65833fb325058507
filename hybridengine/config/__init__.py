"""The configuration of a run: one YAML file, or the same as a mapping."""

from hybridengine.config.model import (
    Config,
    DataConfig,
    EvaluateConfig,
    LogConfig,
    ModelConfig,
    Section,
    TrainConfig,
    split_entry,
)
from hybridengine.config.presets import PRESETS
from hybridengine.config.source import Source, apply_overrides, check_config, describe, load_config, read_source

__all__ = [
    "PRESETS",
    "Config",
    "DataConfig",
    "EvaluateConfig",
    "LogConfig",
    "ModelConfig",
    "Section",
    "Source",
    "TrainConfig",
    "apply_overrides",
    "check_config",
    "describe",
    "load_config",
    "read_source",
    "split_entry",
]
