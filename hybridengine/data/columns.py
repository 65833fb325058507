"""Which column plays which role of the task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from hybridengine.data.rows import TARGET_ROLES, Split
from hybridengine.errors import DataError, did_you_mean

__all__ = ["resolve_columns"]

_ALIASES = {
    "text": ("sentence", "review", "content", "comment", "document", "article", "body", "tweet", "utterance"),
    "label": ("labels", "sentiment", "class", "category", "intent", "target"),
    "tokens": ("words",),
    "tags": ("ner_tags", "labels"),
    "summary": ("highlights", "abstract", "target"),
}
_LOOKED_AT = 1000  # rows whose columns are looked at; a later row that lacks one is a bad row


def resolve_columns(
    split: Split, roles: Mapping[str, str], optional: Sequence[str], configured: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    """Find the column of every role: by config, by the task's default name, or by inference where unambiguous.

    Args:
        split: raw rows.
        roles: the task's roles and default column names.
        optional: roles that may be absent.
        configured: `data.columns`; roles that the task does not know are kept as extra columns.

    Returns:
        Role to column, and the roles whose column was inferred.

    Raises:
        DataError: a column is missing or several fit; lists the columns found.
    """
    examples = _examples(split)
    found = _configured(split, examples, roles, configured)
    for role, default in roles.items():
        if role not in found and default in examples and default not in found.values():
            found[role] = default
    may_lack = {*optional, *(TARGET_ROLES if split.name == "unlabelled" else ())}
    inferred = []
    for role, default in roles.items():
        if role in found or role in may_lack:
            continue
        fitting = _fitting(role, default, examples, set(found.values()))
        if len(fitting) != 1:
            raise DataError(_unresolved(split, role, default, examples, fitting, roles, configured))
        found[role] = fitting[0]
        inferred.append(role)
    return found, inferred


def _examples(split: Split) -> dict[str, Any]:
    """Columns in order, each with a value that is not null where there is one."""
    examples: dict[str, Any] = {}
    for row in islice(split.rows, _LOOKED_AT):
        for column, value in row.items():
            if examples.get(column) is None:
                examples[column] = value
    return examples


def _configured(
    split: Split, examples: Mapping[str, Any], roles: Mapping[str, str], configured: Mapping[str, str]
) -> dict[str, str]:
    found = {}
    for role, column in configured.items():
        if column in examples:
            found[role] = column
        elif not (split.name == "unlabelled" and (role in TARGET_ROLES or role not in roles)):
            raise DataError(
                f"{split.source}: data.columns.{role} names column {column!r}, which the {split.name} rows lack."
                f"{did_you_mean(column, map(str, examples))}"
            )
    return found


def _fitting(role: str, default: str, examples: Mapping[str, Any], taken: set[str]) -> list[str]:
    free = [column for column in examples if column not in taken]
    names = {default.lower(), *_ALIASES.get(role, ())}
    fitting = [column for column in free if str(column).lower() in names]
    if not fitting and role == "text":
        others = {alias for other in ("label", "summary") for alias in (other, *_ALIASES[other])}
        fitting = [c for c in free if isinstance(examples[c], str) and str(c).lower() not in others]
    return fitting


def _unresolved(
    split: Split,
    role: str,
    default: str,
    examples: Mapping[str, Any],
    fitting: Sequence[str],
    roles: Mapping[str, str],
    configured: Mapping[str, str],
) -> str:
    why = f"several columns could be {role!r}: {', '.join(fitting)}" if fitting else f"no column {default!r}"
    unknown = [name for name in configured if name not in roles]
    hint = f" data.columns has {unknown[0]!r}.{did_you_mean(unknown[0], roles)}" if unknown else ""
    columns = ", ".join(map(str, examples)) or "none"
    return (
        f"{split.source}: {why} in the {split.name} rows; columns found: {columns}. "
        f"Set data.columns: {{{role}: COLUMN}}.{hint}"
    )
