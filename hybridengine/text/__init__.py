"""Text to tensors: tokenising, padding, templates with masks."""

from hybridengine.text.augmentation import Rewrite, add_copies, rewrite_unlabelled
from hybridengine.text.cloze import Cloze
from hybridengine.text.sampling import by_length, sample_top_k
from hybridengine.text.token_loss import IGNORED, token_prediction, token_terms
from hybridengine.text.tokens import (
    accepts,
    base_model,
    blocks,
    head_patterns,
    longest_input,
    padded,
    padded_inputs,
    set_pad_token,
    special_ids,
    to_side,
    tokenise,
    usable_length,
)
from hybridengine.text.words import STOP_WORDS, Word, cased_like, edits, replaced, words_of

__all__ = [
    "IGNORED",
    "STOP_WORDS",
    "Cloze",
    "Rewrite",
    "Word",
    "accepts",
    "add_copies",
    "base_model",
    "blocks",
    "by_length",
    "cased_like",
    "edits",
    "head_patterns",
    "longest_input",
    "padded",
    "padded_inputs",
    "replaced",
    "rewrite_unlabelled",
    "sample_top_k",
    "set_pad_token",
    "special_ids",
    "to_side",
    "token_prediction",
    "token_terms",
    "tokenise",
    "usable_length",
    "words_of",
]
