"""Cloze templates: rows written into a template with masks, and label words scored at them."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hybridengine.errors import ConfigError
from hybridengine.seams.task import Feature, Row
from hybridengine.seams.types import Batch
from hybridengine.text.branches import Branches
from hybridengine.text.tokens import special_ids

__all__ = ["Cloze"]

MASK = "[MASK]"
_FIELD = re.compile(r"\{\w+\}")


class Cloze:
    """A template with its label words, for one tokenizer.

    Shapes: B rows, L tokens, V vocabulary, C classes, W words, M tokens of the longest word, K scored positions.

    Args:
        pieces: the template in order: literal text, `{role}` fields, and `[MASK]` once.
        words: the words of each class, in class order.
        masked: whether the model fills masks, or (causal) predicts the token after the text before the mask.

    Raises:
        ConfigError: a word that the tokenizer does not know or that two classes share; a column after the mask for a
            causal model.
    """

    def __init__(self, tokenizer: Any, pieces: Sequence[str], words: Sequence[Sequence[str]], masked: bool) -> None:
        self.tokenizer = tokenizer
        self.masked = masked
        self._special = special_ids(tokenizer)
        self._pieces = list(pieces)
        self._at = self._pieces.index(MASK)
        tokens = [[self._tokens_of(word) for word in group] for group in words]
        self._check_distinct(words, tokens)
        flat = [word for group in tokens for word in group]
        self.masks = max(map(len, flat)) if masked else 0
        self.branches = None if masked else Branches(flat)
        slots = torch.arange(self.masks).expand(len(flat), -1) if self.branches is None else self.branches.slots
        self._constants: tuple[Tensor, ...] = (slots, *_tables(flat, masked), *_groups(tokens))
        if not masked:
            self._cut_behind_mask()

    # ---- label words -----------------------------------------------------------------------------------------------

    def _tokens_of(self, word: str) -> tuple[int, ...]:
        """The tokens that the word adds behind the text before the mask, as the tokenizer writes it there."""
        before = self._pieces[self._at - 1] if self._at else ""
        before = "a" if _role(before) else before
        gap = before[len(before.rstrip()) :]
        literal = before.rstrip() or ("a" if self._at > 1 else "")  # a column before the mask ends in some word
        short, whole = (
            self.tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (literal, literal + gap + word.strip())
        )
        if whole[: len(short)] != short or len(whole) == len(short):
            raise ConfigError(f"template: {word!r} merges with the text before [MASK]; put a space before [MASK]")
        added = tuple(whole[len(short) :])
        if self.tokenizer.unk_token_id in added:
            raise ConfigError(f"template: the tokenizer does not know the label word {word!r}; choose another word")
        return added

    def _check_distinct(self, words: Sequence[Sequence[str]], tokens: Sequence[Sequence[tuple[int, ...]]]) -> None:
        owner: dict[tuple[int, ...], tuple[int, str]] = {}
        for index, group in enumerate(tokens):
            for word, ids in zip(words[index], group, strict=True):
                other, same = owner.setdefault(ids, (index, word))
                if other != index:
                    raise ConfigError(
                        f"template: two labels share a word: {same!r} and {word!r} are the same tokens; choose others"
                    )

    def _cut_behind_mask(self) -> None:
        """A causal model sees only what stands before the mask; literal text behind it is dropped."""
        if after := [piece for piece in self._pieces[self._at + 1 :] if _role(piece)]:
            raise ConfigError(
                f"template: a causal model cannot see {after[0]}, which comes after [MASK]; put [MASK] at the end"
            )
        before = self._pieces[: self._at]
        self._pieces = [*before[:-1], before[-1].rstrip()] if before else before

    def install(self, model: nn.Module) -> None:
        """Prepare a causal model for words of several tokens; see `Branches`."""
        if self.branches is not None and self.branches.suffix:
            probe = "".join("a" if _role(piece) else piece for piece in self._pieces)
            self.branches.install(model, self.tokenizer(probe)["input_ids"])

    # ---- rows ------------------------------------------------------------------------------------------------------

    def encode(self, rows: Sequence[Row], max_length: int) -> list[Feature]:
        """Features of rows in the template: `input_ids`, `token_type_ids` where known, `perturbable` (text tokens),
        `length`, `truncated`. Texts lose tokens at their end, the longest first; template and masks never do.

        Raises:
            ConfigError: a row without one of the columns; a template that leaves no room for text.
        """
        if not rows:
            return []
        rendered = [self._render(row) for row in rows]
        encoded = self.tokenizer(
            [text for text, _, _ in rendered],
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            return_attention_mask=False,
            verbose=False,
        )
        return [self._feature(encoded, i, ends, owners, max_length) for i, (_, ends, owners) in enumerate(rendered)]

    def _render(self, row: Row) -> tuple[str, list[int], list[str]]:
        """The filled template, the end of each piece in it, and each piece's role ("" for the template's own)."""
        text, ends, owners = "", [], []
        for piece in self._pieces:
            role = _role(piece)
            if role and row.get(role) is None:
                raise ConfigError(f"template: a row has no {role!r} for {piece}; its columns are {', '.join(row)}")
            text += str(row[role]) if role else self.tokenizer.mask_token * self.masks if piece == MASK else piece
            ends.append(len(text))
            owners.append(role)
        return text, ends, owners

    def _feature(
        self, encoded: Mapping[str, Any], index: int, ends: list[int], owners: list[str], max_length: int
    ) -> Feature:
        ids: list[int] = list(encoded["input_ids"][index])
        # A token belongs to the piece that holds its last character; added special tokens have none.
        spans = encoded["offset_mapping"][index]
        whose = [owners[bisect_right(ends, end - 1)] if end else "" for _, end in spans]
        types = list(encoded["token_type_ids"][index]) if "token_type_ids" in encoded else None
        if self.branches is not None:
            # What a tokenizer adds behind (end of text) would stand where the word belongs.
            while ids and encoded["special_tokens_mask"][index][len(ids) - 1]:
                ids.pop()
            suffix = self.branches.suffix
            whose = whose[: len(ids)] + [""] * len(suffix)
            types = types and types[: len(ids)] + [0] * len(suffix)
            ids += suffix
        else:  # a mask typed into a text is no place for a label word
            stand_in = self.tokenizer.unk_token_id or 0
            ids = [stand_in if o and t == self.tokenizer.mask_token_id else t for t, o in zip(ids, whose, strict=True)]
        kept = self._kept(whose, max_length)
        feature: Feature = {
            "input_ids": [ids[i] for i in kept],
            "perturbable": [int(bool(whose[i]) and ids[i] not in self._special) for i in kept],
            "length": len(kept),
            "truncated": len(kept) < len(ids),
        }
        if types is not None:
            feature["token_type_ids"] = [types[i] for i in kept]
        return feature

    def _kept(self, whose: Sequence[str], max_length: int) -> list[int]:
        counts = {role: whose.count(role) for role in dict.fromkeys(whose) if role}
        room = max_length - whose.count("")
        if room < len(counts):
            raise ConfigError(
                f"template: the template alone takes {max_length - room} of {max_length} tokens and leaves no room for"
                " text; shorten it or raise `train.max_length`"
            )
        left: dict[str, int] = {}
        for number, role in enumerate(sorted(counts, key=counts.__getitem__)):
            left[role] = min(counts[role], (room - sum(left.values())) // (len(counts) - number))
        kept = []
        for position, role in enumerate(whose):
            if role:
                left[role] -= 1
            if not role or left[role] >= 0:
                kept.append(position)
        return kept

    # ---- scores ----------------------------------------------------------------------------------------------------

    def classify(self, logits: Tensor, batch: Batch) -> Tensor:
        """Class logits `[B, C]` from vocabulary logits `[B, L, V]`, in at least fp32."""
        rows = torch.arange(logits.shape[0], device=logits.device)
        picked = logits[rows[:, None], self.positions(batch)]
        wide = picked if picked.dtype == torch.float64 else picked.float()
        return self.score(wide.log_softmax(-1))

    def positions(self, batch: Batch) -> Tensor:
        """Where label words are scored, `[B, K]`: the masks, or a text's last token and the tokens of longer words."""
        if self.branches is not None:
            return self.branches.columns(batch.inputs["attention_mask"])
        hits: Tensor = batch.inputs["input_ids"] == self.tokenizer.mask_token_id
        return hits.long().argsort(dim=1, descending=True, stable=True)[:, : self.masks]

    def _on(self, device: torch.device) -> tuple[Tensor, ...]:
        """The tables of `score`; they stay on the device of their last use: a copy in each forward makes it wait."""
        if self._constants[0].device != device:
            self._constants = tuple(table.to(device) for table in self._constants)
        return self._constants

    def score(self, log_probabilities: Tensor) -> Tensor:
        """Class logits `[B, C]` from log-probabilities `[B, K, V]` at `positions`.

        A word scores the mean (masked) or the sum (causal: the chain rule) of its tokens' log-probabilities, a class
        the log of the mean probability of its words.
        """
        slots, table, share, groups, sizes = self._on(log_probabilities.device)
        tokens = log_probabilities[:, slots, table]  # [B, W, M]
        words = (tokens * share.to(tokens.dtype)).sum(-1)
        by_class = words[:, groups.clamp_min(0)].masked_fill(groups.eq(-1), torch.finfo(words.dtype).min)  # [B, C, N]
        logits: Tensor = by_class.logsumexp(-1) - sizes.to(words.dtype).log()
        return logits


def _role(piece: str) -> str:
    """The column that a piece stands for, or "" for literal text."""
    return piece[1:-1] if _FIELD.fullmatch(piece) else ""


def _tables(words: Sequence[tuple[int, ...]], masked: bool) -> tuple[Tensor, Tensor]:
    """Token ids `[W, M]`, 0-padded, and what each token counts in its word's score `[W, M]`."""
    longest = max(map(len, words))
    table = torch.tensor([[*word, *[0] * (longest - len(word))] for word in words])
    share = [[1 / len(word) if masked else 1.0] * len(word) + [0.0] * (longest - len(word)) for word in words]
    return table, torch.tensor(share, dtype=torch.float64)


def _groups(tokens: Sequence[Sequence[tuple[int, ...]]]) -> tuple[Tensor, Tensor]:
    """Word numbers of each class `[C, N]`, padded by -1, and words per class `[C]`."""
    numbers = iter(range(sum(map(len, tokens))))
    groups = [[next(numbers) for _ in group] for group in tokens]
    widest = max(map(len, groups))
    padded = torch.tensor([group + [-1] * (widest - len(group)) for group in groups])
    return padded, torch.tensor([len(group) for group in groups])
