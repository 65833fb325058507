"""Rows of a split and where each came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["SPLITS", "TARGET_ROLES", "Split", "row_places", "rows_of"]

SPLITS = ("train", "validation", "test", "unlabelled")
TARGET_ROLES = frozenset({"label", "labels", "tags", "summary", "target"})
"""Roles that hold what the model should answer; all other roles are its input."""

_NUMBERED = (*SPLITS, "augmented")  # the last is made by methods, of unlabelled rows
_STRIDE = 1 << 40  # more rows than any split has; keeps row ids of different splits apart


@dataclass
class Split:
    """Rows of one split, with their origin for error messages and their global ids for keyed randomness.

    Attributes:
        name: `train`, `validation`, `test` or `unlabelled`; methods may add `augmented`.
        rows: mappings from column (after preparation: role) to value.
        source: file or description of the origin; empty where each line names its own file.
        lines: 1-based line or row number in the source per row, or `file:line`.
    """

    name: str
    rows: Sequence[Mapping[str, Any]]
    source: str = "rows"
    lines: Sequence[int | str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.lines:
            self.lines = range(1, len(self.rows) + 1)
        if len(self.lines) != len(self.rows):
            raise ValueError(f"split {self.name!r}: {len(self.rows)} rows but {len(self.lines)} line numbers")

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, index: int) -> str:
        """`file:row` of a row."""
        return f"{self.source}:{self.lines[index]}" if self.source else str(self.lines[index])

    def ids(self, positions: Sequence[int]) -> tuple[int, ...]:
        """Global ids of rows by position."""
        base = (_NUMBERED.index(self.name) if self.name in _NUMBERED else len(_NUMBERED)) * _STRIDE
        return tuple(base + position for position in positions)

    def select(self, positions: Sequence[int], name: str | None = None) -> Split:
        """A split of some of the rows, origins kept."""
        rows = [self.rows[i] for i in positions]
        return Split(name or self.name, rows, self.source, [self.lines[i] for i in positions])


def row_places(splits: Mapping[str, Split], ids: Sequence[int]) -> list[str]:
    """`file:row` of rows by their global ids; the id itself where no split holds it."""
    found = [(_place(splits, number), number) for number in ids]
    return [str(number) if place is None else place[0].where(place[1]) for place, number in found]


def rows_of(splits: Mapping[str, Split], ids: Sequence[int]) -> list[Mapping[str, Any]]:
    """The rows that have these global ids.

    Raises:
        KeyError: no split holds a row.
    """
    places = [_place(splits, number) for number in ids]
    if None in places:
        raise KeyError(f"no split holds the row {ids[places.index(None)]}")
    return [place[0].rows[place[1]] for place in places if place is not None]


def _place(splits: Mapping[str, Split], number: int) -> tuple[Split, int] | None:
    index, position = divmod(number, _STRIDE)
    split = splits.get(_NUMBERED[index]) if 0 <= index < len(_NUMBERED) else None
    return (split, position) if split is not None and position < len(split) else None
