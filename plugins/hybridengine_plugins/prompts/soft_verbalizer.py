"""Learned vectors in the place of label words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from hybridengine.plugin import ParamGroup, Run, Traits, hook, parameter, with_rate
from hybridengine.seams import Context, Work, mix, seeded, wide
from hybridengine.text import AtMask

__all__ = ["SoftVerbalizer"]


class ClassVectors(nn.Module):
    """A vector and a number for each class, in the place of a vocabulary's rows: `[C, D]` and `[C]`."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)


@dataclass(eq=False)
class SoftVerbalizer:
    """Learns, for each class, the word that would fit best: a vector where the vocabulary has one for each word.

    Maths: h is what the language model's output layer reads at the mask, `[D]`; the logit of class c is h·w_c + b_c.
    w_c and b_c start as the mean of the output layer's rows and biases over the tokens of the class's label words
    (then training starts at their logits), or, where the template names no words, as normal numbers of the rows' own
    spread, drawn by the seed. They learn `ratio` times as fast as the rest. The vocabulary's logits are not made.

    Paper: Hambardzumyan, Khachatrian, May 2021, "WARP: Word-level Adversarial ReProgramming", which tunes them beside
    learned prompt tokens on a frozen model; add `freeze: {layers: N}` or `lora` for that.
    Hooks: `on_run_start`, `transform_param_groups`, `wrap_step`. Cost: a plain step, and no output layer. Combines with
    everything that `template` combines with.
    """

    name: ClassVar[str] = "soft-verbalizer"
    traits: ClassVar[Traits] = Traits(
        family="prompts",
        slots=("verbalizer",),
        requires=("cloze", "labels"),
        effect="moved",
        cost="a plain step without the vocabulary's logits",
        paper="Hambardzumyan et al. 2021, arXiv:2101.00121",
        combines="template (needed; its words are the start) and what it combines with",
    )

    ratio: float = parameter(10.0, "learning rate of the vectors in those of the model", gt=0)
    _vectors: ClassVectors | None = field(default=None, init=False, repr=False)

    @hook
    def on_run_start(self, run: Run) -> None:
        """Make the vectors, and let them read the classes.

        Raises:
            ModelError: the model has no output layer whose input could be read.
        """
        if run.dry:
            return
        head = run.cloze.keep_states(run.model)
        bias = getattr(head, "bias", None)
        with torch.no_grad():
            weight = wide(head.weight.detach())
            offsets = weight.new_zeros(len(weight)) if bias is None else wide(bias.detach())
            if run.cloze.words is None:
                rows, numbers = _drawn(run, weight), weight.new_zeros(len(run.labels))
            else:
                words = run.cloze.words.tokens
                rows, numbers = (torch.stack([_mean(values, own) for own in words]) for values in (weight, offsets))
        self._vectors = ClassVectors(rows, numbers)
        run.add_module(self.name, self._vectors)
        run.cloze.verbalizer = self

    def class_logits(self, seen: AtMask) -> Tensor:
        """Class logits `[B, C]` from the states at the first mask."""
        assert self._vectors is not None and seen.states is not None
        weight = seen.value(f"{self.name}/weight", self._vectors.weight)
        bias = seen.value(f"{self.name}/bias", self._vectors.bias)
        return functional.linear(seen.states[:, 0].to(weight.dtype), weight, bias)

    @hook
    def transform_param_groups(self, run: Run, groups: list[ParamGroup]) -> list[ParamGroup]:
        """The vectors in groups of their own."""
        return with_rate(run, groups, lambda name: name.startswith(f"{self.name}/"), self.ratio)

    @hook
    def wrap_step(
        self, inner: Callable[..., Mapping[str, Tensor]], ctx: Context, works: Sequence[Work]
    ) -> Mapping[str, Tensor]:
        """The step; how far the vectors moved in it is reported."""
        if self._vectors is None:  # on the toy run of the plan
            return inner(ctx, works)
        before = self._vectors.weight.detach().clone()
        terms = inner(ctx, works)
        ctx.report(self, moved=(self._vectors.weight.detach() - before).norm())
        return terms


def _mean(rows: Tensor, words: Sequence[Sequence[int]]) -> Tensor:
    """The mean over words of the mean over each one's tokens."""
    return torch.stack([rows[list(word)].mean(0) for word in words]).mean(0)


def _drawn(run: Any, weight: Tensor) -> Tensor:
    with seeded(torch.default_generator, mix(run.seed, "soft-verbalizer")):
        drawn = torch.randn(len(run.labels), weight.shape[1])
    return weight.mean(0) + weight.std(0) * drawn.to(weight)
