"""TAVAT: an adversarial ascent that remembers how each word was perturbed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hybridengine import kernels
from hybridengine.plugin import Attack, Band, Traits, hook, parameter
from hybridengine.seams import Batch, Context, Work, add_terms, sequence_norms

__all__ = ["TAVAT"]

Delta = dict[str, Tensor]


@dataclass(eq=False)
class TAVAT(Attack):
    """Accumulate the weight gradient along an ascent whose start is made of what each word met before.

    With e the output of the embedding layer, V a table of a perturbation for each word, w_i the word at token i, n
    perturbable tokens of width D in a sequence, and ||.|| the norm of a sequence, ||.||_i that of token i:

        delta_0 = init U(-1, 1) / sqrt(n D);        eta_0,i = V[w_i], at first init U(-1, 1) / sqrt(D)
        gradient += (1 / steps) dL(e + delta_t + eta_t)/dw,        t = 0 .. steps - 1;    g_t from the same backward
        delta <- delta + step_size g / ||g||
        eta_i <- c_i (eta_i + step_size g_i / ||g_i||_i),          c_i = ||eta_i||_i / max_j ||eta_j||_j
        V[w] <- mean of eta at all places of w in the step         after the last pass, of all micro-batches

    Before each pass delta and eta are shrunk by one factor so that ||delta + eta|| <= epsilon. A word's places are
    averaged (the published code adds them to what the table held, and takes its norm over the batch). The table is kept
    in checkpoints. All passes share one dropout mask.

    Hooks: `wrap_backward`, `wrap_step`. Defaults: the published 2 steps of 0.1, epsilon 0.4, init 0.3.
    """

    name: ClassVar[str] = "tavat"
    traits: ClassVar[Traits] = Traits(
        family="adversarial",
        order=Band.EMBEDDING_ATTACK,
        slots=("embedding_attack",),
        requires=("embeddings",),
        effect="delta_norm",
        cost="`steps` full passes; with 2 steps 2x a plain step; a table as large as the word embeddings",
        paper="Li, Qiu: Token-Aware Virtual Adversarial Training in Natural Language Understanding, AAAI 2021",
        combines="lora, rdrop, ema, template; with sam it costs 2 x steps; not with another embedding attack",
    )

    steps: int = parameter(2, "ascent steps, each a full pass", ge=1)
    step_size: float = parameter(0.1, "length of one ascent step, of the sequence and of each token", gt=0)
    epsilon: float = parameter(0.4, "radius of the ball per sequence", ge=0)
    init: float = parameter(0.3, "size of the random start, and of the table's first entries", ge=0)
    per: Literal["sequence", "token"] = field(default="sequence", init=False, repr=False)
    _found: dict[int, tuple[Batch, Delta]] = field(default_factory=dict, init=False, repr=False)

    @hook
    def wrap_backward(
        self, inner: Callable[..., Mapping[str, Tensor]], ctx: Context, work: Work
    ) -> Mapping[str, Tensor]:
        """`steps` full passes at 1/steps of the weight along the ascent; returns the mean of their terms."""
        path: list[tuple[Delta, Delta]] = ctx.shared("tavat", work, lambda: [self._begin(ctx, work.batch)])
        share, moved = work.scaled(1 / self.steps), Delta()
        total: dict[str, Tensor] = {}
        for step in range(self.steps):
            delta, eta = path[step]
            moved = {site: delta[site] + eta[site] for site in delta}
            leaves = {site: d.detach().requires_grad_() for site, d in moved.items()}
            with ctx.no_sync(step < self.steps - 1):
                total = add_terms(total, inner(ctx, share.at(work.view.plus(leaves))))
            if len(path) == step + 1:  # longer: an outer method's earlier pass made the path
                path.append(self._ascend(ctx, work.batch, delta, eta, [leaf.grad for leaf in leaves.values()]))
        self._found[work.id] = work.batch, path[-1][1]
        ctx.report(self, delta_norm=sequence_norms(moved).mean())
        return total

    @hook
    def wrap_step(
        self, inner: Callable[..., Mapping[str, Tensor]], ctx: Context, works: Sequence[Work]
    ) -> Mapping[str, Tensor]:
        """The inner step, then the table learns from all its micro-batches: until then they read the same one."""
        self._found.clear()
        terms = inner(ctx, works)
        for site, table in ctx.run.state("tavat").items():
            self._learn(ctx, site, table)
        self._found.clear()
        return terms

    def _begin(self, ctx: Context, batch: Batch) -> tuple[Delta, Delta]:
        zero = ctx.zeros(batch)
        masks = {site: ctx.mask(batch, site) for site in zero}
        draws = {site: ctx.rng(f"tavat/{site}", batch.rows).uniform(*z.shape[1:]).to(z) for site, z in zero.items()}
        eta = {site: self._table(ctx, site)[_ids(ctx, batch, site)].to(z) for site, z in zero.items()}
        eta = {site: vectors * masks[site].unsqueeze(-1) for site, vectors in eta.items()}
        return self._project(ctx, kernels.perturb_start(draws, masks, epsilon=self.init), eta)

    def _table(self, ctx: Context, site: str) -> Tensor:
        """The perturbations `[V, D]` of a site's words, in at least fp32."""
        tables, known = ctx.run.state("tavat"), ctx.sites.table[site]
        if site not in tables:
            draws = ctx.rng(f"tavat/table/{site}", range(known.tokens)).uniform(known.width)
            draws = draws.to(ctx.run.device, torch.promote_types(known.dtype, torch.float32))
            tables[site] = self.init / known.width**0.5 * (2 * draws - 1)
        table: Tensor = tables[site]
        return table

    def _ascend(
        self, ctx: Context, batch: Batch, delta: Delta, eta: Delta, gradient: Sequence[Tensor | None]
    ) -> tuple[Delta, Delta]:
        length = self.strength(ctx.run.step) * self.step_size
        delta = ctx.ascend(batch, delta, gradient, step_size=length)
        eta = ctx.ascend(batch, eta, gradient, step_size=length, per="token")
        for site, vectors in eta.items():
            sizes = vectors.norm(dim=-1, keepdim=True)
            largest = sizes.amax(1, keepdim=True)
            eta[site] = vectors * torch.where(largest > 0, sizes / largest, 1)
        return self._project(ctx, delta, eta)

    def _project(self, ctx: Context, delta: Delta, eta: Delta) -> tuple[Delta, Delta]:
        """Both shrunk by one factor, so that their sum lies in the ball."""
        radius = self.strength(ctx.run.step) * self.epsilon
        size = sequence_norms({site: delta[site] + eta[site] for site in delta}).view(-1, 1, 1)
        shrink = torch.where(size > radius, radius / size, 1)
        shrunk = [{site: (d * shrink).to(d.dtype) for site, d in part.items()} for part in (delta, eta)]
        return shrunk[0], shrunk[1]

    def _learn(self, ctx: Context, site: str, table: Tensor) -> None:
        """The table's rows become the means of what was found for their words in this step."""
        found = [(batch, eta[site]) for batch, eta in self._found.values() if site in eta]
        if not found:
            return
        ids = torch.cat([_ids(ctx, batch, site).flatten() for batch, _ in found])
        masks = torch.cat([ctx.mask(batch, site).flatten() for batch, _ in found]).to(table)
        vectors = torch.cat([eta.flatten(0, 1) for _, eta in found]).to(table)
        words, places = ids.unique(return_inverse=True)
        # Not `index_add_`, whose sums on a GPU come in any order.
        counts = table.new_zeros(len(words)).index_put_((places,), masks, accumulate=True)
        sums = table.new_zeros(len(words), table.shape[1]).index_put_((places,), vectors, accumulate=True)
        seen = counts > 0
        table[words[seen]] = sums[seen] / counts[seen].unsqueeze(-1)


def _ids(ctx: Context, batch: Batch, site: str) -> Tensor:
    """The words at a site `[B, L]`; the negative ids of soft prompts stand for none, and are never perturbed."""
    return batch.inputs[ctx.sites.table[site].input].clamp_min(0)
