"""Meta-SGD and MAML++: MAML whose inner loop learns how far each step goes."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from hybridengine.errors import ConfigError
from hybridengine.plugin import Band, ParamGroup, Run, Traits, hook, parameter
from hybridengine.seams import Context, Work, add_terms, distance, inner_loop, leaves_at, queries_of, support_of

__all__ = ["MAMLPlusPlus", "MetaSGD"]

_MEASURE_EVERY = 10  # steps between measurements of the effect, a pass over all step sizes


@dataclass(eq=False)
class MetaSGD:
    """MAML that learns the step of every single weight: its size, and its sign.

    Maths: θ_{k+1} = θ_k − α ∘ ∇L_support(θ_k), with α of θ's shape, `inner_lr` everywhere at first; the gradient of
    L_query(θ_K) goes to θ through the inner loop, and to α (for one step: −∇L_support(θ) ∘ ∇L_query(θ₁)). α may turn
    negative. It is a run module, saved beside `best/`; `episodes` steps by it at test time.

    Paper: Li, Zhou, Chen, Li 2017, "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning".
    Hooks: `on_run_start`, `transform_param_groups`, `wrap_backward`. Cost: that of `maml`, and the weights once more in
    memory with their optimizer state. Combines with what `maml` does.
    """

    name: ClassVar[str] = "meta-sgd"
    traits: ClassVar[Traits] = Traits(
        family="meta",
        order=Band.META,
        slots=("meta",),
        requires=("episodes", "functional"),
        effect="rate_gradient",
        cost="9K + 3 per episode, first order 3K + 3; a plain step costs 3",
        state=5,
        paper="Li, Zhou, Chen, Li 2017, arXiv:1707.09835",
        combines="episodes (needed), attacks, rdrop, sam, lora; not gradient checkpointing",
    )

    inner_lr: float = parameter(0.1, "step size of the inner loop at the start", ge=0)
    rate_lr: float = parameter(0.001, "learning rate of the step sizes", ge=0)
    inner_steps: int = parameter(1, "gradient steps on the support rows", ge=1)
    first_order: bool = parameter(False, "leave out second derivatives; the step sizes still learn")
    inner_parameters: list[str] = parameter(lambda: ["*"], "patterns of the parameters that the inner loop adapts")

    _rates: dict[str, nn.Parameter] = field(default_factory=dict, init=False, repr=False)

    @hook
    def on_run_start(self, run: Run) -> None:
        """Make the step sizes, and let `episodes` step by them at test time."""
        run.inner_patterns = ("*",) if run.dry else tuple(self.inner_parameters)
        patterns = list(run.inner_patterns)
        mine = {k: p for k, p in run.model.named_parameters() if p.requires_grad}
        named = {k: p for k, p in mine.items() if any(fnmatch.fnmatchcase(k, pattern) for pattern in patterns)}
        if not named:
            raise ConfigError(f"{self.name}: inner_parameters {patterns} match no trained parameter; name others")
        store = nn.ParameterDict({_key(k): nn.Parameter(self._initial(p)) for k, p in named.items()})
        run.add_module(self.name, store)
        self._rates = {k: store[_key(k)] for k in named}
        run.inner_update = self._moved

    def _initial(self, value: Tensor) -> Tensor:
        return torch.full_like(value.detach(), self.inner_lr, dtype=torch.promote_types(value.dtype, torch.float32))

    @hook
    def transform_param_groups(self, run: Run, groups: list[ParamGroup]) -> list[ParamGroup]:
        """Step sizes have a learning rate of their own and no decay."""
        prefix, own, rest = f"{self.name}/", {}, []
        for group in groups:
            own.update({k: p for k, p in group.parameters.items() if k.startswith(prefix)})
            others = {k: p for k, p in group.parameters.items() if not k.startswith(prefix)}
            rest += [ParamGroup(others, **group.options)] if others else []
        return [*rest, ParamGroup(own, lr=self.rate_lr, weight_decay=0.0)]

    def _moved(self, step: int, name: str, value: Tensor, gradient: Tensor) -> Tensor:
        if name not in self._rates:
            raise ConfigError(
                f"{self.name} has no step size for {name}; remove `adapt_parameters` from episodes, or name only what"
                " inner_parameters names"
            )
        return value - (self._rate(step, name) * gradient).to(value.dtype)

    def _rate(self, step: int, name: str) -> Tensor:
        return self._rates[name]

    def _weights(self, step: int) -> list[float]:
        """The weight of the query loss after each inner step; 0 makes no pass."""
        return [0.0] * (self.inner_steps - 1) + [1.0]

    def _is_first_order(self, step: int) -> bool:
        return self.first_order

    @hook
    def wrap_backward(
        self, inner: Callable[..., Mapping[str, Tensor]], ctx: Context, work: Work
    ) -> Mapping[str, Tensor]:
        """Adapt on the support rows, evaluate the query rows on the way, pull the gradients back."""
        support = support_of(work.batch, self.name)
        base = {**ctx.run.adapted(), **(work.view.params or {})}
        start = {name: base[name] for name in ctx.run.adapted() if name in self._rates}
        if not start:
            raise ConfigError(f"{self.name}: all parameters that it adapts are frozen; remove what freezes them")
        first_order = self._is_first_order(ctx.run.step)
        path, before = inner_loop(
            ctx, support, work.view, start, self._moved, steps=self.inner_steps, first_order=first_order
        )
        rows = queries_of(work.batch)
        adapted, reached, terms = {}, {}, {}
        with ctx.no_sync():
            for index, (point, weight) in enumerate(zip(path, self._weights(ctx.run.step), strict=True)):
                if not weight:
                    continue
                leaves = leaves_at(point)
                query = replace(work, batch=rows, view=work.view.with_params(leaves))
                terms = add_terms(terms, inner(ctx, query if weight == 1 else query.scaled(weight)))
                adapted.update({f"{index} {k}": x for k, x in point.items()})
                reached.update({f"{index} {k}": x for k, x in leaves.items()})
        ctx.pull_back(adapted, reached)
        if ctx.run.step % _MEASURE_EVERY == 0:
            norm = nn.utils.get_total_norm([r.grad for r in self._rates.values() if r.grad is not None])
            shift = distance(start, path[-1])
            ctx.report(self, support_loss=before, shift=shift, rate_gradient=ctx.unscaled(norm))
        return terms


@dataclass(eq=False)
class MAMLPlusPlus(MetaSGD):
    """MAML made stable: every inner step has its loss and its rates, and second derivatives come late.

    Maths: θ_{k+1} = θ_k − α_{k,l}·∇L_support(θ_k), one learned rate for each step k and tensor l. The loss is
    Σ_k v_k L_query(θ_{k+1}): v starts at 1/K each and moves linearly to the last step within `multi_step` steps (the
    others keep 0.03/K), after which v_K = 1 and the earlier steps have no query pass. In the first `first_order_steps`
    the Hessians are left out. At test time, steps beyond the K-th take the K-th rate. Left out: batch-norm statistics,
    weights and biases per step, as transformers have layer norms without statistics; the cosine schedule of the
    outer rate is the method `cosine`.

    Paper: Antoniou, Edwards, Storkey 2019, "How to train your MAML".
    Hooks: those of `meta-sgd`. Cost per episode: 12K, later 9K + 3; without second derivatives 6K and 3K + 3.
    Combines with what `maml` does.
    """

    name: ClassVar[str] = "maml-plus-plus"
    traits: ClassVar[Traits] = replace(
        MetaSGD.traits,
        cost="12K per episode at first, 9K + 3 later, without second derivatives 6K and 3K + 3; a plain step costs 3",
        state=1,
        paper="Antoniou, Edwards, Storkey 2019, arXiv:1810.09502",
        combines="episodes (needed), cosine, attacks, rdrop, sam, lora; not gradient checkpointing",
    )

    inner_steps: int = parameter(5, "gradient steps on the support rows", ge=1)
    multi_step: int = parameter(100, "optimizer steps in which the earlier inner steps have a loss too", ge=0)
    first_order_steps: int = parameter(50, "optimizer steps at the start without second derivatives", ge=0)
    first_order: bool = field(default=False, init=False, repr=False)

    def phase(self, step: int) -> tuple[bool, bool]:
        """What kind of step this is: with which losses, and with which derivatives."""
        return step < self.multi_step and self.inner_steps > 1, self._is_first_order(step)

    def _initial(self, value: Tensor) -> Tensor:
        return torch.full((self.inner_steps,), self.inner_lr, dtype=torch.promote_types(value.dtype, torch.float32))

    def _rate(self, step: int, name: str) -> Tensor:
        return self._rates[name][min(step, self.inner_steps - 1)]

    def _weights(self, step: int) -> list[float]:
        if not self.phase(step)[0]:
            return super()._weights(step)
        early = max((1 - step / self.multi_step), 0.03) / self.inner_steps
        return [early] * (self.inner_steps - 1) + [1 - early * (self.inner_steps - 1)]

    def _is_first_order(self, step: int) -> bool:
        return step < self.first_order_steps


def _key(name: str) -> str:
    """Names of module entries hold no dots."""
    return name.replace(".", "|")
