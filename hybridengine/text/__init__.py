"""Text to tensors: tokenising, padding, templates with masks."""

from hybridengine.text.cloze import Cloze
from hybridengine.text.token_loss import IGNORED, token_prediction, token_terms
from hybridengine.text.tokens import (
    accepts,
    base_model,
    blocks,
    head_patterns,
    insert_tokens,
    padded,
    padded_inputs,
    set_pad_token,
    special_ids,
    to_side,
    tokenise,
    usable_length,
)

__all__ = [
    "IGNORED",
    "Cloze",
    "accepts",
    "base_model",
    "blocks",
    "head_patterns",
    "insert_tokens",
    "padded",
    "padded_inputs",
    "set_pad_token",
    "special_ids",
    "to_side",
    "token_prediction",
    "token_terms",
    "tokenise",
    "usable_length",
]
