"""For optimizers and parameter groups of a plugin's own: one group at a time, some parameters apart from the rest."""

from __future__ import annotations

import fnmatch
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hybridengine.run import ParamGroup, Run

__all__ = ["GroupwiseOptimizer", "split_hidden", "with_rate"]


class GroupwiseOptimizer(torch.optim.Optimizer, ABC):
    """A torch optimizer whose step is a move of each parameter group; a subclass says what a move is.

    Args:
        entries: parameter groups as torch takes them.
        defaults: options of groups that have none of their own.
    """

    def __init__(self, entries: Iterable[dict[str, Any]], **defaults: Any) -> None:
        super().__init__(entries, defaults)

    @abstractmethod
    def move(self, group: dict[str, Any]) -> None:
        """Move the parameters of a group that have a gradient; gradients are not recorded."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; parameters without a gradient rest."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self.move(group)
        return loss


def split_hidden(
    run: Run, groups: Sequence[ParamGroup], chosen: Callable[[Tensor], bool] = lambda matrix: True
) -> Iterator[tuple[dict[str, Any], bool]]:
    """Groups as torch takes them, vectors undecayed, those of hidden layers' matrices apart.

    Args:
        chosen: which of these matrices, which are neither embeddings nor of the task's head or a run module.

    Yields:
        A group, and whether it holds chosen matrices.
    """
    apart = {id(p) for module in run.model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    for group in groups:
        named, head = group.parameters.items(), run.task.head
        apart |= {id(p) for n, p in named if "/" in n or any(fnmatch.fnmatchcase(n, part) for part in head)}
        for entry in group.with_undecayed_vectors():
            hidden = [p for p in entry["params"] if p.dim() == 2 and id(p) not in apart and chosen(p)]
            kept = {id(p) for p in hidden}
            rest = [p for p in entry["params"] if id(p) not in kept]
            if hidden:
                yield {**entry, "params": hidden}, True
            if rest:
                yield {**entry, "params": rest}, False


def with_rate(run: Run, groups: Sequence[ParamGroup], chosen: Callable[[str], bool], ratio: float) -> list[ParamGroup]:
    """Groups in which the parameters whose names are chosen learn at `ratio` times their group's rate."""
    split = []
    for group in groups:
        apart = {name: value for name, value in group.parameters.items() if chosen(name)}
        rest = {name: value for name, value in group.parameters.items() if not chosen(name)}
        rate = group.options.get("lr", run.config.train.lr)
        split += [ParamGroup(rest, **group.options)] if rest else []
        split += [ParamGroup(apart, **{**group.options, "lr": ratio * rate})] if apart else []
    return split
