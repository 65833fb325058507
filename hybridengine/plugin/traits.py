"""What a method declares about itself, and helpers to write its parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from enum import IntEnum
from typing import Any

__all__ = ["Band", "Traits", "parameter"]


class Band(IntEnum):
    """Where a method stands inside its seam, from the inside out. A user may override it with `order:`."""

    LEAF = 0
    TERM = 10
    CONSISTENCY = 20
    SMOOTHNESS = 30
    EMBEDDING_ATTACK = 40
    META = 50
    GRADIENT = 60
    WEIGHT_PERTURBATION = 70
    UPDATE = 80
    AVERAGE = 90


@dataclasses.dataclass(frozen=True)
class Traits:
    """The declarative half of a method: what the stack checks before anything runs.

    Attributes:
        family: shelf of the catalogue (`adversarial`, `meta`, ...).
        order: band inside its seams, inner methods first.
        slots: exclusive places it takes (`embedding_attack`, `weight_perturbation`, `leaf_loss`, `backbone`, ...).
        requires: capabilities that the model, data or another method must provide (`episodes`, `dropout`,
            `embeddings`, `labels`, `lm_head`, `functional`).
        provides: capabilities that it adds; `added_modules` means modules inside the model that its class lacks, so
            that `best/` holds the trained parameters alone and no stage can start from it.
        conflicts: other methods or capabilities it cannot run with, each with the reason and a way out.
        stackable: False where one random draw serves a whole forward pass: two views stacked into one would share it,
            so each view then runs apart.
        ignores_inner: seams whose inner layers it never calls; methods inside would silently do nothing.
        effect: the reported effect that must be non-zero while active; None opts out.
        kind: `method`, `task` (named under `task`) or `data` (named under `data.use`).
        cost: one line: what a step costs.
        state: copies of the trained weights that it keeps beside weights and gradient (Adam's moments are 2, an average
            is 1), for the memory that `plan` tells.
        paper: where it comes from.
        combines: one line: what it goes well with, and what not.
    """

    kind: str = "method"
    family: str = "other"
    order: int = Band.TERM
    slots: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    provides: tuple[str, ...] = ()
    conflicts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    stackable: bool = True
    ignores_inner: tuple[str, ...] = ()
    effect: str | None = None
    cost: str = "no extra passes"
    state: float = 0
    paper: str = ""
    combines: str = "anything"

    def __post_init__(self) -> None:
        for name in ("slots", "requires", "provides", "ignores_inner"):
            if isinstance(getattr(self, name), str):
                raise TypeError(f"Traits: {name} must be a tuple of names, got the text {getattr(self, name)!r}")
        if self.state < 0:
            raise TypeError(f"Traits: state must be a number of copies, 0 or more, got {self.state!r}")


_CONSTRAINTS = ("ge", "gt", "le", "lt", "min_length", "max_length", "pattern")


def parameter(default: Any = dataclasses.MISSING, help: str = "", *, example: Any = None, **constraints: Any) -> Any:
    """A hyper-parameter of a method: a dataclass field with help text and a range.

    Args:
        default: value, or a zero-argument factory for mutable values; required when left out.
        help: one line for `plugins info`.
        example: value shown by `plugins info`, for a required parameter.
        constraints: pydantic ranges `ge gt le lt min_length max_length pattern`.

    Example:
        epsilon: float = parameter(0.1, "L2 radius per sequence", ge=0)
    """
    if unknown := set(constraints) - set(_CONSTRAINTS):
        raise TypeError(f"unknown constraints {sorted(unknown)}; use {', '.join(_CONSTRAINTS)}")
    metadata = {"help": help, "constraints": constraints, "example": example}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)
