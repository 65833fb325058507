"""What lazy logits are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Head"]


class Head(NamedTuple):
    """`outer * tanh(scale * (x @ weight.T + bias))`, or without `tanh` and `outer`.

    x [..., H], weight [V, H], bias [V]. `made_in` is the dtype that the model multiplies in, `dtype` that of the
    result. `on_read` is called before all of it is computed.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    made_in: torch.dtype
    dtype: torch.dtype
    scale: float = 1.0
    squashed: bool = False
    outer: float = 1.0
    on_read: Callable[[], None] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the logits."""
        return (*self.x.shape[:-1], len(self.weight))

    @property
    def classes(self) -> int:
        """V."""
        return len(self.weight)

    @property
    def rows(self) -> int:
        """The number of positions."""
        return self.x.shape[:-1].numel()

    def versions(self) -> tuple[int, ...]:
        """Count the changes in place of what the logits are made of."""
        return tuple(one._version for one in (self.x, self.weight, self.bias) if one is not None)

    def whole(self) -> Tensor:
        """Return the logits and tell so."""
        if self.on_read is not None:
            self.on_read()
        return self.computed()

    def computed(self) -> Tensor:
        """Return the logits, computed as the model would have."""
        with torch.autocast(self.x.device.type, enabled=False):
            logits = functional.linear(*self.as_made()).to(self.dtype)
        logits = logits if self.scale == 1.0 else logits * self.scale
        logits = torch.tanh(logits) if self.squashed else logits
        return logits if self.outer == 1.0 else logits * self.outer

    def as_made(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return x, weight and bias in the dtype that the model multiplies in."""
        kind = self.made_in
        return self.x.to(kind), self.weight.to(kind), None if self.bias is None else self.bias.to(kind)

    def scaled(self, factor: float) -> Head:
        """Return the logits times `factor`."""
        if self.squashed:
            return self._replace(outer=self.outer * factor)
        return self._replace(scale=self.scale * factor)

    def softcap(self) -> tuple[float, float | None]:
        """Return (scale, softcap) as `cross_entropy` names them: c tanh(k z / c)."""
        return (self.scale * self.outer, self.outer) if self.squashed else (self.scale, None)
