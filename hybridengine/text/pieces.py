"""A template as a list of pieces: literal text, `{column}` fields, and one `[MASK]`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hybridengine.errors import ConfigError

__all__ = ["MASK", "pieces_of", "role_of", "solved", "visible"]

MASK = "[MASK]"
_FIELD = re.compile(r"\{\w+\}")
_PIECES = re.compile(r"(\{\w+\}|\[MASK\])")


def pieces_of(text: str, key: str = "text") -> list[str]:
    """The pieces of a template such as `{text} It was [MASK].`, in order.

    Raises:
        ValueError: no column, or not exactly one mask; `key` is named.
    """
    pieces = [piece for piece in _PIECES.split(text) if piece]
    if pieces.count(MASK) != 1:
        raise ValueError(f"{key} must hold [MASK] exactly once, got {text!r}; e.g. '{{text}} It was [MASK].'")
    if not any(role_of(piece) for piece in pieces):
        raise ValueError(f"{key} must hold a column such as {{text}}, got {text!r}")
    return pieces


def role_of(piece: str) -> str:
    """The column that a piece stands for, or "" for literal text."""
    return piece[1:-1] if _FIELD.fullmatch(piece) else ""


def visible(pieces: Sequence[str], masked: bool) -> list[str]:
    """What a model sees of a template before it answers: all, or (causal) what stands before the mask.

    Raises:
        ConfigError: a column after the mask for a causal model.
    """
    if masked:
        return list(pieces)
    at = pieces.index(MASK)
    if after := [piece for piece in pieces[at + 1 :] if role_of(piece)]:
        raise ConfigError(
            f"template: a causal model cannot see {after[0]}, which comes after [MASK]; put [MASK] at the end"
        )
    before = list(pieces[:at])
    return [*before[:-1], before[-1].rstrip()] if before else before


def solved(pieces: Sequence[str], word: str, mark: str) -> list[str]:
    """The template with a word in the mask's place, its columns renamed to `mark` and their own name."""
    renamed = [f"{{{mark}{role}}}" if (role := role_of(piece)) else piece for piece in pieces]
    return [word if piece == MASK else piece for piece in renamed]
