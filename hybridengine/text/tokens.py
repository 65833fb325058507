"""Texts to features and features to padded tensors: what tasks and prompts need of any tokenizer and model."""

from __future__ import annotations

import array
import functools
import inspect
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hybridengine.errors import ConfigError, ModelError
from hybridengine.text.token_loss import IGNORED

if TYPE_CHECKING:
    from hybridengine.run import Run
    from hybridengine.seams.task import Feature

__all__ = [
    "accepts",
    "base_model",
    "blocks",
    "head_patterns",
    "insert_tokens",
    "longest_input",
    "padded",
    "padded_inputs",
    "set_pad_token",
    "special_ids",
    "to_side",
    "tokenise",
    "usable_length",
]


_FEWEST = 3  # a token of text between two special ones
_UNLIMITED = 10**9  # tokenizers without a limit say 10^30


def tokenise(
    tokenizer: Any,
    texts: Sequence[Any],
    pairs: Sequence[str] | None = None,
    *,
    max_length: int,
    words: bool = False,
) -> tuple[list[Feature], Any]:
    """Turn many texts into features in one call of the (fast) tokenizer, cut at `max_length` tokens.

    Args:
        texts: strings, or lists of words where `words` is set.
        pairs: second texts; of a pair that is too long, the longer text loses tokens first.

    Returns:
        Features with `input_ids`, `token_type_ids` where the tokenizer makes them, `perturbable` (0 at special tokens),
        `length` and `truncated`; and the tokenizer's own encoding, for word positions.
    """
    if not texts:
        return [], None
    encoded = tokenizer(
        list(texts),
        None if pairs is None else list(pairs),
        truncation=True,
        max_length=max_length,
        is_split_into_words=words,
        return_attention_mask=False,
        return_special_tokens_mask=True,
    )
    special = special_ids(tokenizer)
    features: list[Feature] = []
    for index, ids in enumerate(encoded["input_ids"]):
        # A special token that was typed into a text (`[SEP]`) is not in the tokenizer's mask, yet acts as one.
        added = encoded["special_tokens_mask"][index]
        if not ids:  # a text that the tokenizer reads as nothing still needs one position
            ids, added = [_stand_in(tokenizer)], [1]
        perturbable = [int(not mask and token not in special) for token, mask in zip(ids, added, strict=True)]
        cut = bool(encoded.encodings[index].overflowing)
        feature: Feature = {"input_ids": ids, "perturbable": perturbable, "length": len(ids), "truncated": cut}
        if "token_type_ids" in encoded:
            feature["token_type_ids"] = encoded["token_type_ids"][index] or [0]
        features.append(feature)
    return features, encoded


def insert_tokens(feature: Feature, at: int, ids: Sequence[int], *, perturbable: bool = False) -> Feature:
    """The feature with further tokens before its token `at`: unscored, of the token type that stood there.

    Args:
        perturbable: whether attacks may move them.
    """
    count, size = len(ids), len(feature["input_ids"])
    kinds = feature.get("token_type_ids") or [0]
    fill: dict[str, Sequence[int]] = {
        "input_ids": ids,
        "perturbable": [int(perturbable)] * count,
        "token_type_ids": [kinds[min(at, len(kinds) - 1)]] * count,
        "scored": [0] * count,
        "template": [0] * count,
    }
    if "scored" in feature:  # then the label is one of tokens
        fill["label"] = [IGNORED] * count
    longer = {key: [*feature[key][:at], *new, *feature[key][at:]] for key, new in fill.items() if key in feature}
    return {**feature, **longer, "length": size + count}


def _stand_in(tokenizer: Any) -> int:
    roles = (tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return next((int(token) for token in roles if token is not None), 0)


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids with a role of their own (separators, mask, padding); an unknown word is a word."""
    special = set(tokenizer.all_special_ids)
    roles = ("bos", "eos", "sep", "cls", "mask", "pad")
    if tokenizer.unk_token_id not in [getattr(tokenizer, f"{role}_token_id", None) for role in roles]:
        special.discard(tokenizer.unk_token_id)
    return frozenset(special)


def blocks(text: str, words: int) -> list[str]:
    """Cut a text into pieces of at most `words` whitespace-separated words; joined they are the text again."""
    found = re.findall(r"\s*\S+(?:\s+$)?", text)
    return ["".join(found[start : start + words]) for start in range(0, len(found), words)] or [text]


# ---- padding ---------------------------------------------------------------------------------------------------------


def padded(values: Sequence[Sequence[int]], fill: int, side: str = "right") -> Tensor:
    """Integer lists as one int64 tensor `[B, L]`, L the longest (at least 1), filled up on one side."""
    lengths = torch.tensor([len(row) for row in values])
    flat = array.array("q")  # many times faster than a tensor of nested lists
    for row in values:
        flat.extend(row)
    out = torch.full((len(values), max(1, int(lengths.max()))), fill)
    if flat:
        out[_real(lengths, out.shape[1], side)] = torch.frombuffer(flat, dtype=torch.int64)
    return out


def _real(lengths: Tensor, longest: int, side: str) -> Tensor:
    """Which positions `[B, L]` hold tokens."""
    position = torch.arange(longest)
    return position >= longest - lengths[:, None] if side == "left" else position < lengths[:, None]


def to_side(values: Tensor, lengths: Tensor, side: str) -> Tensor:
    """Move right-padded rows `[B, L, ...]` to the given side: token j of a row stays its token j."""
    if side == "right":
        return values
    longest = values.shape[1]
    index = (torch.arange(longest) - (longest - lengths)[:, None]) % longest
    return values[torch.arange(values.shape[0])[:, None], index]


def padded_inputs(
    run: Run, features: Sequence[Feature], *, side: str | None = None
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """The model's inputs for some features, and the masks `attention` and `perturbable`, padded to the longest.

    Left padding gets `position_ids` where the model takes them, so that padding moves no token to another position.
    """
    side = side or run.tokenizer.padding_side
    pad = run.tokenizer.pad_token_id
    ids = [feature["input_ids"] for feature in features]
    padded_ids = padded(ids, 0 if pad is None else pad, side)
    attention = _real(torch.tensor([len(row) for row in ids]), padded_ids.shape[1], side).long()
    inputs = {"input_ids": padded_ids, "attention_mask": attention}
    if "token_type_ids" in features[0] and accepts(run.model, "token_type_ids"):
        inputs["token_type_ids"] = padded([f["token_type_ids"] for f in features], 0, side)
    if side == "left" and accepts(run.model, "position_ids") and not _counts_positions(run.model):
        inputs["position_ids"] = (attention.cumsum(1) - 1).clamp_min(0)
    perturbable = attention
    if "perturbable" in features[0]:
        perturbable = padded([f["perturbable"] for f in features], 0, side)
    return inputs, {"attention": {"input_ids": attention}, "perturbable": {"input_ids": perturbable}}


# ---- the model behind ------------------------------------------------------------------------------------------------


def base_model(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def accepts(model: nn.Module | None, name: str) -> bool:
    """Whether the model's forward has an argument of this name."""
    return model is not None and name in _arguments(type(base_model(model)).forward)


@functools.lru_cache(maxsize=64)
def _arguments(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def _counts_positions(model: Any) -> bool:
    """RoBERTa's kin number their tokens themselves, past the padding id; given positions would be off by two."""
    inner = base_model(model)
    embeddings = getattr(getattr(inner, "base_model", inner), "embeddings", None)
    learned = getattr(embeddings, "position_embeddings", None)
    return isinstance(learned, nn.Embedding) and learned.padding_idx is not None


def longest_input(tokenizer: Any, model: Any) -> int | None:
    """Tokens that the model and its tokenizer take at most; None where neither sets a limit."""
    limit = getattr(tokenizer, "model_max_length", None) or _UNLIMITED
    inner = base_model(model)
    positions = getattr(getattr(inner, "config", None), "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        if _counts_positions(inner):
            positions -= int(inner.base_model.embeddings.position_embeddings.padding_idx) + 1
        limit = min(limit, positions)
    return int(limit) if limit < _UNLIMITED else None


def usable_length(run: Run) -> int:
    """`train.max_length`, or less where the model or tokenizer takes fewer tokens (then the user is told).

    Raises:
        ConfigError: soft tokens leave no room.
    """
    asked = run.config.train.max_length
    longest = longest_input(run.tokenizer, run.model)
    soft = len(run.soft_tokens)
    limit = asked if longest is None else longest - soft
    if soft and limit < _FEWEST:
        raise ConfigError(
            f"{soft} soft tokens leave no room for text: the model takes {longest}; lower their number `n`"
        )
    if limit < asked:
        takes = f"{longest} tokens" + (f", {soft} of them soft" if soft else "")
        run.say(f"train.max_length is {asked}, but the model takes {takes}; longer texts are cut at {limit}")
    return int(min(asked, limit))


def set_pad_token(run: Run, model: Any) -> None:
    """Make tokenizer and model agree on a padding token; decoders often come without one.

    Raises:
        ModelError: if the tokenizer has no token that could stand in.
    """
    tokenizer = run.tokenizer
    if tokenizer.pad_token_id is None:
        stand_in = tokenizer.eos_token or tokenizer.unk_token
        if stand_in is None:
            raise ModelError(
                "the tokenizer has no padding token and no end-of-text token to use instead; set `pad_token` in its"
                " tokenizer_config.json"
            )
        tokenizer.pad_token = stand_in
        run.say(f"the tokenizer has no padding token; {stand_in!r} is used")
    config = getattr(base_model(model), "config", None)
    if config is not None:
        # Decoders pool the last token that is not this id; a different one would pool padding.
        config.get_text_config().pad_token_id = tokenizer.pad_token_id


def head_patterns(*names: str) -> tuple[str, ...]:
    """Patterns of the parameters of modules so named, at the top of a model or inside a wrapper such as PEFT's."""
    return tuple(pattern for name in names for pattern in (f"{name}.*", f"*.{name}.*"))
