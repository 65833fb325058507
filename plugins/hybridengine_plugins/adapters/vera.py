"""VeRA through PEFT: random matrices shared by all layers, learned vectors between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from hybridengine.model import linear_targets, new_heads, task_type, transposed, wrap_by_peft
from hybridengine.plugin import Band, Run, Traits, hook, parameter
from hybridengine.seams import mix

__all__ = ["VeRA"]


@dataclass(eq=False)
class VeRA:
    """Trains two vectors per adapted layer around random matrices that all layers share, and new heads.

    Maths: W + Λ_b·B·Λ_d·A with A ∈ R^{r×in}, B ∈ R^{out×r} random, frozen and shared; Λ_b (out) starts at 0, so that
    training starts at the pretrained function exactly, Λ_d (r) at `d_initial`. Layers of other sizes take slices of A
    and B. The matrices are drawn from the seed and saved with the adapter.

    Paper: Kopiczko et al. 2024, "VeRA: Vector-based Random Matrix Adaptation".
    Hooks: `transform_model`. Cost: about that of `lora` of the same rank, with a tenth of its parameters. It wants a
    learning rate ten times LoRA's. Combines with everything but `full` and other adapters.
    """

    name: ClassVar[str] = "vera"
    traits: ClassVar[Traits] = Traits(
        family="adapters",
        order=Band.LEAF,
        slots=("backbone",),
        cost="about 2 of 3 of a plain step; optimizer memory for the vectors alone",
        paper="Kopiczko et al. 2024, arXiv:2310.11454",
        combines="attacks, consistency, meta-learning, templates; not full",
    )

    r: int = parameter(256, "rank of the shared matrices", ge=1)
    dropout: float = parameter(0.0, "dropout on the input of the updates", ge=0, lt=1)
    d_initial: float = parameter(0.1, "start of the vector between the matrices", gt=0)
    targets: list[str] | None = parameter(None, "name endings of adapted layers; PEFT's choice, else all linear ones")
    heads: list[str] | None = parameter(None, "modules trained in full and saved; by default the task's head")

    def also_provides(self) -> tuple[str, ...]:
        """Dropout of its own lets `rdrop` work on models without any."""
        return ("dropout",) if self.dropout > 0 else ()

    @hook
    def transform_model(self, run: Run, model: nn.Module) -> nn.Module:
        """Wrap the model by PEFT.

        Raises:
            ModelError: if a target names no layer of this model.
        """
        from peft import VeraConfig

        heads = new_heads(run, model, self.heads)
        targets = linear_targets(
            model, heads, self.targets, "TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING", "vera"
        )
        config = VeraConfig(
            r=self.r,
            vera_dropout=self.dropout,
            d_initial=self.d_initial,
            target_modules=targets,
            projection_prng_key=mix(run.seed, "vera") % 2**31,
            save_projection=True,
            modules_to_save=list(heads) or None,  # PEFT adds to the list it is given
            task_type=task_type(model),
            fan_in_fan_out=transposed(model, targets),
        )
        adapted = wrap_by_peft(run, model, "vera", config)
        whole = f"; {', '.join(heads)} trained in full" if heads else ""
        count = sum(name.endswith("vera_lambda_b") for name, _ in adapted.named_modules())
        run.say(f"vera: rank {self.r} on {count} layers{whole}")
        return adapted
