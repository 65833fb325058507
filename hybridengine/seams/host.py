"""What the context needs of the run that owns the model: the seams stand below the run and know it by this alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hybridengine.seams.backbone import Backbone
from hybridengine.seams.first_position import FirstPosition
from hybridengine.seams.precision import LossScale, Precision
from hybridengine.seams.sites import Sites
from hybridengine.seams.soft_tokens import SoftTokens
from hybridengine.seams.task import Row

__all__ = ["Host"]


class Host(Protocol):
    """What the context needs of the run that owns the model."""

    model: Any
    forward_model: Any
    device: torch.device
    precision: Precision
    loss_scale: LossScale
    seed: int
    step: int
    sites: Sites | None
    soft_tokens: SoftTokens
    value: Callable[[str, Tensor], Tensor]
    first_position: FirstPosition | None
    backbone: Backbone | None
    lazy_head: nn.Module | None
    task: Any
    cloze: Any
    optimizer: Any
    scheduler: Any
    clip: float | None

    def optimised(self) -> dict[str, nn.Parameter]: ...
    def adapted(self) -> dict[str, nn.Parameter]: ...
    def perturbed(self) -> dict[str, nn.Parameter]: ...
    def state(self, name: str) -> dict[str, Any]: ...
    def module(self, name: str) -> nn.Module: ...
    def places(self, rows: Sequence[int]) -> list[str]: ...
    def rows_of(self, ids: Sequence[int]) -> list[Row]: ...
