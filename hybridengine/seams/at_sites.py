"""The part of `ctx` that works where embeddings come into the model: deltas, masks, ascents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from hybridengine import kernels
from hybridengine.errors import SeamError
from hybridengine.seams.gradients import Gradients
from hybridengine.seams.sites import Sites
from hybridengine.seams.types import Batch, View

__all__ = ["AtSites"]


class AtSites(Gradients):
    """What a method may do at the embedding sites."""

    @property
    def sites(self) -> Sites:
        """The model's embedding sites."""
        if self.run.sites is None:
            raise SeamError("this model has no embedding of token ids that a delta could be added to")
        return self.run.sites

    def zeros(self, batch: Batch) -> dict[str, Tensor]:
        """A zero delta `[B, L, D]` for every site that this batch feeds."""
        out = {}
        for name, site in self.sites.table.items():
            if site.input in batch.inputs:
                ids = batch.inputs[site.input]
                out[name] = torch.zeros(*ids.shape, site.width, dtype=site.dtype, device=ids.device)
        return out

    def embedded(self, batch: Batch, view: View) -> dict[str, Tensor]:
        """What stands at every site under `view`, `[B, L, D]`: the embeddings, with their graph, and the view's delta.

        A delta made of them changes embeddings as it likes: `-x * cut` blanks positions, `(1 - share) * (y - x)` mixes.
        """
        found = self.sites.read(self.run.model, batch.inputs, view.params or {})
        return {k: x + view.delta[k].to(x.dtype) if k in view.delta else x for k, x in found.items()}

    def mask(self, batch: Batch, site: str) -> Tensor:
        """The perturbable positions `[B, L]` of a site: real tokens, neither special nor template."""
        return batch.masks["perturbable"][self.sites.table[site].input]

    def ascend(
        self,
        batch: Batch,
        delta: Mapping[str, Tensor],
        gradient: Sequence[Tensor | None],
        *,
        step_size: float,
        epsilon: float | None = None,
        norm: Literal["l2", "linf"] = "l2",
        per: Literal["sequence", "token"] = "sequence",
    ) -> dict[str, Tensor]:
        """One masked ascent step with projection (kernel `perturb`).

        Norms are those of each sequence, joint over sites, or of each token by itself.
        """
        named = zip(delta, gradient, strict=True)
        grads = {site: torch.zeros_like(delta[site]) if g is None else g for site, g in named}
        masks = {site: self.mask(batch, site) for site in delta}
        detached = {site: d.detach() for site, d in delta.items()}
        sizes: dict[str, Any] = {"step_size": step_size, "epsilon": epsilon}
        return dict(kernels.perturb_step(detached, grads, masks, **sizes, norm=norm, per=per))
