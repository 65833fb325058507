"""Rows of a run: where they come from, how they are checked, named, split and described."""

from hybridengine.data.card import add_token_lengths, card_lines
from hybridengine.data.prepare import prepare_splits
from hybridengine.data.reading import read_rows
from hybridengine.data.rows import SPLITS, Split

__all__ = ["SPLITS", "Split", "add_token_lengths", "card_lines", "prepare_splits", "read_rows"]
