"""Change what one module of a model computes, and what its copies compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["override_forward"]


def override_forward(module: nn.Module, forward: Callable[..., Any]) -> type[nn.Module]:
    """Give `module` a class of its own whose forward is `forward(module, ...)`; returns the class it had.

    The way of `torch.nn.utils.parametrize`. An attribute `forward` would be bound to the original in copies of the
    module (teachers, averages); a forward hook takes every call by torch's slow road, some 15 microseconds longer.
    """
    own = type(module)
    module.__class__ = type(own.__name__, (own,), {"forward": forward})
    return own
