"""The JSON Schema of a config: the engine's own keys, joined with the parameters of the plugins."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

__all__ = ["config_schema"]

Schema = dict[str, Any]

_ENGINE_KEYS: Schema = {
    "order": {"type": "integer", "description": "place inside its seams, inner methods first"},
    "check_effect": {"type": "boolean", "description": "false: do not stop the run when the method has no effect"},
}
_ELSEWHERE = {"type": "string", "pattern": "^[^:]+:[^:]+$", "description": "distribution:name"}


def config_schema(plugins: Iterable[tuple[str, str, Schema]]) -> Schema:
    """Join the schema of `Config` with those of the plugins.

    Args:
        plugins: name, kind (`method`, `task` or `data`) and parameter schema of each.
    """
    from hybridengine.config import Config

    schema = Config.model_json_schema()
    definitions = schema.setdefault("$defs", {})
    names: dict[str, list[str]] = {"method": [], "task": [], "data": []}
    for name, kind, parameters in plugins:
        if name not in names[kind]:  # a clash is the catalogue's to report; one definition serves the editor
            names[kind].append(name)
            definitions[f"{kind}:{name}"] = _definition(parameters, kind, definitions)
    schema["properties"]["methods"]["items"] = _named("method", names["method"])
    schema["properties"]["task"] = {
        "description": schema["properties"]["task"].get("description"),
        **_named("task", names["task"]),
    }
    definitions["DataConfig"]["properties"]["use"]["anyOf"] = [{"enum": sorted(names["data"])}, _ELSEWHERE]
    definitions["DataConfig"]["allOf"] = [_data_keys(name, definitions) for name in sorted(names["data"])]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "hybridengine config"}


def _definition(parameters: Schema, kind: str, definitions: Schema) -> Schema:
    """The plugin's schema; its nested definitions move beside the others."""
    own = copy.deepcopy(parameters)
    definitions.update(own.pop("$defs", {}))
    if kind == "method":
        own["properties"] = {**own.get("properties", {}), **_ENGINE_KEYS}
    return own


def _named(kind: str, names: list[str]) -> Schema:
    """A bare name, or one name with parameters."""
    with_parameters = {
        "type": "object",
        "properties": {
            name: {"anyOf": [{"$ref": f"#/$defs/{kind}:{name}"}, {"type": "null"}]} for name in sorted(names)
        },
        "patternProperties": {_ELSEWHERE["pattern"]: {"type": ["object", "null"]}},
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 1,
    }
    return {"anyOf": [{"enum": sorted(names)}, _ELSEWHERE, with_parameters]}


def _data_keys(name: str, definitions: Schema) -> Schema:
    """Keys of `data` that belong to the plugin it uses; `files` where it names none."""
    plugin = definitions[f"data:{name}"]
    condition: Schema = {"properties": {"use": {"const": name}}}
    if name != definitions["DataConfig"]["properties"]["use"].get("default"):
        condition["required"] = ["use"]
    then = {key: plugin[key] for key in ("properties", "required") if key in plugin}
    return {"if": condition, "then": then}
