"""MAML and FOMAML: learn a start from which a few gradient steps on a support set suffice."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hybridengine.errors import ConfigError
from hybridengine.plugin import Band, Run, Traits, hook, parameter
from hybridengine.seams import Batch, Context, Work, weighted_sum

__all__ = ["MAML"]


@dataclass(eq=False)
class MAML:
    """Trains the parameters so that `inner_steps` gradient steps on an episode's support rows fit its query rows.

    Maths: θ₀ = θ, θ_{k+1} = θ_k − inner_lr·∇L_support(θ_k); the gradient of the step is
    (Π_k (I − inner_lr·H_k))ᵀ ∇L_query(θ_K). FOMAML (`first_order: true`) leaves out the Hessians H_k. The query pass
    runs on detached leaves and may run backward as often as an attack inside wants; then one vector-Jacobian product
    pulls its gradient back through the inner loop (the cut). `inner_parameters: [classifier*]` gives ANIL.

    Paper: Finn, Abbeel, Levine 2017, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks".
    Hooks: `wrap_backward`. Cost per episode: 9K + 3 (first order 3K + 3) where a plain step costs 3. Combines with
    attacks and consistency (they act on the query rows; with `inner_loss: full` terms also inside), `sam`, `lora`.
    """

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
        support = work.batch.parts.get("support")
        if support is None:
            raise ConfigError("maml: this batch has no support rows; add `episodes: {ways: N, shots: K}`")
        adapted = self._adapt(ctx, work, support)
        leaves = {name: value.detach().requires_grad_() for name, value in adapted.items()}
        parts = {name: part for name, part in work.batch.parts.items() if name not in ("support", "query")}
        query = replace(work, batch=replace(work.batch, parts=parts), view=work.view.with_params(leaves))
        with ctx.no_sync():
            terms = inner(ctx, query)
        ctx.pull_back(adapted, leaves)
        return terms

    def _adapt(self, ctx: Context, work: Work, support: Batch) -> dict[str, Tensor]:
        base = {**ctx.run.adapted(), **(work.view.params or {})}
        start: dict[str, Tensor] = {name: base[name] for name in ctx.run.adapted()}
        if not start:
            raise ConfigError(f"maml: inner_parameters {list(self.inner_parameters)} match no trained parameter")
        loss = ctx.task_loss if self.inner_loss == "task" else lambda batch, view: ctx.loss(ctx, batch, view)
        own = {unit: 1 / max(count, 1) for unit, count in support.counts.items()}
        view, fast = work.view.clean(), dict(start)
        for step in range(self.inner_steps):
            with contextlib.nullcontext() if self.first_order else ctx.second_order():
                out = loss(support, view.with_params(fast).fork("inner", step))
                value = weighted_sum(out.terms, own)
                grads = ctx.grad(value, list(fast.values()), create_graph=not self.first_order)
            pairs = zip(fast.items(), grads, strict=True)
            fast = {k: x if g is None else x - (self.inner_lr * g).to(x.dtype) for (k, x), g in pairs}
            if step == 0:
                ctx.report(self, support_loss=value)
        moved = [(fast[k].detach() - x.detach()).flatten() for k, x in start.items()]
        ctx.report(self, shift=torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(m) for m in moved])))
        return fast
