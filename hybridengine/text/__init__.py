"""Text to tensors: tokenising, padding, templates with masks."""

from hybridengine.text.augmentation import Rewrite, add_copies, rewrite_unlabelled
from hybridengine.text.cloze import Cloze
from hybridengine.text.hiding import hide_tokens
from hybridengine.text.label_words import AtMask, LabelWords, Verbalizer
from hybridengine.text.pieces import pieces_of, solved
from hybridengine.text.prompting import batch_of, rewritten, some_rows, survey
from hybridengine.text.sampling import by_length, sample_top_k
from hybridengine.text.similarity import WordSimilarity
from hybridengine.text.token_loss import IGNORED, token_prediction, token_terms
from hybridengine.text.tokens import (
    accepts,
    base_model,
    blocks,
    head_patterns,
    insert_tokens,
    longest_input,
    padded,
    padded_inputs,
    set_pad_token,
    special_ids,
    to_side,
    tokenise,
    usable_length,
)
from hybridengine.text.word_file import read_words
from hybridengine.text.words import STOP_WORDS, Word, cased_like, edits, replaced, words_of

__all__ = [
    "IGNORED",
    "STOP_WORDS",
    "AtMask",
    "Cloze",
    "LabelWords",
    "Rewrite",
    "Verbalizer",
    "Word",
    "WordSimilarity",
    "accepts",
    "add_copies",
    "base_model",
    "batch_of",
    "blocks",
    "by_length",
    "cased_like",
    "edits",
    "head_patterns",
    "hide_tokens",
    "insert_tokens",
    "longest_input",
    "padded",
    "padded_inputs",
    "pieces_of",
    "read_words",
    "replaced",
    "rewrite_unlabelled",
    "rewritten",
    "sample_top_k",
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
    "words_of",
]
