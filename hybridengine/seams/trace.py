"""What the onion did, pass by pass: the plan's prediction and the tests' evidence.

Cost unit: one forward of the step's rows is 1, a full backward 2, a delta-only backward 1; a plain step costs 3.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

__all__ = ["Event", "Trace", "cost_of", "summarise"]

COSTS = {"F": 1.0, "f": 1.0, "B": 2.0, "b": 2.0, "G": 1.0, "H": 2.0, "S": 0.0, "W": 0.0}
"""F/f forward with/without a graph, B/b backward with/without gradient synchronisation, G delta-only gradient,
H parameter gradient, P pull-back through H's graph, W weights moved, S optimizer step."""


@dataclass(frozen=True)
class Event:
    """One pass: its kind, the rows it ran on, and how many adaptation steps a pull-back goes through."""

    kind: str
    rows: int = 0
    depth: int = 0

    def __str__(self) -> str:
        return f"{self.kind}{self.rows}" if self.rows else self.kind


@dataclass
class Trace:
    """The passes since the last `clear`; recording can be switched off for long runs.

    `features` tells whether any pass ever asked for hidden states, `logits` whether any read more of the logits than a
    cross-entropy does.
    """

    events: list[Event] = field(default_factory=list)
    recording: bool = True
    features: bool = False
    logits: bool = False

    def add(self, kind: str, rows: int = 0, depth: int = 0) -> None:
        if self.recording:
            self.events.append(Event(kind, rows, depth))

    def clear(self) -> None:
        self.events.clear()

    def text(self) -> str:
        """Events in order, e.g. `F32 b F32 B S`."""
        return " ".join(map(str, self.events))


def cost_of(events: Iterable[Event], rows: int) -> float:
    """Predicted FLOPs in units of one forward of `rows` rows.

    A gradient (G, H) differentiates the last forward; a backward all forwards since the last one that no gradient
    has taken, e.g. both passes of R-Drop.
    """
    total, last_rows, inner_rows = 0.0, rows, rows
    open_rows: list[int] = []
    for event in events:
        if event.kind in "Ff":
            total += COSTS[event.kind] * event.rows
            if event.kind == "F":
                last_rows = event.rows
                open_rows.append(event.rows)
        elif event.kind in "GH":
            inner_rows = open_rows.pop() if open_rows else last_rows
            total += COSTS[event.kind] * inner_rows
        elif event.kind in "Bb":
            total += COSTS[event.kind] * sum(open_rows)
            open_rows.clear()
        elif event.kind == "P":
            # Differentiating K inner steps (forward 1 + backward 2 each) twice costs two more of each.
            total += 6.0 * event.depth * inner_rows
    return total / rows


def summarise(events: Iterable[Event]) -> dict[str, int]:
    """How often each kind of pass runs."""
    return dict(sorted(Counter(event.kind for event in events).items()))
