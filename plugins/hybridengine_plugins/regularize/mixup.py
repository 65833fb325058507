"""Mixup: train on mixtures of two texts that have both labels in proportion."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from hybridengine.errors import StackError
from hybridengine.plugin import Band, Run, Split, StackView, Traits, hook, parameter
from hybridengine.seams import Batch, Context, Out, View, wide

__all__ = ["Mixup"]

_ONE_LABEL = "it needs the one label of each row, and mixtures have two; remove one of the two"


@dataclass(eq=False)
class Mixup:
    """Replace each row by a mixture of its embeddings with another row's, and its label by the same mixture.

    With j the partner of row i, e its embeddings (0 at padding) and y its label as a vector,

        e~ = lambda e_i + (1 - lambda) e_j,    y~ = lambda y_i + (1 - lambda) y_j,    lambda ~ Beta(alpha, alpha)

    Cross-entropy is linear in its target: the loss is lambda CE(y_i) + (1 - lambda) CE(y_j), also with class weights
    and label smoothing. lambda is max(lambda, 1 - lambda), as in MixText, so that a row gives the larger part and keeps
    its token types. A mixture is as long as the longer of the two. lambda and the order in which rows are partners are
    keyed by step and row; partners come from the same micro-batch, so that 8 of 4 rows are not 1 of 32. Ascents of
    attacks and inner loops see the rows unmixed.

    Hook: `wrap_loss`. Default: alpha 0.4, of the published 0.1 to 1 (MixText: 16, half and half nearly always).
    """

    traits: ClassVar[Traits] = Traits(
        family="regularize",
        order=Band.SMOOTHNESS + 5,  # around all other losses, which see the mixture as their batch
        requires=("embeddings", "labels"),
        conflicts={
            "focal": _ONE_LABEL,
            "poly": _ONE_LABEL,
            "supcon": _ONE_LABEL,
            "prototypical": _ONE_LABEL,
            "distill": "the teacher reads tokens and sees no mixture; remove one of the two",
            "template": "the masks of two rows stand at different places; remove one of the two",
        },
        effect="mixed",
        paper="Zhang et al.: mixup: Beyond Empirical Risk Minimization, ICLR 2018; Guo et al., arXiv:1905.08941; Chen,"
        " Yang, Yang: MixText, ACL 2020",
        combines="rdrop, cutoff, attacks, lora, label-smoothing, class-weights; not what needs one label a row",
    )

    alpha: float = parameter(0.4, "small: one text with a trace of another; large: half of each", gt=0)

    @hook
    def check_stack(self, stack: StackView) -> list[str]:
        """A row alone has no partner, and an encoder-decoder reads its tokens twice."""
        problems = []
        if stack.facts["config"].train.batch_size < 2:
            problems.append("mixup: a micro-batch of one row has nothing to mix; set train.batch_size to 2 or more")
        if getattr(stack.facts["model"], "is_encoder_decoder", False):
            problems.append(
                "mixup: the decoder of this model reads one row's tokens alone; use an encoder or a decoder"
            )
        return problems

    @hook
    def transform_data(self, run: Run, splits: dict[str, Split]) -> dict[str, Split] | None:
        """Leave the data; only say early that some tasks have no label of a row.

        Raises:
            StackError: tokens have labels of their own, or there are none.
        """
        if not run.dry and "label" not in run.task.columns:
            raise StackError("mixup mixes the labels of rows, which this task does not have; remove mixup")
        return None

    @hook
    def wrap_loss(self, inner: Callable[..., Out], ctx: Context, batch: Batch, view: View) -> Out:
        """The inner loss of the mixtures."""
        rows = ctx.rng("mixup", batch.rows)
        partner = torch.tensor(_partners(batch.rows, rows.uniform(1)[:, 0].tolist()))
        if batch.targets is None or partner.equal(torch.arange(batch.size)):
            return inner(ctx, batch, view)
        sites, partner = ctx.embedded(batch, view), partner.to(ctx.run.device)
        drawn = rows.beta(self.alpha)
        share = torch.maximum(drawn, 1 - drawn).to(wide(next(iter(sites.values()))))
        ctx.report(self, mixed=(1 - share).mean())
        mixture = _mixture(batch, partner, share, len(ctx.run.labels))
        plain, delta, part = ctx.embedded(mixture, view.clean()), {}, share[:, None, None]
        real, longer = (b.masks["attention"]["input_ids"].unsqueeze(-1) for b in (batch, mixture))
        for site, x in sites.items():
            mixed = part * (x * real) + (1 - part) * (x * real)[partner]
            delta[site] = (mixed - plain[site]) * longer
        return inner(ctx, mixture, view.clean().plus(delta))


def _partners(rows: Sequence[int], draws: Sequence[float]) -> list[int]:
    """The position of each row's partner: rows in the order of their draws, each takes the next, the last the first.

    A row that stands in the batch more than once, as in a stacked pass of rdrop, has the same partner each time.
    """
    places: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(row, []).append(place)
    order = sorted(places, key=lambda row: draws[places[row][0]])
    partner = [0] * len(rows)
    for row, other in zip(order, [*order[1:], *order[:1]], strict=True):
        for copy, place in enumerate(places[row]):
            partner[place] = places[other][copy % len(places[other])]
    return partner


def _mixture(batch: Batch, partner: Tensor, share: Tensor, classes: int) -> Batch:
    """The batch with mixed targets; where a row has padding and its partner does not, it has the partner's tokens."""
    real = batch.masks["attention"]["input_ids"].bool()

    def filled(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {k: torch.where(real, v, v[partner]) if v.shape == real.shape else v for k, v in values.items()}

    inputs = filled(batch.inputs)
    if "position_ids" in inputs:  # given where padding stands on the left: the longer row's are the larger ones
        inputs["position_ids"] = torch.maximum(batch.inputs["position_ids"], batch.inputs["position_ids"][partner])
    targets = batch.targets if batch.targets.dim() == 2 else functional.one_hot(batch.targets, classes)
    targets = targets.to(share) * share[:, None] + targets[partner].to(share) * (1 - share[:, None])
    masks = {kind: filled(of) for kind, of in batch.masks.items()}
    return replace(batch, inputs=inputs, targets=targets, masks=masks)
