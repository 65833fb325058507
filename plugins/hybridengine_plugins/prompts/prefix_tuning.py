"""Prefixes: learned keys and values that every attention layer sees before those of the text."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from hybridengine.model import AttentionPrefix, freeze_pretrained
from hybridengine.plugin import Run, Traits, hook, parameter
from hybridengine.seams import Vectors, mix, seeded

__all__ = ["PTuningV2", "PrefixTuning"]


@dataclass(eq=False)
class PTuningV2:
    """Trains keys and values that stand before the text's in every attention layer, and new heads; all else is frozen.

    Maths: softmax(q·[P_K; K]ᵀ/√d)·[P_V; V] with P_K, P_V ∈ R^{n×d} of each layer and head learned, random at the start
    with the spread of the layer's own keys and values. Every token sees the prefix, which takes no position: tokens
    keep theirs, on either side of padding.

    Paper: Liu et al. 2022, "P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally".
    Hooks: `transform_model`, `on_run_start`. Cost: attention over n more keys, no weight gradients of the model.
    Combines with `lora` and other adapters (trained together), `full`, attacks, consistency, `template`,
    `prompt-tuning`. Not with `train.compile`, nor with a `model.attention` other than sdpa.
    """

    name: ClassVar[str] = "p-tuning-v2"
    traits: ClassVar[Traits] = Traits(
        family="prompts",
        slots=("prefix",),
        cost="about 2 of 3 of a plain step, and attention over n more keys",
        paper="Liu et al. 2022, arXiv:2110.07602",
        combines="lora, full, attacks, consistency terms, template, prompt-tuning; not train.compile",
    )

    n: int = parameter(16, "keys and values before each text", ge=1)

    @hook
    def transform_model(self, run: Run, model: nn.Module) -> nn.Module:
        """Freeze all but new heads, unless an adapter or `full` says what is trained."""
        return freeze_pretrained(run, model)

    @hook
    def on_run_start(self, run: Run) -> None:
        """Add the prefixes, and slip them into the model's attention.

        Raises:
            ConfigError: with `train.compile` or another attention than torch's.
            ModelError: the model's attention cannot be reached.
        """
        if run.dry:  # the toy model of the plan has no attention
            return
        prefix = AttentionPrefix(run, self.name)
        with seeded(torch.default_generator, mix(run.seed, self.name)):
            module = self._module(torch.stack([_start(keys, values, self.n) for keys, values in prefix.seen]))
        run.add_module(self.name, module, part_of_model=True)
        prefix.install()
        run.say(f"{self.name}: predict with hybridengine; `best/` by itself is the model without its prefix")

    def _module(self, start: Tensor) -> nn.Module:
        return Vectors(start)


@dataclass(eq=False)
class PrefixTuning(PTuningV2):
    """As `p-tuning-v2`, the keys and values made by a small network of one vector for each place in the prefix.

    Maths: P = P₀ + W₂·tanh(W₁·e + b₁) + b₂ with e ∈ R^{n×hidden} learned, shared by all layers; W₂ and b₂ start at 0,
    so that P starts at random keys and values of the right size. The network couples the layers and steadies training.

    Paper: Li and Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation".
    Hooks, cost and combinations: as `p-tuning-v2`; the network has hidden × (all keys and values of one place) weights.
    """

    name: ClassVar[str] = "prefix-tuning"
    traits: ClassVar[Traits] = replace(PTuningV2.traits, paper="Li and Liang 2021, arXiv:2101.00190")

    hidden: int = parameter(128, "width of the network", ge=1)

    def _module(self, start: Tensor) -> nn.Module:
        return _Reparametrised(start, self.hidden)


class _Reparametrised(Vectors):
    """Keys and values `[layers, 2, heads, n, d]`, changed by a network of their places."""

    def __init__(self, start: Tensor, hidden: int) -> None:
        super().__init__(start)
        layers, two, heads, n, width = start.shape
        self.places = nn.Parameter(torch.randn(n, hidden, dtype=start.dtype, device=start.device))
        self.inner = nn.Linear(hidden, hidden, dtype=start.dtype, device=start.device)
        self.outer = nn.Linear(hidden, layers * two * heads * width, dtype=start.dtype, device=start.device)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self) -> Tensor:
        layers, two, heads, n, width = self.vectors.shape
        change: Tensor = self.outer(torch.tanh(self.inner(self.places)))
        return self.vectors + change.view(n, layers, two, heads, width).permute(1, 2, 3, 0, 4)


def _start(keys: Tensor, values: Tensor, n: int) -> Tensor:
    """Random keys and values `[2, heads, n, d]`, as spread as those seen."""
    drawn = torch.randn(2, keys.shape[1], n, keys.shape[3], dtype=torch.float64)
    spread = torch.stack([seen.std((0, 2), keepdim=False)[:, None] for seen in (keys, values)]).cpu()
    return (drawn * spread).to(torch.promote_types(keys.dtype, torch.float32)).to(keys.device)
