"""Balanced sampling: rare classes more often."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from hybridengine.data import label_name
from hybridengine.errors import DataError, StackError
from hybridengine.plugin import Run, Traits, hook, parameter
from hybridengine.seams import Draw, permutation

__all__ = ["BalancedSampling"]


@dataclass(eq=False)
class BalancedSampling:
    """Draws training rows so that rare classes come up more often than they are.

    Maths: with n_c rows of class c, an epoch has as many draws as there are rows, a share of n_c^power / Σ n^power of
    them from class c: power 0 draws all classes alike, 1 as often as they are, 0.5 in between. Rows of a class take
    turns, so that none comes up twice more than another. Unlike `class-weights`, the loss stays that of each row, and a
    batch sees rare classes at all; repeated rows are learned by heart sooner.

    Paper: Mahajan et al. 2018, "Exploring the Limits of Weakly Supervised Pretraining" (square root); Kang et al. 2020,
    "Decoupling Representation and Classifier for Long-Tailed Recognition" (power).
    Hooks: `build_sampler`. Cost: batches are not grouped by length, so there is more padding. Combines with everything
    but other orders of the rows.
    """

    name: ClassVar[str] = "balanced-sampling"
    traits: ClassVar[Traits] = Traits(
        family="data",
        slots=("sampler",),
        requires=("labels",),
        cost="more padding: batches are not grouped by length",
        paper="Kang et al. 2020, arXiv:1910.09217",
        combines="everything but curriculum and episodes; class-weights would correct twice",
    )

    power: float = parameter(0.5, "0: all classes alike, 1: as often as they are", ge=0, le=1)

    @hook
    def build_sampler(self, run: Run, split: str) -> Callable[[int], list[Draw]] | None:
        """Draws of the training split.

        Raises:
            StackError: rows have no label of their own.
            DataError: a row has none, or several.
        """
        if split != "train":
            return None
        if not run.dry and "label" not in run.task.columns:
            raise StackError(
                f"balanced-sampling draws by labels, but this task reads {', '.join(run.task.columns)}; remove"
                " balanced-sampling from methods"
            )
        places: dict[str, list[int]] = defaultdict(list)
        for position, row in enumerate(run.splits[split].rows):
            label = row.get("label")
            if label is None or isinstance(label, list | tuple):
                what = "no label" if label is None else "several labels"
                raise DataError(
                    f"balanced-sampling: {run.splits[split].where(position)} has {what}, it needs one; remove"
                    " balanced-sampling, or such rows"
                )
            places[label_name(label)].append(position)
        counts = self._counts({name: len(rows) for name, rows in places.items()})
        if not run.dry:
            shown = ", ".join(f"{name} {counts[name]:,} for {len(rows):,}" for name, rows in sorted(places.items())[:6])
            run.say(f"balanced-sampling: draws an epoch for rows: {shown}{' ...' if len(places) > 6 else ''}")
        size = run.config.train.batch_size

        def draws(epoch: int) -> list[Draw]:
            drawn: list[int] = []
            for name, rows in places.items():
                drawn += _in_turn(rows, counts[name], run.seed, epoch, name)
            order = permutation(len(drawn), run.seed, "balanced", epoch)
            mixed = [drawn[i] for i in order]
            return [Draw(tuple(mixed[i : i + size]), epoch=epoch) for i in range(0, len(mixed), size)]

        return draws

    def _counts(self, sizes: dict[str, int]) -> dict[str, int]:
        """Draws of each class that add up to the rows, by largest remainders."""
        total, whole = sum(sizes.values()), sum(size**self.power for size in sizes.values())
        exact = {name: total * size**self.power / whole for name, size in sizes.items()}
        counts = {name: int(share) for name, share in exact.items()}
        left = total - sum(counts.values())
        for name in sorted(exact, key=lambda n: counts[n] - exact[n])[:left]:
            counts[name] += 1
        return counts


def _in_turn(rows: list[int], count: int, seed: int, epoch: int, name: str) -> list[int]:
    """`count` rows, all of them equally often up to one; the first ones of an epoch go on where the last stopped."""
    start, drawn = epoch * count, []
    for place in range(start, start + count):
        turn, index = divmod(place, len(rows))
        if index == 0 or not drawn:
            order = permutation(len(rows), seed, "turn", name, turn)
        drawn.append(rows[order[index]])
    return drawn
