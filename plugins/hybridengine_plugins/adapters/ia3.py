"""(IA)³ through PEFT: one learned factor per channel, nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from hybridengine.errors import ModelError
from hybridengine.model import linear_targets, named, new_heads, task_type, transposed, wrap_by_peft
from hybridengine.plugin import Band, Run, Traits, hook, parameter

__all__ = ["IA3"]


@dataclass(eq=False)
class IA3:
    """Trains one factor per channel of keys, values and feed-forward layers, and new heads.

    Maths: keys and values become l ⊙ (W x), the feed-forward's second layer W (l ⊙ h), each l from 1, so that training
    starts at the pretrained function exactly. Merging multiplies l into W.

    Paper: Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning".
    Hooks: `transform_model`. Cost: no weight gradients of the backbone, about 2 of 3 of a plain step; a hundredth of
    LoRA's parameters. It wants a learning rate ten times LoRA's (paper: 3e-3). Combines with everything but `full` and
    other adapters.
    """

    name: ClassVar[str] = "ia3"
    traits: ClassVar[Traits] = Traits(
        family="adapters",
        order=Band.LEAF,
        slots=("backbone",),
        cost="about 2 of 3 of a plain step; optimizer memory for the factors alone",
        paper="Liu et al. 2022, arXiv:2205.05638",
        combines="attacks, consistency, meta-learning, templates; not full",
    )

    targets: list[str] | None = parameter(None, "name endings of scaled layers; PEFT's choice for the model type")
    feedforward: list[str] | None = parameter(None, "those of the targets that are scaled at their input")
    heads: list[str] | None = parameter(None, "modules trained in full and saved; by default the task's head")

    def __post_init__(self) -> None:
        if wrong := sorted(set(self.feedforward or ()) - set(self.targets or self.feedforward or ())):
            raise ValueError(f"feedforward names {wrong[0]!r}, which is none of the targets {self.targets}")

    @hook
    def transform_model(self, run: Run, model: nn.Module) -> nn.Module:
        """Wrap the model by PEFT.

        Raises:
            ModelError: a target names no layer, or PEFT has no choice for this model type and none was given.
        """
        from peft import IA3Config

        heads = new_heads(run, model, self.heads)
        targets = linear_targets(model, heads, self.targets, "TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING", "ia3")
        config = IA3Config(
            target_modules=targets,
            feedforward_modules=self._feedforward(model, targets),
            modules_to_save=list(heads) or None,  # PEFT adds to the list it is given
            task_type=task_type(model),
            fan_in_fan_out=transposed(model, targets),
        )
        adapted = wrap_by_peft(run, model, "ia3", config)
        whole = f"; {', '.join(heads)} trained in full" if heads else ""
        count = sum(name.endswith("ia3_l") for name, _ in adapted.named_modules())
        run.say(f"ia3: factors on {count} layers{whole}")
        return adapted

    def _feedforward(self, model: nn.Module, targets: list[str]) -> list[str]:
        """Those of the targets that are scaled at their input: given, or PEFT's choice among PEFT's targets."""
        if self.feedforward is not None:
            return list(self.feedforward)
        if self.targets is not None:
            return []
        from peft.utils import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as choices

        kind = getattr(getattr(model, "config", None), "model_type", "")
        if kind not in choices:
            linear = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
            raise ModelError(
                f"ia3: PEFT has no choice of layers for models of type {kind!r}; give `targets` and `feedforward`"
                f" (linear layers: {', '.join(linear)})"
            )
        return [ending for ending in choices[kind] if named(targets, ending) or ending in targets]
