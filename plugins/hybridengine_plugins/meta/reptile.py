"""Reptile: move the parameters towards where a few plain steps on each episode lead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hybridengine.errors import ConfigError
from hybridengine.plugin import Band, Run, Traits, hook, parameter
from hybridengine.seams import Context, Work, queries_of, support_of, weighted_sum

__all__ = ["Reptile"]


@dataclass(eq=False)
class Reptile:
    """Takes `inner_steps` plain gradient steps within an episode, and uses the way travelled as the gradient.

    Maths: θ₀ = θ, θ_{k+1} = θ_k − inner_lr·∇L_k(θ_k), gradient := θ − θ_K, averaged over the step's episodes (with
    plain SGD at rate β this is θ ← θ + β·(θ_K − θ)). Steps alternate between the support and the query rows: the
    method learns from the agreement of gradients of different rows of one episode, so one step is not enough.

    Paper: Nichol, Achiam, Schulman 2018, "On First-Order Meta-Learning Algorithms".
    Hooks: `wrap_backward`. Cost per episode: 3K where a plain step costs 3. The loss is the full one, so `rdrop` and
    other terms act inside; attacks and other layers of `wrap_backward` would be ignored and are refused.
    """

    traits: ClassVar[Traits] = Traits(
        family="meta",
        order=Band.META,
        slots=("meta",),
        requires=("episodes", "functional"),
        ignores_inner=("backward",),
        effect="shift",
        cost="3K per episode; a plain step costs 3",
        state=1,
        paper="Nichol, Achiam, Schulman 2018, arXiv:1803.02999",
        combines="episodes (needed), loss terms, sam, lora; not embedding attacks",
    )

    inner_lr: float = parameter(0.1, "step size of the inner loop", gt=0)
    inner_steps: int = parameter(5, "gradient steps within the episode", ge=2)
    inner_parameters: list[str] = parameter(lambda: ["*"], "patterns of the parameters that are trained")

    @hook
    def on_run_start(self, run: Run) -> None:
        """Fix the set of parameters that inner loops adapt; the toy model of the plan has other names."""
        if not run.dry:
            run.inner_patterns = tuple(self.inner_parameters)

    @hook
    def wrap_backward(
        self, inner: Callable[..., Mapping[str, Tensor]], ctx: Context, work: Work
    ) -> Mapping[str, Tensor]:
        """Travel, and add the way to `.grad`."""
        support = support_of(work.batch, "reptile")
        start = ctx.run.adapted()
        if not start:
            raise ConfigError(f"reptile: inner_parameters {list(self.inner_parameters)} match no trained parameter")
        rounds = (support, queries_of(work.batch))
        weight, terms = work.weights["episodes"], {}
        view = work.view.clean()
        fast: dict[str, Tensor] = {name: nn.Parameter(p.detach()) for name, p in start.items()}
        for step in range(self.inner_steps):
            batch = rounds[step % 2]
            own = {unit: 1 / max(count, 1) for unit, count in batch.counts.items()}
            out = ctx.loss(ctx, batch, view.with_params(fast).fork("inner", step))
            loss = weighted_sum(out.terms, own)
            ctx.witness.append((batch.rows, loss.detach()))
            pairs = zip(fast.items(), ctx.grad(loss, list(fast.values())), strict=True)
            fast = {k: _moved(x, g, self.inner_lr) for (k, x), g in pairs}
            if step < 2:  # what the progress line shows: the loss on fresh rows
                terms = {name: weight * own[unit] * value.detach() for name, (value, unit) in out.terms.items()}
        way = {name: p.detach() - fast[name].detach() for name, p in start.items()}
        ctx.report(
            self, shift=torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(w) for w in way.values()]))
        )
        ctx.add_grads({name: weight * value for name, value in way.items()})
        return terms


def _moved(value: Tensor, gradient: Tensor | None, rate: float) -> Tensor:
    if gradient is None:
        return value
    return nn.Parameter(value.detach() - (rate * gradient).to(value.dtype))
