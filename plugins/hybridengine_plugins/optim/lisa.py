"""LISA: a few layers drawn at random are trained at a time, embeddings and head always."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from hybridengine.errors import ModelError
from hybridengine.plugin import Band, Run, StackView, Traits, hook, parameter, parameter_levels
from hybridengine.seams import Context, Work, permutation

__all__ = ["LISA"]

_ONE_SCHEDULE = "it decides as well which layers train; remove one of the two"


@dataclass(eq=False)
class LISA:
    """Trains embeddings, head and `layers` of the layers between, drawn anew every `every` steps; the others rest.

    Maths: with N layers, step t optimises the embeddings, all that stands above the layers, and the set S_⌊t/every⌋, γ
    layers drawn uniformly without replacement. The draw is a function of seed and ⌊t/every⌋ alone, so a resumed run
    goes on exactly. Layers at rest get no gradient and no weight decay and keep their bits. Their optimizer state is
    dropped (`state: drop`: memory for γ layers, moments start anew on return) or kept (`keep`: moments go on where they
    stopped, memory grows to that of full tuning). Layer i of encoder and decoder are drawn together.

    Paper: Pan et al. 2024, "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning".
    Hooks: `check_stack`, `on_run_start`, `wrap_step`. Cost: no weight gradients of resting layers, 2/3 of a plain step
    and more. Combines with everything but other schedules of what trains; SAM perturbs what trains in that step.
    """

    name: ClassVar[str] = "lisa"
    traits: ClassVar[Traits] = Traits(
        family="optim",
        order=Band.UPDATE,
        slots=("backbone_update",),
        conflicts={"gradual-unfreeze": _ONE_SCHEDULE, "lp-ft": _ONE_SCHEDULE},
        effect="resting",
        cost="2/3 of a plain step and more; gradients and moments of a few layers alone",
        paper="Pan et al. 2024, arXiv:2403.17919",
        combines="everything but gradual-unfreeze and lp-ft",
    )

    layers: int = parameter(2, "layers that train at a time, besides embeddings and head", ge=1)
    every: int = parameter(20, "optimizer steps between draws", ge=1)
    state: Literal["drop", "keep"] = parameter("drop", "what becomes of the optimizer state of layers at rest")
    _levels: dict[str, int] = field(default_factory=dict, init=False, repr=False)
    _between: list[int] = field(default_factory=list, init=False, repr=False)

    @hook
    def check_stack(self, stack: StackView) -> list[str]:
        """An optimizer whose state holds the weights themselves must not lose it."""
        if "schedule-free" not in stack.names or self.state == "keep":
            return []
        return [
            "lisa: schedule-free keeps the weights that count in its state, which lisa drops when a layer rests; set"
            " `lisa: {state: keep}`, or remove schedule-free"
        ]

    @hook
    def on_run_start(self, run: Run) -> None:
        """Note the level of every parameter, and between which levels is drawn.

        Raises:
            ModelError: no layer would rest.
        """
        self._levels, top = parameter_levels(run.model, run.task.head)
        trained = {self._levels[name] for name, p in run.model.named_parameters() if p.requires_grad}
        self._between = sorted(trained - {0, top})
        if self.layers >= len(self._between) and not run.dry and not run.predicting:
            raise ModelError(
                f"lisa: layers is {self.layers}, but only {len(self._between)} layers of this model are trained, so"
                " none would rest; lower `layers`, or remove lisa"
            )

    @hook
    def wrap_step(
        self, inner: Callable[..., Mapping[str, Tensor]], ctx: Context, works: Sequence[Work]
    ) -> Mapping[str, Tensor]:
        """Make the step with the layers whose turn it is; afterwards all are as before, whatever happens."""
        draw = permutation(len(self._between), ctx.run.seed, "lisa", ctx.run.step // self.every)
        rests = {self._between[i] for i in draw[self.layers :]}
        rest = {name: p for name, p in ctx.run.optimised().items() if self._levels.get(name) in rests}
        if self.state == "drop":
            for parameter in rest.values():
                ctx.run.optimizer.state.pop(parameter, None)
        ctx.report(self, resting=float(len(rest)))
        with ctx.resting(rest):
            return inner(ctx, works)
