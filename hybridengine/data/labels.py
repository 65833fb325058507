"""Labels of a row as names, whatever their raw type."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["is_measured", "label_name", "labels_of", "map_labels"]

_ROLES = ("label", "tags")


def label_name(raw: Any) -> str:
    """The name of a raw label: `0`, `0.0` and `"0"` are one label, booleans read as in YAML."""
    if isinstance(raw, bool):
        return "true" if raw else "false"
    if isinstance(raw, float) and raw.is_integer():
        return str(int(raw))
    return str(raw)


def is_measured(raw: Any) -> bool:
    """Whether a label is a measured quantity (2.5) and not a class (2, 2.0, "2")."""
    return isinstance(raw, float) and not raw.is_integer()


def labels_of(row: Mapping[str, Any]) -> Iterator[str]:
    """Names of the classes a row is labelled with; a number between whole numbers is no class."""
    for role in _ROLES:
        value = row.get(role)
        for raw in value if isinstance(value, list | tuple) else (value,):
            if raw is not None and not is_measured(raw):
                yield label_name(raw)


def map_labels(row: dict[str, Any], names: Mapping[str, str]) -> str | None:
    """Replace raw labels in place by `data.labels`; a reason if one is not listed there."""
    for role in _ROLES:
        if role not in row:
            continue
        value = row[role]
        many = isinstance(value, list | tuple)
        raw = [label_name(item) for item in (value if many else (value,))]
        for name in raw:
            if name not in names:
                return f"label {name!r} is not listed in data.labels"
        mapped = [names[name] for name in raw]
        row[role] = mapped if many else mapped[0]
    return None
