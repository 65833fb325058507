"""Freezing: the lower layers, or the parameters that match patterns, keep their pretrained values."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from hybridengine.errors import ModelError
from hybridengine.plugin import Run, Traits, hook, parameter, parameter_levels

__all__ = ["Freeze"]


@dataclass(eq=False)
class Freeze:
    """Keeps the lower part of the model at its pretrained values.

    Maths: θ = (θ_f, θ_t); only θ_t is optimised. Lower layers hold general features and may be kept; with few rows
    that regularises, and the backward pass ends where the frozen part begins (unless an embedding attack needs it).

    Paper: Lee, Tang, Lin 2019, "What Would Elsa Do? Freezing Layers During Transformer Fine-Tuning".
    Hooks: `transform_model`. Cost: less than a plain step. Combines with everything; over `lora` it freezes the
    adapters of the lower layers.
    """

    traits: ClassVar[Traits] = Traits(
        family="adapters",
        cost="the backward pass is shorter by the frozen layers",
        paper="Lee, Tang, Lin 2019, arXiv:1911.03090",
        combines="everything; with gradual-unfreeze the frozen part stays frozen",
    )

    layers: int | None = parameter(None, "freeze the embeddings and this many layers from the bottom (0: embeddings)")
    patterns: list[str] = parameter(list, "freeze parameters whose names match, e.g. `bert.embeddings*`")

    def __post_init__(self) -> None:
        if self.layers is None and not self.patterns:
            raise ValueError("nothing to freeze: give `layers: 6`, or `patterns: ['*embeddings*']`")
        if self.layers is not None and self.layers < 0:
            raise ValueError(f"layers must be 0 or more, got {self.layers}")

    @hook
    def transform_model(self, run: Run, model: nn.Module) -> nn.Module:
        """Switch off the gradients of the chosen parameters.

        Raises:
            ModelError: a pattern that matches nothing, more layers than the model has, or nothing left to train.
        """
        named = dict(model.named_parameters())
        chosen = self._lower(run, model) | self._matching(list(named))
        frozen = [name for name in chosen if named[name].requires_grad]
        if not frozen:
            raise ModelError("freeze: every parameter that it names is frozen already; remove `freeze`")
        if len(frozen) == sum(p.requires_grad for p in named.values()):
            raise ModelError(
                f"freeze: all {len(frozen)} trainable parameter tensors would be frozen and nothing could be trained;"
                " freeze fewer `layers`, or narrow `patterns`"
            )
        for name in frozen:
            named[name].requires_grad_(False)
        size, total = sum(named[name].numel() for name in frozen), sum(p.numel() for p in named.values())
        run.say(f"freeze: {size:,} of {total:,} parameters ({100 * size / total:.1f}%) keep their values")
        return model

    def _lower(self, run: Run, model: nn.Module) -> set[str]:
        if self.layers is None:
            return set()
        levels, top = parameter_levels(model, run.task.head)
        if self.layers > top - 1:
            raise ModelError(f"freeze: layers is {self.layers}, but this model has {top - 1} layers")
        return {name for name, level in levels.items() if level <= self.layers}

    def _matching(self, names: list[str]) -> set[str]:
        chosen: set[str] = set()
        for pattern in self.patterns:
            found = fnmatch.filter(names, pattern)
            if not found:
                raise ModelError(
                    f"freeze: pattern {pattern!r} matches no parameter of this model; its parameters are named like"
                    f" {names[0]!r} and {names[-1]!r}"
                )
            chosen.update(found)
        return chosen
