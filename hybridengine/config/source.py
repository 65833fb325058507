"""YAML with line numbers, dotted overrides, and errors that say where."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from hybridengine.config.model import Config
from hybridengine.errors import ConfigError, did_you_mean

__all__ = ["Source", "apply_overrides", "describe", "load_config", "read_source"]

Path_ = tuple[str | int, ...]


@dataclass
class Source:
    """Raw configuration values and where each stands."""

    values: dict[str, Any]
    name: str = "config"
    lines: dict[Path_, int] = field(default_factory=dict)

    def where(self, location: Path_) -> str:
        """`file:line` of the deepest known part of `location`."""
        for length in range(len(location), -1, -1):
            if location[:length] in self.lines:
                return f"{self.name}:{self.lines[location[:length]]}"
        return self.name


def read_source(config: str | Path | Mapping[str, Any]) -> Source:
    """Read a YAML file, or take a mapping as it is.

    Raises:
        ConfigError: missing or unreadable file, bad YAML, or a duplicate key, with its line.
    """
    if isinstance(config, Mapping):
        return Source(copy.deepcopy(dict(config)))
    path = Path(config)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); pass the path of a YAML config") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error})") from None
    source = Source({}, str(path))
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}: expected a mapping with keys such as task, model, data")
    source.values = _construct(node, (), source)
    return source


def _construct(node: yaml.Node, location: Path_, source: Source) -> Any:
    source.lines.setdefault(location, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        out: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            source.lines[(*location, key)] = key_node.start_mark.line + 1
            if key in out:
                raise ConfigError(f"{source.where((*location, key))}: key {key!r} appears twice; keep one")
            out[key] = _construct(value_node, (*location, key), source)
        return out
    if isinstance(node, yaml.SequenceNode):
        return [_construct(item, (*location, index), source) for index, item in enumerate(node.value)]
    return yaml.SafeLoader("").construct_object(node, deep=True)


def apply_overrides(source: Source, overrides: Sequence[str]) -> None:
    """Apply `train.lr=1e-5` style overrides in place; values are YAML."""
    for override in overrides:
        path, equals, text = override.partition("=")
        keys = path.split(".")
        if not equals or not all(keys):
            raise ConfigError(f"override {override!r}: write it as key.subkey=value, e.g. train.lr=1e-5")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"override {override!r}: the value is not valid YAML") from None
        target = source.values
        for key in keys[:-1]:
            step = target.setdefault(key, {})
            if not isinstance(step, dict):
                raise ConfigError(f"override {override!r}: {key!r} is not a section")
            target = step
        target[keys[-1]] = value


def load_config(
    config: str | Path | Mapping[str, Any] | Config, overrides: Sequence[str] = ()
) -> tuple[Config, Source]:
    """Validate a config; every problem is reported at once.

    Raises:
        ConfigError: with one line per problem, each naming file and line, and the nearest valid name.
    """
    if isinstance(config, Config):
        config = config.model_dump()
    source = read_source(config)
    apply_overrides(source, overrides)
    try:
        return Config.model_validate(source.values), source
    except ValidationError as error:
        raise ConfigError(describe(error, Config, source)) from None


def describe(error: ValidationError, model: type[BaseModel], source: Source, prefix: Path_ = ()) -> list[str]:
    """One line per problem of a pydantic error, for a value that stands at `prefix` of the source."""
    lines: dict[str, None] = {}
    for problem in error.errors():
        location = tuple(part for part in problem["loc"])
        shown = ".".join(map(str, _written(location, source, prefix)))
        where = source.where(prefix + location)
        if problem["type"] == "extra_forbidden":
            known = _fields_at(model, location[:-1])
            lines[f"{where}: unknown key {shown!r}.{did_you_mean(str(location[-1]), known)}"] = None
        elif problem["type"] == "missing":
            lines[f"{where}: missing key {shown!r}: {_field_help(model, location)}"] = None
        else:
            got = "" if isinstance(problem["input"], dict | list) else f", got {problem['input']!r}"
            message = problem["msg"].removeprefix("Value error, ")
            lines[f"{where}: {shown}: {message}{got}"] = None
    return list(lines)


def _written(location: Path_, source: Source, prefix: Path_) -> Path_:
    """The location without the parts that pydantic adds for members of a union."""
    value: Any = source.values
    for part in prefix:
        value = value[part]
    kept: list[str | int] = list(prefix)
    for index, part in enumerate(location):
        last = index == len(location) - 1
        if isinstance(value, Mapping):
            inside = part in value
            if inside or (last and isinstance(part, str) and "[" not in part and part not in {"str", "dict"}):
                kept.append(part)
                value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            kept.append(part)
            value = value[part]
    return tuple(kept)


def _fields_at(model: type[BaseModel], location: Path_) -> list[str]:
    current: Any = model
    for part in location:
        info = getattr(current, "model_fields", {}).get(part)
        current = info.annotation if info is not None else None
    return sorted(getattr(current, "model_fields", {}))


def _field_help(model: type[BaseModel], location: Path_) -> str:
    current: Any = model
    text = ""
    for part in location:
        info = getattr(current, "model_fields", {}).get(part)
        if info is None:
            return "required"
        current, text = info.annotation, info.description or ""
    return text or f"a section with {', '.join(sorted(getattr(current, 'model_fields', {})))}"
