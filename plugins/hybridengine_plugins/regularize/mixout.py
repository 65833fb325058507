"""Mixout: dropout that puts pretrained weights where others put zeros."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hybridengine.errors import StackError
from hybridengine.plugin import Band, StackView, Traits, hook, parameter
from hybridengine.seams import Batch, Context, Out, View, distance, mix, wide

__all__ = ["Mixout"]

_MEASURE_EVERY = 10  # steps between measurements of the effect, each two passes over the weights


@dataclass(eq=False)
class Mixout:
    """In each training pass put a random share of the weights back to where tuning began.

    With w the weights, u those at the first step, and M 1 with probability p in each coordinate:

        w~ = M u + (1 - M) (w - p u) / (1 - p)

    The mean of w~ is w: what is not put back goes further, as with dropout, which is u = 0. Weights move, but never so
    that the model cannot do with a share p of the pretrained ones. M is one draw for all passes that share their
    dropout masks (attacks, sam, rdrop's pair), and another for each micro-batch. Embeddings and new parts of the model
    (head) stay as they are. The start is kept in checkpoints; evaluation uses w. The learning rate may be larger.

    Hooks: `check_stack`, `wrap_loss`. Default: p 0.7 (paper: 0.7 to 0.9 for weights, on a thousand rows of data).
    """

    traits: ClassVar[Traits] = Traits(
        family="regularize",
        order=Band.SMOOTHNESS + 5,  # around the other losses: all their passes see the same weights
        requires=("functional",),
        effect="replaced",
        cost="no extra passes; a draw for each weight per micro-batch, the start and the mixed weights in memory",
        state=2.25,
        paper="Lee, Cho, Kang: Mixout, ICLR 2020, arXiv:1909.11299",
        combines="everything but gradient checkpointing; beside adapters it puts the adapter back to its start",
    )

    p: float = parameter(0.7, "share of the weights that is put back", ge=0, lt=1)

    @hook
    def check_stack(self, stack: StackView) -> list[str]:
        """Soft prompts and prefixes freeze the rest of the model, unless a method says what is trained of it."""
        slots = {method.name: set(method.traits.slots) for method in stack.methods}
        if any("backbone" in taken for taken in slots.values()):
            return []
        alone = [name for name, taken in slots.items() if taken & {"soft_prompt", "prefix"}]
        return [
            f"mixout: beside {name} no pretrained weight is trained; add `full`, or remove mixout" for name in alone
        ]

    @hook
    def wrap_loss(self, inner: Callable[..., Out], ctx: Context, batch: Batch, view: View) -> Out:
        """The inner loss at the mixed weights."""
        start, known = self._start(ctx), {**ctx.run.may_optimise, **(view.params or {})}
        key = (ctx.run.seed, ctx.run.step) if view.key is None else view.key
        generator, mixed, back = torch.Generator(ctx.run.device), {}, {}
        for name, pretrained in start.items():
            weight, draws = known[name], torch.empty(pretrained.shape, dtype=torch.bool, device=pretrained.device)
            back[name] = draws.bernoulli_(self.p, generator=generator.manual_seed(mix(key, "mixout", name)))
            ahead = (wide(weight) - self.p * pretrained) / (1 - self.p)
            mixed[name] = torch.where(back[name], pretrained, ahead).to(weight.dtype)
        if mixed and ctx.run.step % _MEASURE_EVERY == 0:
            replaced = torch.stack([mask.sum() for mask in back.values()]).sum() / sum(map(Tensor.numel, back.values()))
            ctx.report(self, replaced=replaced, shift=distance({k: known[k].detach() for k in mixed}, mixed))
        return inner(ctx, batch, view.with_params(mixed))

    @staticmethod
    def _start(ctx: Context) -> dict[str, Tensor]:
        """Where the weights stood at the first step, without embeddings and the new parts of the model.

        Raises:
            StackError: nothing else is trained.
        """
        run, start = ctx.run, ctx.run.state("mixout")
        if not start:
            tables = {id(m.weight) for m in run.model.modules() if isinstance(m, nn.Embedding)}
            new = [*run.task.head, *run.missing_parameters]
            for name, weight in run.may_optimise.items():
                own = "/" not in name and id(weight) not in tables
                if own and not any(fnmatch.fnmatchcase(name, part) for part in new):
                    start[name] = wide(weight.detach()).clone()
        if not start and not run.dry:
            raise StackError("mixout: no pretrained weight is trained, only new ones; remove mixout or what freezes")
        return start
