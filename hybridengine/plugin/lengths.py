"""Lengths that a schedule may give as whole steps or as a share of the run."""

from __future__ import annotations

__all__ = ["check_share", "whole_steps"]


def check_share(name: str, value: int | float) -> None:
    """ValueError if `value` is neither a share below 1 nor a whole number of steps."""
    if isinstance(value, float) and value >= 1:
        raise ValueError(f"{name} must be a share below 1 or a whole number of steps, got {value}")


def whole_steps(value: int | float, total: int) -> int:
    """How many of `total` steps a share (a float) or a number of steps (an int) means; never more than all."""
    return round(value * total) if isinstance(value, float) else min(value, total)
