"""What no row of any task may hold."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["LONGEST_TEXT", "row_problem"]

LONGEST_TEXT = 1_000_000
"""Characters; a longer text is no example but a file in the wrong column."""

_SURROGATE = re.compile("[\ud800-\udfff]")
_LISTS = frozenset({"tokens", "tags"})


def row_problem(row: Mapping[str, Any], roles: Mapping[str, str], optional: Sequence[str]) -> str | None:
    """Why a row cannot be used, or None.

    Args:
        row: raw row by column.
        roles: role to column.
        optional: roles whose value may be missing.
    """
    for role, column in roles.items():
        if column not in row:
            problem: str | None = "is missing" if role not in optional else None
        elif row[column] is None and role in optional:
            problem = None
        else:
            problem = _value_problem(role, row[column])
        if problem:
            return f"column {column!r} {problem}"
    return None


def _value_problem(role: str, value: Any) -> str | None:
    if value is None:
        return "is null"
    if (role.startswith("text") or role == "summary") and not isinstance(value, str):
        return f"must be text, not {type(value).__name__}"
    if role in _LISTS and not isinstance(value, list | tuple):
        return f"must be a list, not {type(value).__name__}"
    if role == "label" and not isinstance(value, str | int | float | list | tuple):
        return f"must be a label, not {type(value).__name__}"
    if isinstance(value, str) and len(value) > LONGEST_TEXT:
        return f"is longer than {LONGEST_TEXT:,} characters"
    # Invisible characters only (zero-width, byte-order mark) leave a tokenizer as empty-handed as no text.
    if isinstance(value, str) and not any(c.isprintable() and not c.isspace() for c in value) and "\0" not in value:
        return "has a lone surrogate" if _SURROGATE.search(value) else "is empty"
    if role in _LISTS and not value:
        return "is empty"
    return next(filter(None, map(_leaf_problem, _leaves(value))), None)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _leaf_problem(value: Any) -> str | None:
    if value is None:
        return "holds a null"
    if isinstance(value, float) and not math.isfinite(value):
        return f"is {value}, not a finite number"
    if isinstance(value, str):
        if "\0" in value:
            return "has a NUL character"
        if not value.isascii() and _SURROGATE.search(value):
            return "has a lone surrogate"
        if len(value) > LONGEST_TEXT:
            return f"is longer than {LONGEST_TEXT:,} characters"
    return None
