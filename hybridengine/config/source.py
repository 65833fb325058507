"""YAML with line numbers, dotted overrides, and errors that say where."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from hybridengine.config.model import Config
from hybridengine.errors import ConfigError, HybridEngineError, did_you_mean

__all__ = ["Source", "apply_overrides", "check_config", "describe", "load_config", "read_source"]

Path_ = tuple[str | int, ...]

_MOST_VALUES = 50_000  # a few aliases of aliases stand for millions
_DEEPEST = 50
_KEY = re.compile(r"([a-z_]+(?:\.[\w-]+)*)(?=[: ])")


@dataclass
class Source:
    """Raw configuration values and where each stands."""

    values: dict[str, Any]
    name: str = "config"
    lines: dict[Path_, int] = field(default_factory=dict)
    overrides: dict[Path_, str] = field(default_factory=dict)

    def where(self, location: Path_) -> str:
        """`file:line` of the deepest known part of `location`, or the override that set it."""
        inside = (text for path, text in self.overrides.items() if path[: len(location)] == location)
        if location not in self.lines and (text := next(inside, "")):
            return f"override {text!r}"
        for length in range(len(location), -1, -1):
            if location[:length] in self.overrides:
                return f"override {self.overrides[location[:length]]!r}"
            if location[:length] in self.lines:
                return f"{self.name}:{self.lines[location[:length]]}"
        return self.name

    def locate(self, error: HybridEngineError) -> None:
        """Put `file:line` in front of every line of an error that begins with a key of this configuration."""
        lines = [self._located(line) for line in str(error).split("\n")]
        error.args = ("\n".join(lines),)
        if isinstance(error, ConfigError):
            error.problems = tuple(map(self._located, error.problems))

    def part(self, location: Path_, values: dict[str, Any]) -> Source:
        """A source of `values`: keys stand where those below `location` do, all others where they do here."""
        depth = len(location)
        whole: list[dict[Path_, Any]] = []
        for known in (self.lines, self.overrides):
            own = {path[depth:]: line for path, line in known.items() if path[:depth] == location}
            whole.append({**known, **own})
        return Source(values, self.name, *whole)

    def _located(self, text: str) -> str:
        found = _KEY.match(text)
        location = tuple(found[1].split(".")) if found else ()
        known = location in self.lines or location in self.overrides
        return f"{self.where(location)}: {text}" if found and known else text

    def set(self, location: Path_, value: Any, override: str) -> None:
        """Note that an override replaced what stood at `location`; values of the file below it have no line now."""
        for known in (self.lines, self.overrides):
            for path in [path for path in known if path[: len(location)] == location]:
                del known[path]
        self.overrides[location] = override


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
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        hint = "; indent with spaces, not tabs" if "'\\t'" in problem else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {problem}{hint}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply for a config") from None
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(
            f"{path}: expected a mapping with keys such as task, model, data; `hybridengine init` writes an example"
        )
    source.values = _construct(node, (), source)
    return source


def _construct(node: yaml.Node, location: Path_, source: Source) -> Any:
    source.lines.setdefault(location, node.start_mark.line + 1)
    if len(source.lines) > _MOST_VALUES or len(location) > _DEEPEST:
        raise ConfigError(
            f"{source.where(location)}: too many or too deeply nested values; do aliases repeat each other?"
        )
    if isinstance(node, yaml.MappingNode):
        out: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{source.name}:{key_node.start_mark.line + 1}: a key must be a plain word")
            key = str(key_node.value)
            source.lines[(*location, key)] = key_node.start_mark.line + 1
            if key in out:
                raise ConfigError(f"{source.where((*location, key))}: key {key!r} appears twice; keep one")
            out[key] = _construct(value_node, (*location, key), source)
        return out
    if isinstance(node, yaml.SequenceNode):
        return [_construct(item, (*location, index), source) for index, item in enumerate(node.value)]
    try:
        return yaml.SafeLoader("").construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        why = getattr(error, "problem", None) or error
        raise ConfigError(
            f"{source.where(location)}: {node.value!r} cannot be read ({why}); put text in quotes"
        ) from None


def apply_overrides(source: Source, overrides: Sequence[str]) -> None:
    """Apply `train.lr=1e-5` style overrides in place; values are YAML."""
    for override in overrides:
        path, equals, text = override.partition("=")
        keys = path.split(".")
        if not equals or not all(keys):
            raise ConfigError(f"override {override!r}: write it as key.subkey=value, e.g. train.lr=1e-5")
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except (yaml.YAMLError, RecursionError):
            raise ConfigError(f"override {override!r}: the value is not valid YAML") from None
        value = None if node is None else _construct(node, (), Source({}, f"override {override!r}"))
        target = source.values
        for key in keys[:-1]:
            step = target.setdefault(key, {})
            if not isinstance(step, dict):
                raise ConfigError(f"override {override!r}: {key!r} is not a section")
            target = step
        target[keys[-1]] = value
        source.set(tuple(keys), value, override)


def load_config(
    config: str | Path | Mapping[str, Any] | Config,
    overrides: Sequence[str] = (),
    also: Callable[[Source], list[str]] | None = None,
) -> tuple[Config, Source]:
    """Validate a config; every problem is reported at once.

    Args:
        config: path of a YAML file, a mapping, or a config.
        overrides: as `apply_overrides` takes them.
        also: finds further problems in a config that is refused, to tell them in the same error.

    Raises:
        ConfigError: with one line per problem, each naming file and line, and the nearest valid name.
    """
    if isinstance(config, Config):
        config = config.model_dump()
    source = read_source(config)
    apply_overrides(source, overrides)
    return check_config(source, also), source


def check_config(source: Source, also: Callable[[Source], list[str]] | None = None) -> Config:
    """The typed config that a source holds; see `load_config`."""
    try:
        return Config.model_validate(source.values)
    except ValidationError as error:
        problems = describe(error, Config, source)
        raise ConfigError([*problems, *(also(source) if also else [])]) from None


def describe(error: ValidationError, model: type[BaseModel], source: Source, prefix: Path_ = ()) -> list[str]:
    """One line per problem of a pydantic error, for a value that stands at `prefix` of the source."""
    lines: dict[str, None] = {}
    problems = error.errors()
    for problem in problems:
        location = tuple(part for part in problem["loc"])
        if location[-1:] == ("str",) and any(
            other is not problem and other["loc"][: len(location) - 1] == location[:-1] for other in problems
        ):
            continue  # the value is no string, but the other member of the union says what is wrong with it
        shown = ".".join(map(str, _written(location, source, prefix)))
        where = source.where(prefix + location)
        if problem["type"] == "extra_forbidden":
            known = _fields_at(model, location[:-1])
            inside = [f"{part}.{shown}" for part in known if shown in _fields_at(model, (*location[:-1], part))]
            hint = f" Did you mean {inside[0]!r}?" if inside else did_you_mean(str(location[-1]), known)
            lines[f"{where}: unknown key {shown!r}.{hint}"] = None
        elif problem["type"] == "missing":
            lines[f"{where}: missing key {shown!r}: {_field_help(model, location)}"] = None
        else:
            lines[f"{where}: {shown}: {_told(problem, model, location)}"] = None
    return list(lines)


def _told(problem: Any, model: type[BaseModel], location: Path_) -> str:
    """What was expected, in the words of a config file."""
    value = problem["input"]
    got = "it is empty" if value is None else f"got {_short(value)}"
    if problem["type"] in ("model_type", "dict_type"):
        union = str(location[-1]).startswith("dict[")
        kind = "a name, or {name: {parameters}}" if union else "a section of keys"
        keys = _fields_at(model, location)
        return f"must be {kind}{', such as ' + ', '.join(keys) if keys else ''}; {got}"
    if problem["type"] == "list_type":
        return f"must be a list such as [a, b]; {got}"
    if problem["type"] == "string_pattern_mismatch":
        return f"must be {_field_help(model, location)}, {got}"
    message = problem["msg"].removeprefix("Value error, ")
    for said in ("Input should be ", "String should "):
        if message.startswith(said):
            message = ("must be " if said.startswith("Input") else "must ") + message.removeprefix(said)
    return message if isinstance(value, dict | list) else f"{message}, {got}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


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
        elif isinstance(value, str) and part not in {"str", "dict"} and "[" not in str(part):
            kept += [value, part]  # a plugin that is named without parameters
            value = None
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
