"""MAML, FOMAML and ANIL: learn a start from which a few gradient steps on a support set suffice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from torch import Tensor

from hybridengine.errors import ConfigError
from hybridengine.plugin import Band, Run, Traits, hook, parameter
from hybridengine.seams import Context, Work, distance, inner_loop, leaves_at, queries_of, support_of

__all__ = ["ANIL", "FOMAML", "MAML"]


@dataclass(eq=False)
class MAML:
    """Trains the parameters so that `inner_steps` gradient steps on an episode's support rows fit its query rows.

    Maths: θ₀ = θ, θ_{k+1} = θ_k − inner_lr·∇L_support(θ_k); the gradient of the step is
    (Π_k (I − inner_lr·H_k))ᵀ ∇L_query(θ_K). FOMAML (`first_order: true`) leaves out the Hessians H_k. The query pass
    runs on detached leaves and may run backward as often as an attack inside wants; then one vector-Jacobian product
    pulls its gradient back through the inner loop (the cut).

    Paper: Finn, Abbeel, Levine 2017, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks".
    Hooks: `wrap_backward`. Cost per episode: 9K + 3 (first order 3K + 3) where a plain step costs 3. Combines with
    attacks and consistency (they act on the query rows; with `inner_loss: full` terms also inside), `sam`, `lora`.
    """

    name: ClassVar[str] = "maml"
    traits: ClassVar[Traits] = Traits(
        family="meta",
        order=Band.META,
        slots=("meta",),
        requires=("episodes", "functional"),
        effect="shift",
        cost="9K + 3 per episode, first order 3K + 3; a plain step costs 3",
        state=1,
        paper="Finn, Abbeel, Levine 2017, arXiv:1703.03400",
        combines="episodes (needed), attacks, rdrop, sam, lora; not gradient checkpointing",
    )

    inner_lr: float = parameter(0.1, "step size of the inner loop", ge=0)
    inner_steps: int = parameter(1, "gradient steps on the support rows", ge=1)
    first_order: bool = parameter(False, "leave out second derivatives (FOMAML)")
    inner_parameters: list[str] = parameter(lambda: ["*"], "patterns of the parameters that the inner loop adapts")
    inner_loss: Literal["task", "full"] = parameter("task", "the task's loss alone, or with the terms of the stack")

    @hook
    def on_run_start(self, run: Run) -> None:
        """Fix the set of parameters that inner loops adapt; the toy model of the plan has other names."""
        if not run.dry:
            run.inner_patterns = tuple(self.inner_parameters)

    @hook
    def wrap_backward(
        self, inner: Callable[..., Mapping[str, Tensor]], ctx: Context, work: Work
    ) -> Mapping[str, Tensor]:
        """Adapt on the support rows, evaluate the query rows there, pull the gradient back."""
        support = support_of(work.batch, self.name)
        base = {**ctx.run.adapted(), **(work.view.params or {})}
        start = {name: base[name] for name in ctx.run.adapted()}
        if not start:
            raise ConfigError(
                f"{self.name}: inner_parameters {list(ctx.run.inner_patterns)} match no trained parameter"
            )
        loss = None if self.inner_loss == "task" else lambda batch, view: ctx.loss(ctx, batch, view)
        steps, first_order = self.inner_steps, self.first_order
        path, before = inner_loop(
            ctx, support, work.view, start, self._moved, steps=steps, first_order=first_order, loss=loss
        )
        ctx.report(self, support_loss=before, shift=distance(start, path[-1]))
        leaves = leaves_at(path[-1])
        query = replace(work, batch=queries_of(work.batch), view=work.view.with_params(leaves))
        with ctx.no_sync():
            terms = inner(ctx, query)
        ctx.pull_back(path[-1], leaves)
        return terms

    def _moved(self, step: int, name: str, value: Tensor, gradient: Tensor) -> Tensor:
        return value - (self.inner_lr * gradient).to(value.dtype)


@dataclass(eq=False)
class FOMAML(MAML):
    """First-order MAML: the query gradient at the adapted parameters, taken as if it were that at the start.

    Maths: θ₀ = θ, θ_{k+1} = θ_k − inner_lr·∇L_support(θ_k); the gradient of the step is ∇L_query(θ_K): MAML with every
    Hessian left out, which costs a third and works with fused attention. It is `maml: {first_order: true}` by name.

    Paper: Finn, Abbeel, Levine 2017, section 5.2; Nichol et al. 2018, arXiv:1803.02999.
    Hooks: those of `maml`. Cost per episode: 3K + 3. Combines with what `maml` does.
    """

    name: ClassVar[str] = "fomaml"
    traits: ClassVar[Traits] = replace(
        MAML.traits,
        cost="3K + 3 per episode; a plain step costs 3",
        paper="Finn, Abbeel, Levine 2017, arXiv:1703.03400",
    )

    first_order: bool = field(default=True, init=False, repr=False)


@dataclass(eq=False)
class ANIL(MAML):
    """Almost no inner loop: the steps on the support rows move the head alone, the outer gradient trains everything.

    Maths: θ = (body w, head h); h₀ = h, h_{k+1} = h_k − inner_lr·∇_h L_support(w, h_k); the gradient of the step is
    that of L_query(w, h_K) by w and h, through the inner loop (`first_order` leaves that out). Inner gradients stop at
    the head. Dropout differs in every inner step, hence each one encodes the support rows anew.

    Paper: Raghu et al. 2020, "Rapid Learning or Feature Reuse? Towards Understanding the Effectiveness of MAML".
    Hooks: those of `maml`; `episodes` adapts the head alone at test time too. Cost per episode: 3K + 3, first order
    K + 3. Combines with what `maml` does.
    """

    name: ClassVar[str] = "anil"
    traits: ClassVar[Traits] = replace(
        MAML.traits,
        cost="up to 3K + 3 per episode, first order K + 3; a plain step costs 3",
        paper="Raghu, Raghu, Bengio, Vinyals 2020, arXiv:1909.09157",
    )

    inner_steps: int = parameter(5, "gradient steps of the head on the support rows", ge=1)
    inner_parameters: list[str] = parameter(list, "patterns of the head's parameters; none: the task's head")

    @hook
    def on_run_start(self, run: Run) -> None:
        """Inner loops adapt the head, in the toy model of the plan too."""
        run.inner_patterns = tuple(run.task.head if run.dry else self.inner_parameters or run.task.head)
