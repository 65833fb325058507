"""LoRA and its kin through PEFT: low-rank updates of chosen layers, the backbone frozen."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from hybridengine.model import linear_targets, new_heads, task_type, transposed, wrap_by_peft
from hybridengine.plugin import Band, ParamGroup, Run, Traits, hook, parameter, with_rate

__all__ = ["DoRA", "LoRA", "LoRAPlus", "RsLoRA"]

_CHOICES = "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"


@dataclass(eq=False)
class LoRA:
    """Trains low-rank updates of chosen layers, and new heads; the backbone keeps its pretrained values.

    Maths: W + (alpha/r)·B·A with A ∈ R^{r×in} random and B ∈ R^{out×r} zero, so that training starts at the
    pretrained function exactly; merging adds the product into W and gives the same outputs. At B = 0 the gradient of
    A is 0: the first step moves B alone.

    Paper: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
    Hooks: `transform_model`. Cost: no weight gradients of the backbone, about 2 of 3 of a plain step, and a small
    fraction of the optimizer's memory. Combines with everything but `full` and other adapters; embedding attacks work,
    since they perturb the embeddings' output.
    """

    name: ClassVar[str] = "lora"
    traits: ClassVar[Traits] = Traits(
        family="adapters",
        order=Band.LEAF,
        slots=("backbone",),
        cost="about 2 of 3 of a plain step; optimizer memory for the adapters alone",
        paper="Hu et al. 2021, arXiv:2106.09685",
        combines="attacks, consistency, meta-learning, templates; not full",
    )

    _variant: ClassVar[dict[str, Any]] = {}  # what kin changes in PEFT's config

    r: int = parameter(8, "rank of the updates", ge=1)
    alpha: float = parameter(16, "scale: updates count alpha / r times", gt=0)
    dropout: float = parameter(0.0, "dropout on the input of the updates", ge=0, lt=1)
    targets: list[str] | None = parameter(None, "name endings of adapted layers; PEFT's choice, else all linear ones")
    heads: list[str] | None = parameter(None, "modules trained in full and saved; by default the task's head")

    def also_provides(self) -> tuple[str, ...]:
        """Dropout of its own lets `rdrop` work on models without any."""
        return ("dropout",) if self.dropout > 0 else ()

    @hook
    def transform_model(self, run: Run, model: nn.Module) -> nn.Module:
        """Wrap the model by PEFT; the adapters' random start depends on the seed alone.

        Raises:
            ModelError: if a target names no layer of this model.
        """
        from peft import LoraConfig

        heads = new_heads(run, model, self.heads)
        targets = linear_targets(model, heads, self.targets, _CHOICES, self.name)
        config = LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=targets,
            modules_to_save=list(heads) or None,  # PEFT adds to the list it is given
            bias="none",
            task_type=task_type(model),
            fan_in_fan_out=transposed(model, targets),
            **self._variant,
        )
        adapted = wrap_by_peft(run, model, "lora", config)
        whole = f"; {', '.join(heads)} trained in full" if heads else ""
        count = sum(name.endswith("lora_A") for name, _ in adapted.named_modules())
        run.say(f"{self.name}: rank {self.r} on {count} layers{whole}")
        return adapted


@dataclass(eq=False)
class RsLoRA(LoRA):
    """LoRA whose scale falls with the root of the rank, so that high ranks learn as fast as low ones.

    Maths: W + (alpha/√r)·B·A. With LoRA's alpha/r the update's gradient shrinks as r grows, and a high rank brings
    nothing; with the root its size stays. At r = 1 the two are one.

    Paper: Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA".
    Hooks: `transform_model`. Cost and combinations: as `lora`. Defaults: rank 32, where the difference shows; the
    scale 16/√32 is 2.8.
    """

    name: ClassVar[str] = "rslora"
    traits: ClassVar[Traits] = replace(LoRA.traits, paper="Kalajdzievski 2023, arXiv:2312.03732")
    _variant: ClassVar[dict[str, Any]] = {"use_rslora": True}

    r: int = parameter(32, "rank of the updates", ge=1)
    alpha: float = parameter(16, "scale: updates count alpha / √r times", gt=0)


@dataclass(eq=False)
class DoRA(LoRA):
    """Trains the length of each output's weights apart from their direction, which low-rank updates turn.

    Maths: W' = m · (W + (alpha/r)·B·A) / ‖W + (alpha/r)·B·A‖, the norm over each output's weights, m trained from the
    norms of W; so training starts at the pretrained function, up to rounding. The norm counts as a constant in the
    gradient, as in the paper (section 4.3).

    Paper: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation".
    Hooks: `transform_model`. Cost: as `lora`, and each adapted layer's B·A and norm are computed in every forward
    pass: noticeably slower with small batches. Combinations: as `lora`.
    """

    name: ClassVar[str] = "dora"
    traits: ClassVar[Traits] = replace(
        LoRA.traits,
        cost="as lora, and the norm of every adapted matrix in every forward pass",
        paper="Liu et al. 2024, arXiv:2402.09353",
    )
    _variant: ClassVar[dict[str, Any]] = {"use_dora": True}


@dataclass(eq=False)
class LoRAPlus(LoRA):
    """LoRA with a higher learning rate for B than for A.

    Maths: η_A = η, η_B = ratio·η. A starts random and B at zero; in wide models equal rates leave A's share of the
    change vanishing, so that B should move faster. New heads keep η.

    Paper: Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models".
    Hooks: `transform_model`, `transform_param_groups`. Cost and combinations: as `lora`. Default ratio 16, the
    paper's; choose the rate itself lower than for `lora`.
    """

    name: ClassVar[str] = "lora-plus"
    traits: ClassVar[Traits] = replace(LoRA.traits, paper="Hayou et al. 2024, arXiv:2402.12354")

    ratio: float = parameter(16.0, "learning rate of B in those of A", ge=1)

    @hook
    def transform_param_groups(self, run: Run, groups: list[ParamGroup]) -> list[ParamGroup]:
        """Split each group: the matrices B apart."""
        return with_rate(run, groups, _is_b, self.ratio)


def _is_b(name: str) -> bool:
    return ".lora_B." in name or ".lora_embedding_B." in name
