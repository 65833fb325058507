"""Rows of a run: where they come from, how they are checked, named, split and described."""

from hybridengine.data.card import add_token_lengths, card_lines
from hybridengine.data.label_set import label_id, label_options, label_order
from hybridengine.data.labels import label_name, labels_of
from hybridengine.data.prepare import prepare_splits
from hybridengine.data.reading import SUFFIXES, columns_to_rows, read_lines, read_rows
from hybridengine.data.rows import SPLITS, Split
from hybridengine.data.synonyms import Synonyms, read_synonyms

__all__ = [
    "SPLITS",
    "SUFFIXES",
    "Split",
    "Synonyms",
    "add_token_lengths",
    "card_lines",
    "columns_to_rows",
    "label_id",
    "label_name",
    "label_options",
    "label_order",
    "labels_of",
    "prepare_splits",
    "read_lines",
    "read_rows",
    "read_synonyms",
]
