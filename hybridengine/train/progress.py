"""What training tells whoever listens. The engine itself prints nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Event", "Listener", "silent"]


@dataclass(frozen=True)
class Event:
    """Something happened.

    Attributes:
        kind: `note`, `plan`, `start`, `step`, `evaluate`, `save` or `done`.
        step: optimizer steps made so far; `total` how many are planned.
        message: one line for a person.
        values: numbers and objects behind the message (`loss`, `samples_per_second`, `eta` seconds, `metrics`, ...).
    """

    kind: str
    step: int = 0
    total: int = 0
    message: str = ""
    values: dict[str, Any] = field(default_factory=dict)


Listener = Callable[[Event], None]


def silent(event: Event) -> None:
    """Listen to nothing."""
