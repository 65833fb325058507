"""Text to tensors: tokenising, padding, templates with masks."""

from hybridengine.text.cloze import Cloze
from hybridengine.text.hiding import hide_tokens
from hybridengine.text.pieces import pieces_of, solved
from hybridengine.text.prompting import batch_of, rewritten, some_rows, survey
from hybridengine.text.similarity import WordSimilarity
from hybridengine.text.token_loss import IGNORED, token_prediction, token_terms
from hybridengine.text.tokens import (
    accepts,
    base_model,
    blocks,
    head_patterns,
    padded,
    padded_inputs,
    set_pad_token,
    special_ids,
    to_side,
    tokenise,
    usable_length,
)
from hybridengine.text.word_file import read_words
from hybridengine.text.words import AtMask, LabelWords, Verbalizer

__all__ = [
    "IGNORED",
    "AtMask",
    "Cloze",
    "LabelWords",
    "Verbalizer",
    "WordSimilarity",
    "accepts",
    "base_model",
    "batch_of",
    "blocks",
    "head_patterns",
    "hide_tokens",
    "padded",
    "padded_inputs",
    "pieces_of",
    "read_words",
    "rewritten",
    "set_pad_token",
    "solved",
    "some_rows",
    "special_ids",
    "survey",
    "to_side",
    "token_prediction",
    "token_terms",
    "tokenise",
    "usable_length",
]
