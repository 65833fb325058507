"""Mask infilling: a masked language model writes other words into copies of the training texts."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from hybridengine.errors import ModelError
from hybridengine.model import load_frozen
from hybridengine.plugin import Run, Split, Traits, hook, parameter
from hybridengine.text import (
    STOP_WORDS,
    Word,
    add_copies,
    by_length,
    cased_like,
    edits,
    longest_input,
    padded,
    replaced,
    sample_top_k,
    special_ids,
    words_of,
)

__all__ = ["MaskInfill"]

Masked = tuple[int, Word]
"""Where a mask token stands, and the word it stands for."""


@dataclass(eq=False)
class MaskInfill:
    """Add copies of each training text, under its label, in which a masked language model fills in some words.

    Of a text of l words, n = max(1, ⌊αl⌋) different ones that are no stop words are masked at once, each by one mask
    token however many pieces it has. With z the model's logits at a mask, the new word is drawn from

        softmax(z / temperature)    over the `top_k` likeliest whole words,

    never a special token, a piece of a word, an English stop word or the word that stood there. The model knows nothing
    of the label: "good" may become "bad". `prepend_label` writes the label's name in front of what the model reads
    (and not into the copy), which leads models that were tuned on such texts; by default nothing is prepended. Few
    words (α) and many rows make the noise harmless.

    Only the role `text` of training rows is edited; case, punctuation and white space stay. Originals stay first and
    unchanged; a copy carries `augmented_from`, the position of its original, and that row's origin. Draws are keyed by
    (seed, row, copy); the batch a text is in changes the logits by rounding alone. Words beyond the model's length are
    left as they are. Words are parted by white space.

    Paper: Kobayashi 2018, "Contextual Augmentation"; Wu et al. 2019, "Conditional BERT Contextual Augmentation"; Kumar
    et al. 2020 (prepended labels). Hooks: `transform_data`. Cost: one forward pass of the model for each copy before
    training, and (1 + copies) times the training rows per epoch. Combines with other augmentation, whose copies add up.
    """

    name: ClassVar[str] = "mask-infill"
    traits: ClassVar[Traits] = Traits(
        family="data",
        requires=("text",),
        provides=("augmentation",),
        cost="a forward pass of the masked model for each copy; (1 + copies) x the training rows per epoch",
        paper="Wu et al. 2019, arXiv:1812.06705",
        combines="classification of texts; eda, synonym, back-translation; not token tags",
    )

    model: str = parameter(help="a masked language model: a folder or a hub id", min_length=1, example="bert-base")
    alpha: float = parameter(0.15, "share of the words that is masked", ge=0, le=1)
    copies: int = parameter(1, "copies per row; 0 where only `uda` or `self-training` needs them", ge=0)
    top_k: int = parameter(10, "likeliest words that are drawn from", ge=1)
    temperature: float = parameter(1.0, "above 1: rarer words, below: likelier ones", gt=0)
    prepend_label: bool = parameter(False, "the model reads the label's name before the text; false: nothing")
    batch_size: int = parameter(16, "texts in one pass of the model", ge=1)

    @hook
    def transform_data(self, run: Run, splits: dict[str, Split]) -> dict[str, Split] | None:
        """Append the copies to the training split.

        Raises:
            ModelError: the model cannot be loaded or is no masked language model.
        """

        def rewrite(rows: Sequence[Mapping[str, Any]], keys: Sequence[int]) -> list[str]:
            reader = _Reader(*load_frozen("AutoModelForMaskedLM", self.model, run.device, key="mask-infill.model"))
            texts = [row["text"] for row in rows]
            for batch in by_length(texts, self.batch_size):
                made = self._fill(reader, [rows[i] for i in batch], [random.Random(keys[i]) for i in batch])
                for i, text in zip(batch, made, strict=True):
                    texts[i] = text
            return texts

        return add_copies(run, splits, "mask-infill", self.copies, rewrite)

    def _fill(self, reader: _Reader, rows: Sequence[Mapping[str, Any]], draws: Sequence[random.Random]) -> list[str]:
        """One pass of the model over some rows: their texts with other words."""
        masked = [self._mask(reader, row, rng) for row, rng in zip(rows, draws, strict=True)]
        places = [(index, place) for index, (_, found) in enumerate(masked) for place, _ in found]
        words = [word for _, found in masked for _, word in found]
        drawn = iter(())
        if words:
            logits = reader.logits([ids for ids, _ in masked], places, [word.core for word in words])
            uniform = torch.tensor([draws[index].random() for index, _ in places], dtype=torch.float64)
            drawn = iter(sample_top_k(logits, uniform, self.top_k, temperature=self.temperature).tolist())
        return [
            replaced(row["text"], [(word, cased_like(word.core, reader.words[next(drawn)])) for _, word in found])
            for row, (_, found) in zip(rows, masked, strict=True)
        ]

    def _mask(self, reader: _Reader, row: Mapping[str, Any], rng: random.Random) -> tuple[list[int], list[Masked]]:
        """Token ids with a mask in the place of each chosen word, and where it stands for which word."""
        text = row["text"]
        head = f"{row['label']} " if self.prepend_label and row.get("label") is not None else ""
        ids, offsets = reader.encode(head + text)
        known, words = [], words_of(text)
        for word in words:
            start, end = word.start + len(head), word.end + len(head)
            pieces = [i for i, (a, b) in enumerate(offsets) if a < min(b, end) and b > start]
            if pieces and not word.is_stop_word:
                known.append((pieces, word))
        count = min(edits(self.alpha, len(words)), len(known))
        chosen = [known.pop(int(rng.random() * len(known))) for _ in range(count)]
        dropped = set()
        for pieces, _ in chosen:
            ids[pieces[0]] = reader.mask
            dropped |= set(pieces[1:])
        kept = [i for i in range(len(ids)) if i not in dropped]
        found = sorted((kept.index(pieces[0]), word) for pieces, word in chosen)
        return [ids[i] for i in kept], found


class _Reader:
    """A masked language model with a fast tokenizer, and the words it may write: `words` by token id."""

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        if tokenizer.mask_token_id is None:
            raise ModelError("mask-infill.model: its tokenizer has no mask token; give a masked language model")
        self._model, self._tokenizer = model, tokenizer
        self._longest = longest_input(tokenizer, model)
        self.mask = int(tokenizer.mask_token_id)
        self.words = _whole_words(tokenizer, cast(Any, model.config).vocab_size)
        self._tokens: dict[str, list[int]] = defaultdict(list)
        for token, word in self.words.items():
            self._tokens[word.lower()].append(token)
        if len(self._tokens) < 2:
            raise ModelError("mask-infill.model: its tokenizer has no whole words; give another masked model")

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, cut at the model's length, and the characters that each covers; none for special tokens."""
        made = self._tokenizer(
            text, truncation=self._longest is not None, max_length=self._longest, return_offsets_mapping=True
        )
        return list(made["input_ids"]), list(made["offset_mapping"])

    @torch.no_grad()
    def logits(self, ids: Sequence[Sequence[int]], places: Sequence[tuple[int, int]], old: Sequence[str]) -> Tensor:
        """Logits `[M, V]` at M places `(row, position)`; -inf where a token is no word, or the old one again."""
        inputs = padded(ids, self._tokenizer.pad_token_id)
        real = padded([[1] * len(row) for row in ids], 0)
        device = next(self._model.parameters()).device
        rows, positions = (torch.tensor(x, device=device) for x in zip(*places, strict=True))
        made = self._model(input_ids=inputs.to(device), attention_mask=real.to(device))
        logits: Tensor = made.logits[rows, positions].cpu()
        barred = torch.ones(logits.shape, dtype=torch.bool)
        barred[:, list(self.words)] = False
        for index, word in enumerate(old):
            barred[index, self._tokens.get(word.lower(), [])] = True
        return logits.masked_fill(barred, -torch.inf)


def _whole_words(tokenizer: Any, size: int) -> dict[int, str]:
    """Tokens below `size` that are a word of their own, as they are read in the middle of a text; no stop words."""
    barred = special_ids(tokenizer)
    tokens = [token for token in sorted(set(tokenizer.get_vocab().values())) if token < size and token not in barred]
    found = [(token, tokenizer.decode([token]).strip()) for token in tokens]
    words = [(token, word) for token, word in found if word.isalpha() and word.lower() not in STOP_WORDS]
    again = tokenizer([f" {word}" for _, word in words], add_special_tokens=False)["input_ids"]
    return {token: word for (token, word), ids in zip(words, again, strict=True) if ids == [token]}
