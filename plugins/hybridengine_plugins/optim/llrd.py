"""Layer-wise learning-rate decay: the deeper a layer, the smaller its rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hybridengine.errors import ModelError
from hybridengine.plugin import ParamGroup, Run, Traits, hook, parameter, parameter_levels

__all__ = ["LLRD"]


@dataclass(eq=False)
class LLRD:
    """Gives every layer its own learning rate, `decay` times that of the layer above.

    Maths: with N layers, η_head = η, η_l = η·decay^(N + 1 − l) for layer l = N..1, and η·decay^(N + 1) for the
    embeddings. Lower layers hold general features and should move less. Pooler, final norm and run modules (prompts)
    count as head; encoder and decoder of one model are counted alike; schedules scale all rates together.

    Paper: Howard and Ruder 2018 (ULMFiT, "discriminative fine-tuning"); Clark et al. 2020 (ELECTRA) use 0.8–0.9.
    Hooks: `transform_param_groups`. Cost: none. Combines with everything.
    """

    traits: ClassVar[Traits] = Traits(
        family="optim",
        paper="Howard and Ruder 2018, arXiv:1801.06146",
        combines="everything; with lora it scales the adapters' rates",
    )

    decay: float = parameter(0.9, "factor from one layer to the next below", gt=0, le=1)

    @hook
    def transform_param_groups(self, run: Run, groups: list[ParamGroup]) -> list[ParamGroup]:
        """Split each group by level.

        Raises:
            ModelError: for a model without numbered layers, where nothing could decay.
        """
        levels, top = parameter_levels(run.model, run.task.head)
        if top == 1:
            raise ModelError("llrd: no parameter of this model carries a layer number, so rates cannot decay by layer")
        split = []
        for group in groups:
            by_level: dict[int, ParamGroup] = {}
            for name, value in group.parameters.items():
                level = levels.get(name, top)
                if level not in by_level:
                    rate = group.options.get("lr", run.config.train.lr) * self.decay ** (top - level)
                    by_level[level] = ParamGroup({}, **{**group.options, "lr": rate})
                by_level[level].parameters[name] = value
            split += [by_level[level] for level in sorted(by_level)]
        return split
