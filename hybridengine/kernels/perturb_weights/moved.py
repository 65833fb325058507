"""Weights that were moved, and the way back."""

from __future__ import annotations

from collections.abc import Callable

from hybridengine.kernels.keep.kept import Kept

__all__ = ["MovedWeights"]


class MovedWeights(Kept):
    """As a context it restores the weights at its end, whatever happens inside.

    Attributes:
        norm: of all gradients, for ASAM times the weights' sizes.
        usable: whether a gradient had a direction, so that weights moved (unless rho is 0).
    """

    def __init__(self, norm: float, usable: bool, distance: Callable[[], float], restore: Callable[[], object]) -> None:
        super().__init__(restore)
        self.norm = norm
        self.usable = usable
        self._distance = distance

    def distance(self) -> float:
        """The norm of what was added to the weights, after rounding. Ask before they are restored.

        Known from the move natively; otherwise measured.
        """
        return self._distance()

    def __enter__(self) -> MovedWeights:
        return self
