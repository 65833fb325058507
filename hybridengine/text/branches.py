"""Several continuations of one text in one row: what a causal model needs to score words of several tokens at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hybridengine.errors import ModelError

__all__ = ["Branches"]

_TOLERANCE = 1e-3  # log-probabilities in fp32; a mask that is not obeyed moves them by much more


class Branches:
    """Words behind a text, each seeing the text and itself, none the others.

    A row is `text ++ suffix`; the suffix holds all but the last token of every word, one word after the other. A hook
    on the model turns the row's mask `[B, L]` into one `[B, 1, L, L]` and numbers each word's positions from the end
    of the text, so that one forward gives log p(word | text) for every word, exactly as one forward per word would.

    Args:
        words: token ids of every word.
    """

    def __init__(self, words: Sequence[Sequence[int]]) -> None:
        self.suffix: list[int] = []
        owner: list[int] = []
        offset: list[int] = []
        slots: list[list[int]] = []
        longest = max(map(len, words))
        for number, word in enumerate(words):
            # Slot 0 is the text's last token, slot 1 + i the suffix's token i: each predicts the token behind it.
            first = 1 + len(self.suffix)
            slots.append([0, *range(first, first + len(word) - 1), *[0] * (longest - len(word))])
            self.suffix += word[:-1]
            owner += [number] * (len(word) - 1)
            offset += range(len(word) - 1)
        self.slots = torch.tensor(slots)
        self._owner, self._offset = torch.tensor([*owner, -1]), torch.tensor([*offset, 0])

    def columns(self, attention: Tensor) -> Tensor:
        """Columns `[B, 1 + S]` of the text's last token and of the S suffix tokens, for either padding side."""
        first = attention.argmax(1, keepdim=True)
        text = attention.sum(1, keepdim=True) - len(self.suffix)
        return (first + text - 1 + torch.arange(1 + len(self.suffix), device=attention.device)).clamp_min(0)

    def layout(self, attention: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The additive mask `[B, 1, L, L]` and the positions `[B, L]` of rows with the suffix."""
        size = len(self.suffix)
        real = attention.bool()
        place = attention.cumsum(1) - 1
        text = (attention.sum(1, keepdim=True) - size).clamp_min(0)
        branch = torch.where(real & (place >= text), (place - text).clamp(0, size), size)  # size: not in the suffix
        if self._owner.device != attention.device:  # once, for a copy in every forward would make it wait
            self._owner, self._offset = self._owner.to(attention.device), self._offset.to(attention.device)
        owner, offset = self._owner[branch], self._offset[branch]
        positions = torch.where(owner >= 0, text + offset, place).clamp_min(0)
        earlier = place[:, :, None] >= place[:, None, :]
        visible = real[:, None, :] & earlier & ((owner[:, None, :] < 0) | (owner[:, None, :] == owner[:, :, None]))
        # A row that sees nothing would be NaN; padding sees itself, and nobody sees padding.
        visible |= torch.eye(attention.shape[1], dtype=torch.bool, device=attention.device)
        mask = torch.zeros(visible.shape, dtype=dtype, device=attention.device)
        return mask.masked_fill(~visible, torch.finfo(dtype).min)[:, None], positions

    def install(self, model: nn.Module, text: Sequence[int]) -> Any:
        """Add the hook, and prove on a short text that this architecture obeys mask and positions.

        Returns:
            Its handle, to remove it.

        Raises:
            ModelError: if it does not.
        """
        handle = model.register_forward_pre_hook(self._before, with_kwargs=True)
        try:
            gap = self._gap(model, handle, list(text))
        except (ValueError, RuntimeError, TypeError, IndexError) as error:
            raise ModelError(f"template: {self._refusal(model)} ({str(error).splitlines()[0]})") from error
        if gap > _TOLERANCE:
            raise ModelError(f"template: {self._refusal(model)}")
        return model.register_forward_pre_hook(self._before, with_kwargs=True)

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        attention = kwargs["attention_mask"]
        mask, positions = self.layout(attention, next(module.parameters()).dtype)
        return args, {**kwargs, "attention_mask": mask, "position_ids": positions}

    def _gap(self, model: nn.Module, handle: Any, text: list[int]) -> float:
        """Largest difference between a suffix token's predictions in company and alone; removes the hook."""
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                device = next(model.parameters()).device
                ids = torch.tensor([text + self.suffix], device=device)
                together = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.log_softmax(-1)[0]
                handle.remove()
                gaps = []
                for number in sorted(set(self._owner[:-1].tolist())):
                    mine = (self._owner[:-1] == number).nonzero()[:, 0].tolist()
                    alone = torch.tensor([text + [self.suffix[i] for i in mine]], device=device)
                    expected = model(input_ids=alone, attention_mask=torch.ones_like(alone)).logits.log_softmax(-1)[0]
                    found = together[[len(text) + i for i in mine]]
                    gaps.append(float((found - expected[len(text) :]).abs().max()))
        finally:
            handle.remove()
            model.train(training)
        return max(gaps)

    def _refusal(self, model: nn.Module) -> str:
        return (
            f"{type(model).__name__} cannot score label words of several tokens (it does not take a mask of its own for"
            " each of them); choose words of one token, or another model"
        )
