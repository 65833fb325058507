"""Hyper-parameters of a plugin: a dataclass's fields, validated by pydantic."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError, create_model

from hybridengine.config import Section, Source, describe
from hybridengine.errors import HybridEngineError, PluginError

__all__ = ["create", "json_schema", "parameter_model", "parameter_rows"]


def parameter_model(name: str, cls: type) -> type[BaseModel]:
    """A pydantic model of the dataclass's init fields, unknown keys forbidden."""
    if not dataclasses.is_dataclass(cls):
        raise PluginError(f"plugin {name!r}: {cls!r} is not a dataclass; decorate it with @dataclass(eq=False)")
    try:
        hints = typing.get_type_hints(cls, include_extras=True)
    except Exception as error:  # whatever evaluating a foreign annotation raises
        raise PluginError(f"plugin {name!r}: the types of its fields cannot be read ({error})") from error
    fields: dict[str, Any] = {}
    for item in _parameters(cls):
        constraints = item.metadata.get("constraints", {})
        info: dict[str, Any] = {"description": item.metadata.get("help", "")}
        if item.default is not dataclasses.MISSING:
            info["default"] = item.default
        elif item.default_factory is not dataclasses.MISSING:
            info["default_factory"] = item.default_factory
        annotation = Annotated[hints[item.name], Field(**constraints)] if constraints else hints[item.name]
        fields[item.name] = (annotation, Field(**info))
    return create_model(name, __base__=Section, **fields)


def _parameters(cls: Any) -> list[dataclasses.Field[Any]]:
    """The init fields, those that a base keeps for keywords (options of a family) after the method's own."""
    return sorted((item for item in dataclasses.fields(cls) if item.init), key=lambda item: bool(item.kw_only))


def create(
    name: str, cls: type, parameters: Mapping[str, Any], source: Source, location: tuple[str | int, ...]
) -> tuple[Any | None, list[str]]:
    """Build the plugin object, or None and every problem with its file and line."""
    model = parameter_model(name, cls)
    try:
        values = model.model_validate(dict(parameters))
    except ValidationError as error:
        return None, describe(error, model, source, location)
    try:
        return cls(**{key: getattr(values, key) for key in type(values).model_fields}), []
    except (TypeError, ValueError) as error:
        return None, [f"{source.where(location)}: {name}: {error}"]
    except HybridEngineError:
        raise
    except Exception as error:
        raise PluginError(f"plugin {name!r} cannot be made: {type(error).__name__}: {error}") from error


def json_schema(name: str, cls: type) -> dict[str, Any]:
    """JSON Schema of the plugin's parameters."""
    return parameter_model(name, cls).model_json_schema()


def parameter_rows(cls: type) -> list[dict[str, str]]:
    """Name, type, default, range and help of each parameter, for `plugins info`."""
    rows = []
    for item in _parameters(cls):
        default = "required"
        if item.default is not dataclasses.MISSING:
            default = repr(item.default)
        elif item.default_factory is not dataclasses.MISSING:
            default = repr(item.default_factory())
        constraints = item.metadata.get("constraints", {})
        symbols = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
        limits = ", ".join(f"{symbols.get(key, key + ' ')}{value}" for key, value in constraints.items())
        kind = item.type if isinstance(item.type, str) else getattr(item.type, "__name__", str(item.type))
        help_text = item.metadata.get("help", "")
        rows.append({"name": item.name, "type": kind, "default": default, "range": limits, "help": help_text})
    return rows
