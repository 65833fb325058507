"""What can be said about an installed plugin, without and with importing it."""

from __future__ import annotations

import dataclasses
import inspect
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from hybridengine.plugin import Listing, Traits

__all__ = ["OWN", "describe", "example", "overview"]

OWN = "hybridengine"
"""The distribution whose plugins `list` may import: it is running already."""


def overview(listing: Listing, import_it: bool) -> dict[str, Any]:
    """One plugin for a list. What needs its class is None where it was not imported; `error` says why that failed."""
    row: dict[str, Any] = {
        "name": listing.name,
        "kind": None,
        "family": None,
        "hooks": None,
        "summary": None,
        "cost": None,
    }
    row |= {"distribution": listing.distribution, "version": listing.version, "error": None}
    if not import_it and listing.distribution != OWN:
        return row
    from hybridengine.errors import PluginError

    try:
        cls = listing.load()
    except PluginError as error:
        return {**row, "error": str(error)}
    traits = _traits(cls)
    told = {"kind": traits.kind, "family": traits.family, "hooks": _hooks(cls), "summary": _summary(cls)}
    return {**row, **told, "cost": traits.cost if traits.kind == "method" else None}


def describe(listing: Listing) -> dict[str, Any]:
    """Everything about one plugin; imports it.

    Raises:
        PluginError: it cannot be imported or is no dataclass.
    """
    from hybridengine.plugin.parameters import json_schema, parameter_rows

    cls = listing.load()
    traits = _traits(cls)
    schema = json_schema(listing.name, cls)
    return {
        "name": listing.name,
        "kind": traits.kind,
        "family": traits.family,
        "distribution": listing.distribution,
        "version": listing.version,
        "summary": _summary(cls),
        "documentation": inspect.getdoc(cls) or "",
        "paper": traits.paper,
        "hooks": _hooks(cls),
        "order": int(traits.order),
        "slots": list(traits.slots),
        "requires": list(traits.requires),
        "provides": list(traits.provides),
        "conflicts": dict(traits.conflicts),
        "effect": traits.effect,
        "cost": traits.cost,
        "combines": traits.combines,
        "parameters": parameter_rows(cls),
        "schema": schema,
        "example": example(listing.name, cls),
    }


def example(name: str, cls: type) -> str:
    """The plugin in a config, every parameter at its default; a required one at its example."""
    values = {item.name: _default(item) for item in dataclasses.fields(cls) if item.init}
    kind = _traits(cls).kind
    entry: Any = {name: values} if values else name
    config = {"method": {"methods": [entry]}, "task": {"task": entry}, "data": {"data": {"use": name, **values}}}[kind]
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=100).rstrip()


def _default(item: dataclasses.Field[Any]) -> Any:
    value: Any = item.metadata.get("example") or "REQUIRED"
    if item.default is not dataclasses.MISSING:
        value = item.default
    elif item.default_factory is not dataclasses.MISSING:
        value = item.default_factory()
    return _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _traits(cls: type) -> Traits:
    from hybridengine.plugin import Traits

    traits = getattr(cls, "traits", None)
    return traits if isinstance(traits, Traits) else Traits()


def _hooks(cls: type) -> list[str]:
    from hybridengine.plugin.calling import SPEC_NAMES

    return [name for name in SPEC_NAMES if hasattr(cls, name)]


def _summary(cls: type) -> str:
    # A dataclass without a docstring gets its signature as one.
    text = "" if (cls.__doc__ or "").startswith(f"{cls.__name__}(") else inspect.getdoc(cls) or ""
    return " ".join(text.partition("\n\n")[0].split())
