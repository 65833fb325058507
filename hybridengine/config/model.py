"""The configuration as typed data. Every default is here and nowhere else."""

from __future__ import annotations

import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from hybridengine.config.presets import expand

__all__ = [
    "Config",
    "DataConfig",
    "EvaluateConfig",
    "LogConfig",
    "ModelConfig",
    "Section",
    "TrainConfig",
    "split_entry",
]

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]


def _tenth_for_validation() -> dict[Literal["validation", "test"], float]:
    return {"validation": 0.1}


class Section(BaseModel):
    """Keys of a config: none but the named ones, numbers that are finite, and no truth value where a number stands."""

    model_config = ConfigDict(extra="forbid", validate_default=False, allow_inf_nan=False, arbitrary_types_allowed=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and info.field_name in cls.model_fields:
            kinds = _members(cls.model_fields[info.field_name].annotation)
            if kinds & {int, float} and bool not in kinds and Any not in kinds:
                raise ValueError("must be a number")
        return value


def _members(annotation: Any) -> set[Any]:
    """The types that a plain, annotated or united type allows."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _members(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return set().union(*map(_members, get_args(annotation)))
    return {annotation}


class ModelConfig(Section):
    """Which pretrained model to start from."""

    name: str = Field(min_length=1, description="folder or hub id of a pretrained transformers model")
    revision: str | None = Field(None, description="commit hash on the hub")
    tokenizer: str | None = Field(None, description="folder or hub id of the tokenizer; the model's own by default")
    attention: Literal["sdpa", "eager"] | None = Field(None, description="attention implementation")


class DataConfig(Section):
    """Where rows come from. Further keys belong to the data plugin named by `use` (`files` by default)."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    use: str = Field("files", description="data plugin")
    columns: dict[str, str] = Field(default_factory=dict, description="role to column name, e.g. {text: review}")
    labels: dict[str, str] = Field(default_factory=dict, description="raw label to label name, e.g. {'0': negative}")
    on_bad_row: Literal["error", "skip"] = Field("error", description="what a row that cannot be used does")
    carve: dict[Literal["validation", "test"], Annotated[float, Field(gt=0, lt=1)]] = Field(
        default_factory=_tenth_for_validation,
        description="share of training texts that makes up a missing split, by a stable hash",
    )
    limit: Positive | None = Field(None, description="use at most this many training rows, chosen by a stable hash")


class TrainConfig(Section):
    """How to train."""

    epochs: Annotated[float, Field(gt=0)] = Field(3.0, description="passes over the training rows")
    max_steps: Positive | None = Field(None, description="stop after this many optimizer steps; overrides epochs")
    batch_size: Positive = Field(32, description="rows per micro-batch")
    accumulate: Positive = Field(1, description="micro-batches per optimizer step")
    lr: Annotated[float, Field(gt=0)] = Field(5e-5, description="peak learning rate")
    seed: int = Field(0, ge=0, description="keys all randomness")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", description="number format of the forward pass")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto | cpu | cuda | cuda:N")
    clip: Annotated[float, Field(ge=0)] = Field(1.0, description="largest gradient norm; 0 switches clipping off")
    max_length: Positive = Field(256, description="tokens kept of each row")
    workers: Count = Field(0, description="threads that prepare batches ahead")
    compile: bool = Field(False, description="torch.compile the model")
    checkpointing: bool = Field(False, description="recompute activations in the backward pass to save memory")
    evaluate_every: Positive | None = Field(None, description="optimizer steps between evaluations; default: epoch end")
    save_every: Positive | None = Field(None, description="optimizer steps between checkpoints; default: epoch end")
    keep: Positive = Field(2, description="checkpoints kept")


class EvaluateConfig(Section):
    """How to evaluate."""

    metric: str | None = Field(None, description="metric that picks the best checkpoint; the task's own by default")
    batch_size: Positive = Field(64, description="rows per evaluation batch")
    resamples: Positive = Field(2000, description="bootstrap resamples of the 95% interval")
    test: bool = Field(True, description="evaluate the test split at the end, with the best weights")


class LogConfig(Section):
    """What is recorded while training."""

    every: Positive = Field(10, description="optimizer steps between lines of metrics.jsonl")
    to: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(default_factory=list, description="further loggers")


class Config(Section):
    """A whole run."""

    task: str | dict[str, dict[str, Any] | None] = Field(description="task name, or {name: {options}}")
    model: ModelConfig
    data: DataConfig
    train: TrainConfig = Field(default_factory=TrainConfig)
    methods: list[str | dict[str, dict[str, Any] | None]] = Field(
        default_factory=list, description="the stack: method names, or {name: {parameters}}; order does not matter"
    )
    preset: Literal["cheap", "few-shot", "low-resource", "robust"] | None = Field(
        None, description="named stack whose methods are added to `methods`, where they stand from then on"
    )
    output: str = Field("runs/run", min_length=1, description="folder of the run")
    resume: str = Field("auto", description="auto | never | path of a checkpoint")
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    log: LogConfig = Field(default_factory=LogConfig)
    stages: list[dict[str, Any]] = Field(
        default_factory=list, description="partial configs run in sequence, each from the last one's best model"
    )

    objects: list[dict[str, dict[str, Any]]] = Field(
        default_factory=list, description="method objects that Python gave, by name; recorded by the engine"
    )

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, values: Any) -> Any:
        return expand(values) if isinstance(values, dict) else values

    @field_validator("preset")
    @classmethod
    def _expanded(cls, value: str | None) -> None:
        """A recorded config lists the methods themselves: a later version may have another preset of the name."""

    @field_validator("methods", mode="before")
    @classmethod
    def _no_objects(cls, value: Any) -> Any:
        for entry in value if isinstance(value, list) else []:
            if not isinstance(entry, str | int | float | dict | list | None):
                raise ValueError(f"{type(entry).__name__} is an object; pass it as Engine(config, methods=[...])")
        return value

    @field_validator("methods", "task")
    @classmethod
    def _one_name_each(cls, value: Any) -> Any:
        for entry in value if isinstance(value, list) else [value]:
            if isinstance(entry, dict) and len(entry) != 1:
                raise ValueError(f"write one name per entry, e.g. '- lora: {{r: 8}}'; this entry has {sorted(entry)}")
        return value

    @property
    def task_entry(self) -> tuple[str, dict[str, Any]]:
        """Task name and options."""
        return split_entry(self.task)

    @property
    def method_entries(self) -> list[tuple[str, dict[str, Any]]]:
        """Method names and parameters, as written."""
        return [split_entry(entry) for entry in self.methods]


def split_entry(entry: str | dict[str, dict[str, Any] | None]) -> tuple[str, dict[str, Any]]:
    """`"fgm"` and `{"fgm": {"epsilon": 1}}` as (name, parameters)."""
    if isinstance(entry, str):
        return entry, {}
    name, options = next(iter(entry.items()))
    return name, dict(options or {})
