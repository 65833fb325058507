"""Cloze templates: rows written into a template with masks, and what the model says at them turned into classes."""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hybridengine.errors import ConfigError
from hybridengine.seams.task import Feature, Row
from hybridengine.seams.types import Batch
from hybridengine.text.head_input import HeadInput
from hybridengine.text.label_words import AtMask, LabelWords, Verbalizer
from hybridengine.text.pieces import MASK, role_of, visible
from hybridengine.text.tokens import base_model, special_ids, usable_length

if TYPE_CHECKING:
    from hybridengine.run import Run
    from hybridengine.seams.context import Context

__all__ = ["Cloze"]


class Cloze:
    """A template for one tokenizer, and who reads classes from what the model says at its mask.

    The run's cloze is `run.cloze`. Other methods give it words (`use`) or read classes in their own way: they set
    `verbalizer`, in `on_run_start`.

    Shapes: B rows, L tokens, V vocabulary, C classes, K scored positions.

    Args:
        pieces: the template, of `pieces_of`.
        words: the words of each class, in class order; none where another method gives them.
        masked: whether the model fills masks, or (causal) predicts the token after the text before the mask.

    Attributes:
        pieces: the template as it was given.
        words: the label words, or None.
        verbalizer: turns what the model says at the mask into class logits; the words themselves at first.

    Raises:
        ConfigError: a word that the tokenizer does not know or that two classes share; a column after the mask for a
            causal model.
    """

    def __init__(self, tokenizer: Any, pieces: Sequence[str], words: Sequence[Sequence[str]], masked: bool) -> None:
        self.tokenizer = tokenizer
        self.masked = masked
        self.pieces = list(pieces)
        self.words: LabelWords | None = None
        self.verbalizer: Verbalizer | None = None
        self._special = special_ids(tokenizer)
        self._written = visible(self.pieces, masked)
        self._model: nn.Module | None = None
        self._hook: Any = None
        self._head: HeadInput | None = None
        if words:
            self.use(words)

    # ---- label words -----------------------------------------------------------------------------------------------

    def use(self, words: Sequence[Sequence[str]]) -> None:
        """Score these words of each class from now on; in place of any before."""
        tokens = [[self.tokens_of(word) for word in group] for group in words]
        self.verbalizer = self.words = LabelWords(words, tokens, self.masked)
        if self._model is not None:
            self.install(self._model)

    @property
    def columns(self) -> list[str]:
        """The columns that the template reads, in order, each once."""
        return list(dict.fromkeys(role for piece in self.pieces if (role := role_of(piece))))

    @property
    def masks(self) -> int:
        """How many masks stand in a row: as many as the longest word has tokens; none for a causal model."""
        return (self.words.masks if self.words else 1) if self.masked else 0

    def tokens_of(self, word: str, pieces: Sequence[str] | None = None) -> tuple[int, ...]:
        """The tokens that the word adds behind the text before the mask, as the tokenizer writes it there.

        Raises:
            ConfigError: it is no word of this tokenizer's, or merges with that text.
        """
        pieces = self.pieces if pieces is None else pieces
        at = pieces.index(MASK)
        before = pieces[at - 1] if at else ""
        before = "a" if role_of(before) else before
        gap = before[len(before.rstrip()) :]
        literal = before.rstrip() or ("a" if at > 1 else "")  # a column before the mask ends in some word
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

    def beside(self, others: Sequence[Sequence[str]]) -> list[str]:
        """The template with solved ones: behind it, the first next to it; before it where the model reads forward."""
        parted = [f"{self.tokenizer.sep_token or ''} "] if self.masked else ["\n\n"]
        if self.masked:
            return [*self.pieces, *(piece for other in others for piece in (*parted, *other))]
        return [*(piece for other in reversed(others) for piece in (*other, *parted)), *self.pieces]

    def install(self, model: nn.Module) -> None:
        """Work with this model from now on: prepare a causal one for words of several tokens; see `Branches`."""
        self._model = model
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        branches = self.words.branches if self.words else None
        if branches is not None and branches.suffix:
            probe = "".join("a" if role_of(piece) else piece for piece in self._written)
            self._hook = branches.install(model, self.tokenizer(probe)["input_ids"])

    def keep_states(self, model: nn.Module) -> Any:
        """Show verbalizers what the model's output layer reads, in place of the logits it makes of that.

        Returns:
            The output layer.

        Raises:
            ModelError: the model has no such layer, or does not use it.
        """
        self._head = HeadInput(base_model(model), self.tokenizer)
        return self._head.layer

    def whole_logits(self) -> Any:
        """A context inside which the model makes the logits of every position, whoever keeps its states."""
        return self._head.whole() if self._head else contextlib.nullcontext()

    # ---- rows ------------------------------------------------------------------------------------------------------

    def features(self, run: Run, rows: Sequence[Row], pieces: Sequence[Sequence[str]] | None = None) -> list[Feature]:
        """Features of a run's rows in the template; labels and the like as the task has them."""
        encoded = self.encode(rows, usable_length(run), pieces)
        own = ("input_ids", "token_type_ids", "perturbable", "length", "truncated")
        rest = [{k: v for k, v in f.items() if k not in own} for f in run.task.features(run, rows)]
        return [{**kept, **feature} for kept, feature in zip(rest, encoded, strict=True)]

    def encode(
        self, rows: Sequence[Row], max_length: int, pieces: Sequence[Sequence[str]] | None = None
    ) -> list[Feature]:
        """Features of rows in the template: `input_ids`, `token_type_ids` where known, `perturbable` (text tokens),
        `length`, `truncated`. Texts lose tokens at their end, the longest first; template and masks never do.

        Args:
            pieces: another template for each row.

        Raises:
            ConfigError: a row without one of the columns; a template that leaves no room for text.
        """
        if not rows:
            return []
        written = [self._written] * len(rows) if pieces is None else [visible(own, self.masked) for own in pieces]
        rendered = [self._render(row, own) for row, own in zip(rows, written, strict=True)]
        encoded = self.tokenizer(
            [text for text, _, _ in rendered],
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            return_attention_mask=False,
            verbose=False,
        )
        return [self._feature(encoded, i, ends, owners, max_length) for i, (_, ends, owners) in enumerate(rendered)]

    def _render(self, row: Row, pieces: Sequence[str]) -> tuple[str, list[int], list[str]]:
        """The filled template, the end of each piece in it, and each piece's role ("" for the template's own)."""
        text, ends, owners = "", [], []
        for piece in pieces:
            role = role_of(piece)
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
        if not self.masked:
            # What a tokenizer adds behind (end of text) would stand where the word belongs.
            while ids and encoded["special_tokens_mask"][index][len(ids) - 1]:
                ids.pop()
            suffix = self._suffix
            whose = whose[: len(ids)] + [""] * len(suffix)
            types = types and types[: len(ids)] + [0] * len(suffix)
            ids += suffix
        else:  # a mask typed into a text is no place for a label word
            stand_in = self.tokenizer.unk_token_id or 0
            ids = [stand_in if o and t == self.tokenizer.mask_token_id else t for t, o in zip(ids, whose, strict=True)]
        kept = self._kept(whose, max_length)
        end = len(ids) - len(self._suffix)
        literal = [not owner and ids[i] not in self._special and i < end for i, owner in enumerate(whose)]
        feature: Feature = {
            "template": [int(literal[i]) for i in kept],
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

    @property
    def _suffix(self) -> list[int]:
        """What a causal model's rows end with: the tokens of longer words, all but each one's last."""
        return self.words.branches.suffix if self.words and self.words.branches else []

    # ---- scores ----------------------------------------------------------------------------------------------------

    def classify(self, logits: Tensor, batch: Batch, ctx: Context | None = None) -> Tensor:
        """Class logits `[B, C]` from vocabulary logits `[B, L, V]`, in at least fp32, by the verbalizer.

        Raises:
            ConfigError: nobody gave label words.
        """
        if self.verbalizer is None:
            raise ConfigError("template: it names no label words; add `verbalizer: {label: word}` to it")
        seen = self.at_mask(logits, batch)
        return self.verbalizer.class_logits(seen if ctx is None else replace(seen, value=ctx.value))

    def at_mask(self, logits: Tensor, batch: Batch) -> AtMask:
        """What the model said at the scored positions, in the forward pass that gave `logits`."""
        rows = torch.arange(batch.size, device=logits.device)[:, None]
        positions = self.positions(batch)
        if self._head is not None and not self._head.makes_logits:
            return AtMask(logits, self._head.take()[rows, positions])
        return AtMask(logits[rows, positions])

    def positions(self, batch: Batch) -> Tensor:
        """Where label words are scored, `[B, K]`: the masks, or a text's last token and the tokens of longer words."""
        if self.masked:
            hits: Tensor = batch.inputs["input_ids"] == self.tokenizer.mask_token_id
            return hits.long().argsort(dim=1, descending=True, stable=True)[:, : self.masks]
        attention = batch.inputs["attention_mask"]
        if self.words and self.words.branches:
            return self.words.branches.columns(attention)
        return (attention.argmax(1, keepdim=True) + attention.sum(1, keepdim=True) - 1).clamp_min(0)
