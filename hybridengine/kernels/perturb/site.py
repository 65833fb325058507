"""One embedding site of a batch, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["Norm", "Per", "Site", "check_choices", "names_of"]

Norm = Literal["l2", "linf"]
Per = Literal["sequence", "token"]


class Site(NamedTuple):
    """`delta` and `gradient` [B, L, D] and the boolean `mask` [B, L] of one site."""

    delta: Tensor
    gradient: Tensor
    mask: Tensor

    @classmethod
    def of(cls, delta: Tensor, gradient: Tensor, mask: Tensor) -> Site:
        """Check shapes; detach; make the mask boolean.

        Raises:
            ValueError: if the shapes do not match.
        """
        if delta.dim() != 3 or gradient.shape != delta.shape or mask.shape != delta.shape[:2]:
            raise ValueError(
                "expected delta and gradient [B, L, D] and mask [B, L], got "
                f"{tuple(delta.shape)}, {tuple(gradient.shape)} and {tuple(mask.shape)}"
            )
        return cls(delta.detach(), gradient.detach(), mask if mask.dtype == torch.bool else mask != 0)

    def by_token(self) -> Site:
        """Every token as a sequence of its own: [B L, 1, D]."""
        delta, gradient = (one.flatten(0, 1).unsqueeze(1) for one in (self.delta, self.gradient))
        return Site(delta, gradient, self.mask.flatten().unsqueeze(1))


def check_choices(norm: str, per: str) -> None:
    """Raise ValueError for a `norm` or a `per` that there is not."""
    if norm not in ("l2", "linf"):
        raise ValueError(f"norm must be 'l2' or 'linf', not {norm!r}")
    if per not in ("sequence", "token"):
        raise ValueError(f"per must be 'sequence' or 'token', not {per!r}")


def names_of(**parts: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the sites, which all parts must have.

    Raises:
        ValueError: if they differ.
    """
    names = tuple(next(iter(parts.values())))
    if any(set(part) != set(names) for part in parts.values()):
        raise ValueError(f"the sites differ: {', '.join(f'{part} {tuple(sites)}' for part, sites in parts.items())}")
    return names
