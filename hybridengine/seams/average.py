"""The running average of what a run trains."""

from __future__ import annotations

from torch import Tensor

from hybridengine import kernels
from hybridengine.seams.host import Host
from hybridengine.seams.precision import wide

__all__ = ["Average"]


class Average:
    """A running average of the trained weights in at least fp32, kept in `run.state(name)` and so in checkpoints.

    Attributes:
        values: the averages by name; those of weights that rest for now are among them.
    """

    def __init__(self, run: Host, name: str) -> None:
        self._run = run
        self.values: dict[str, Tensor] = run.state(name)

    def join(self) -> dict[str, Tensor]:
        """The weights that are trained now; those that are new to the average join it as they are."""
        weights = {name: weight.detach() for name, weight in self._run.optimised().items()}
        for name in weights.keys() - self.values.keys():
            self.values[name] = wide(weights[name]).clone()
        return weights

    def follow(self, *, rate: float) -> None:
        """Move the average of what is trained now by a share `rate` of the way to its weights."""
        weights = self.join()
        kernels.ema_update([self.values[name] for name in weights], list(weights.values()), rate=rate)

    def parameters(self) -> dict[str, Tensor]:
        """The averages of what is trained now, in the weights' formats, for a view."""
        return {name: self.values[name].to(weight.dtype) for name, weight in self.join().items()}
