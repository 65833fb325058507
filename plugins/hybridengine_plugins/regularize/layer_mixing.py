"""Layer mixing: the head reads a learned mixture of all layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hybridengine.errors import ModelError
from hybridengine.plugin import ParamGroup, Run, StackView, Traits, hook, parameter
from hybridengine.seams import Batch, Context, Layers, Out, View

__all__ = ["LayerMixing"]

_MODULE = "layer-mixing"
_MEASURE_EVERY = 10  # steps between measurements of the effect


class _Mixture(nn.Module):
    def __init__(self, layers: int, last: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(layers + 1, dtype=dtype))
        self.scale = nn.Parameter(torch.ones((), dtype=dtype))
        with torch.no_grad():
            self.scores[-1] = last

    def forward(self, states: list[Tensor]) -> Tensor:
        shares = (self.scale * self.scores.softmax(0)).to(states[-1].dtype)
        mixed = shares[0] * states[0]
        for share, state in zip(shares[1:], states[1:], strict=True):
            mixed = mixed + share * state
        return mixed


@dataclass(eq=False)
class LayerMixing:
    """Put a learned mixture of the states of all layers in the place of the last layer's.

    With h_0 what enters the first layer, h_j what leaves layer j, and N layers,

        h = gamma sum_{j=0..N} softmax(s)_j h_j

    `s` and `gamma` are trained along, without decay, at a rate of their own. A norm or pooler above the last layer
    reads h. The mixture is a run module and also serves to predict; `best/` in the format of transformers is the model
    without it, so that other programs see the last layer alone. Lower layers know words and syntax, upper ones the
    pretraining's task: mixing helps frozen encoders most, and small tasks unlike pretraining.

    Hooks: `on_run_start`, `transform_param_groups`, `check_stack`, `wrap_loss`. Defaults: all layers alike at first and
    rate 0.01; `last: 5` starts near the plain model.
    """

    traits: ClassVar[Traits] = Traits(
        family="regularize",
        effect="below",
        cost="no extra passes; a sum over all layers, and the last layer is computed at every position",
        paper="Peters et al.: Deep Contextualized Word Representations, NAACL 2018; Tenney et al., ACL 2019",
        combines="freeze, lora, everything but gradient checkpointing",
    )

    last: float = parameter(0.0, "score of the last layer at the start; the others have 0")
    lr: float = parameter(0.01, "learning rate of the mixture", ge=0)

    @hook
    def check_stack(self, stack: StackView) -> list[str]:
        """A recomputed layer would see the states of another pass."""
        if stack.facts["config"].train.checkpointing:
            return ["layer-mixing: layers are recomputed one by one; set `train.checkpointing: false`"]
        return []

    @hook
    def on_run_start(self, run: Run) -> None:
        """Find the layers and join them.

        Raises:
            ModelError: the model has no plain stack of layers.
        """
        if run.dry:
            run.add_module(_MODULE, _Mixture(1, self.last, torch.float32))
            return
        layers = Layers.find(run.model, run.probe)
        if layers is None:
            raise ModelError(
                f"layer-mixing: {run.config.model.name} has no list of layers that hand their states to the next; use"
                " another model, or remove layer-mixing"
            )
        dtype = torch.promote_types(next(run.model.parameters()).dtype, torch.float32)
        mixture: Any = run.add_module(_MODULE, _Mixture(len(layers), self.last, dtype))
        layers.join(mixture)
        if not run.predicting:
            run.say("layer-mixing: predict with hybridengine; `best/` by itself is the model without its mixture")

    @hook
    def transform_param_groups(self, run: Run, groups: list[ParamGroup]) -> list[ParamGroup]:
        """The mixture has a learning rate of its own and no decay."""
        own, rest = {}, []
        for group in groups:
            own.update({k: p for k, p in group.parameters.items() if k.startswith(f"{_MODULE}/")})
            others = {k: p for k, p in group.parameters.items() if k not in own}
            rest += [ParamGroup(others, **group.options)] if others else []
        return [*rest, ParamGroup(own, lr=self.lr, weight_decay=0.0)]

    @hook
    def wrap_loss(self, inner: Callable[..., Out], ctx: Context, batch: Batch, view: View) -> Out:
        """The inner loss; every so often, what share of the mixture lies below the last layer."""
        if ctx.run.step % _MEASURE_EVERY == 0:
            mixture: Any = ctx.run.module(_MODULE)
            ctx.report(self, below=1 - mixture.scores.detach().softmax(0)[-1], scale=mixture.scale.detach())
        return inner(ctx, batch, view)
