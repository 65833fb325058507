"""BitFit: biases and the head."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from hybridengine.errors import ModelError
from hybridengine.plugin import Run, Traits, hook, parameter

__all__ = ["BitFit"]


@dataclass(eq=False)
class BitFit:
    """Trains the bias terms and the new head; every matrix keeps its pretrained values.

    Maths: W x + b with b trained and W fixed, also in layer norms. Under 0.1% of BERT's parameters, so the optimizer
    needs hardly any memory; it bears rates ten times those of full tuning (the paper: 1e-4 to 1e-3).

    Paper: Ben Zaken, Ravfogel, Goldberg 2022, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based
    Masked Language-models".
    Hooks: `transform_model`. Cost: no weight gradients of the matrices, about 2 of 3 of a plain step. Combines with
    everything but `lora`, `full` and other adapters. Models without biases (Llama, T5) are refused.
    """

    name: ClassVar[str] = "bitfit"
    traits: ClassVar[Traits] = Traits(
        family="adapters",
        slots=("backbone",),
        cost="about 2 of 3 of a plain step; optimizer memory for biases and head alone",
        paper="Ben Zaken et al. 2022, arXiv:2106.10199",
        combines="attacks, consistency, meta-learning, templates; not lora or full",
    )

    heads: list[str] | None = parameter(None, "patterns of parameters trained in full; by default the task's head")

    @hook
    def transform_model(self, run: Run, model: nn.Module) -> nn.Module:
        """Fix everything but biases, the head, and what the checkpoint lacked.

        Raises:
            ModelError: the model has no biases outside its head.
        """
        heads = [*run.task.head, *run.missing_parameters] if self.heads is None else list(self.heads)
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        head = {name for name in named if any(fnmatch.fnmatchcase(name, pattern) for pattern in heads)}
        biases = {name for name in named if name.rpartition(".")[2] == "bias"} - head
        if not biases:
            raise ModelError("bitfit: this model has no biases to train; use `lora` instead")
        for name in named.keys() - biases - head:
            named[name].requires_grad_(False)
        run.say(f"bitfit: {len(biases)} biases are trained, and {len(head)} tensors of the head in full")
        return model
