"""The text of a new config: what was chosen, and every other key as a comment with its default and meaning."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from hybridengine.config import Config, DataConfig, EvaluateConfig, LogConfig, ModelConfig, TrainConfig

__all__ = ["config_text"]

_ABSENT = {
    "validation": "where left out, `carve` takes it from the training rows",
    "test": "where left out, nothing is tested, unless `carve` names it",
}
_SHOWN = ("epochs", "batch_size", "lr", "seed")


def config_text(
    task: str, model: str, splits: Mapping[str, str | None], methods: Sequence[str], output: str, path: str
) -> str:
    """YAML with comments made from the descriptions of the config's own fields, so that they cannot drift apart."""
    stack = ", ".join(map(_scalar, methods))
    parts = [
        f"# Check it with `hybridengine validate {path}`, see its cost with `plan`, run it with `train`.",
        f"task: {_scalar(task)}  # plugins with kind `task`: hybridengine plugins list",
        _section("model", ModelConfig, {"name": model}),
        _data(splits),
        _section("train", TrainConfig, {name: TrainConfig.model_fields[name].default for name in _SHOWN}),
        f"methods: [{stack}]  # {Config.model_fields['methods'].description}\n"
        "# e.g. [{lora: {r: 8}}, fgm]; empty: all parameters are tuned; hybridengine plugins info NAME explains one",
        f"output: {_scalar(output)}  # {Config.model_fields['output'].description}",
        f"# resume: auto  # {Config.model_fields['resume'].description}",
        _section("evaluate", EvaluateConfig, {}),
        _section("log", LogConfig, {}),
    ]
    return "\n".join(parts) + "\n"


def _data(splits: Mapping[str, str | None]) -> str:
    lines = ["data:"]
    for name, value in splits.items():
        if value:
            lines.append(f"  {name}: {_scalar(value)}")
        else:
            lines.append(f"  # {name}: {name}.jsonl  # {_ABSENT[name]}")
    return "\n".join([*lines, *_fields(DataConfig, {})])


def _section(name: str, model: type[BaseModel], chosen: Mapping[str, Any]) -> str:
    head = f"{name}:" if chosen else f"# {name}:"
    return "\n".join([head, *_fields(model, chosen)])


def _fields(model: type[BaseModel], chosen: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, field in model.model_fields.items():
        mark = "" if name in chosen else "# "
        value = chosen.get(name, _default(field))
        lines.append(f"  {mark}{name}: {_scalar(value)}  # {field.description}")
    return lines


def _default(field: FieldInfo) -> Any:
    return field.get_default(call_default_factory=True)


def _scalar(value: Any) -> str:
    """A value as YAML on one line: JSON is YAML, and plain words need no quotes."""
    if isinstance(value, str) and _is_plain(value):
        return value
    if isinstance(value, float):
        return _number(value)
    return json.dumps(value, ensure_ascii=False)


def _number(value: float) -> str:
    text = repr(value)
    mantissa, letter, exponent = text.partition("e")
    # YAML 1.1 reads 5e-05 as a string: a float needs a dot.
    return text if not letter or "." in mantissa else f"{mantissa}.0e{exponent}"


def _is_plain(value: str) -> bool:
    import yaml

    if "\n" in value or "#" in value or ": " in value or value[:1] in "-?:,[]{}&*!|>'\"%@`":
        return False
    return bool(yaml.safe_load(value) == value)
