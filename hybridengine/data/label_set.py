"""The label set of a task: its order, and the model's settings that carry it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from hybridengine.errors import DataError, did_you_mean

__all__ = ["label_id", "label_options", "label_order"]


def label_order(names: Iterable[str], given: Sequence[str] = ()) -> list[str]:
    """Label names in id order: as given, else by value where all are whole numbers, else by name.

    Raises:
        DataError: if an order was given that lacks a name that occurs.
    """
    found = set(names)
    if given:
        missing = sorted(found - set(given))
        if missing:
            raise DataError(f"the rows hold label {missing[0]!r}, which the given order lacks: {', '.join(given)}")
        return list(dict.fromkeys(given))
    if all(name.lstrip("-").isdecimal() for name in found):
        return sorted(found, key=int)
    return sorted(found)


def label_id(name: str, ids: dict[str, int]) -> int:
    """The id of a label.

    Raises:
        DataError: if training had no such label.
    """
    if name not in ids:
        raise DataError(f"label {name!r} does not occur in training.{did_you_mean(name, ids)}")
    return ids[name]


def label_options(labels: Sequence[str]) -> dict[str, Any]:
    """Options of `from_pretrained` for a head with these labels; they stay in the saved model's configuration."""
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
    }
