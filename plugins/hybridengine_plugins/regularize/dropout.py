"""Dropout: other rates than the checkpoint's own."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from hybridengine.errors import ModelError
from hybridengine.plugin import Run, StackView, Traits, hook, parameter

__all__ = ["Dropout"]

# Rates that layers keep as plain numbers and hand to a function: attention of Llama, T5, BART and their kin.
_RATES = ("dropout", "attention_dropout", "activation_dropout", "dropout_prob", "attn_dropout", "hidden_dropout")


@dataclass(eq=False)
class Dropout:
    """Trains with another dropout rate than the checkpoint's configuration says.

    Maths: every unit is 0 with probability p and 1/(1 − p) times itself else, in training only. `modules` chooses by
    name: `["*attention*"]` leaves the feed-forward layers and the head as they are. Adapters keep their own rate.
    Checkpoints of decoders often have none at all; this is how `rdrop` gets something to compare there.

    Paper: Srivastava et al. 2014, "Dropout: A Simple Way to Prevent Neural Networks from Overfitting".
    Hooks: `transform_model`, `check_stack`. Cost: none. Combines with everything; at p = 0 not with `rdrop`.
    """

    traits: ClassVar[Traits] = Traits(
        family="regularize",
        order=-10,  # before adapters, whose dropout is their own
        paper="Srivastava et al. 2014, JMLR 15",
        combines="everything; at p = 0 not with rdrop",
    )

    p: float = parameter(0.1, "share of units that are dropped", ge=0, lt=1)
    modules: list[str] = parameter(lambda: ["*"], "patterns of the names of modules that drop", min_length=1)

    def also_provides(self) -> tuple[str, ...]:
        """What needs two different passes gets them, also on models without dropout of their own."""
        return ("dropout",) if self.p > 0 else ()

    @hook
    def check_stack(self, stack: StackView) -> list[str]:
        """Without any dropout left, methods that compare two masks would compare a pass with itself."""
        if self.p > 0 or self.modules != ["*"] or any("dropout" in m.provides for m in stack.methods):
            return []
        return [
            f"dropout: p is 0, but {method.name} needs dropout; set p above 0, or remove {method.name}"
            for method in stack.methods
            if "dropout" in method.traits.requires
        ]

    @hook
    def transform_model(self, run: Run, model: nn.Module) -> nn.Module:
        """Set the rates.

        Raises:
            ModelError: no module of that name drops anything.
        """
        places = list(_places(model))
        chosen = [(m, a) for name, m, a in places if any(fnmatch.fnmatchcase(name, p) for p in self.modules)]
        if not chosen:
            known = ", ".join(sorted({name.rpartition(".")[2] or name for name, *_ in places})) or "none"
            raise ModelError(
                f"dropout: no module named {', '.join(self.modules)} drops anything; those that do end in: {known};"
                " change `modules` or remove `dropout`"
            )
        for module, attribute in chosen:
            setattr(module, attribute, self.p)
        run.say(f"dropout: {self.p:g} in {len(chosen)} places")
        return model


def _places(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Each rate of the model: name, the module that has it, and the attribute."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            yield name, module, "p"
            continue
        for attribute in _RATES:
            if isinstance(vars(module).get(attribute), float):
                yield f"{name}.{attribute}" if name else attribute, module, attribute
