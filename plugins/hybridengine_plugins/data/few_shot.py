"""Few-shot: K labelled rows of each class, chosen by the seed."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

from hybridengine.data import label_name
from hybridengine.errors import DataError, StackError
from hybridengine.plugin import Band, Run, Split, Traits, hook, parameter
from hybridengine.seams import permutation

__all__ = ["FewShot"]


@dataclass(eq=False)
class FewShot:
    """Trains on K rows of each class, and can judge checkpoints by K others.

    Maths: of each class the first K rows of a random order that is a function of (seed, split, class) alone: K = 8 is
    part of K = 16. Rows that are left out are gone; test rows all stay. Results swing from choice to choice, so run
    several seeds.

    Paper: Gao, Fisch, Chen 2021, "Making Pre-trained Language Models Better Few-shot Learners" (LM-BFF), section 3:
    development data as small as the training data.
    Hooks: `transform_data`. Cost: none. Combines with everything; data methods that add rows see the chosen ones alone.
    """

    name: ClassVar[str] = "few-shot"
    traits: ClassVar[Traits] = Traits(
        family="data",
        order=Band.LEAF,
        requires=("labels",),
        paper="Gao et al. 2021, arXiv:2012.15723",
        combines="everything; eda and its like copy the chosen rows",
    )

    shots: int = parameter(16, "training rows of each class", ge=1)
    validation: bool = parameter(False, "keep as few validation rows, as where no others would be at hand")

    @hook
    def transform_data(self, run: Run, splits: dict[str, Split]) -> dict[str, Split] | None:
        """Choose rows.

        Raises:
            StackError: rows have no label of their own.
            DataError: a row has several labels, or a class too few rows.
        """
        if run.dry:
            return None
        if "label" not in run.task.columns:
            raise StackError(
                f"few-shot chooses rows by their label, but this task reads {', '.join(run.task.columns)}; remove"
                " few-shot from methods, or set `data.limit`"
            )
        chosen = ["train", "validation"] if self.validation and "validation" in splits else ["train"]
        return {name: self._choose(run, split) if name in chosen else split for name, split in splits.items()}

    def _choose(self, run: Run, split: Split) -> Split:
        places: dict[str, list[int]] = defaultdict(list)
        for position, row in enumerate(split.rows):
            label = row.get("label")
            if isinstance(label, list | tuple):
                raise DataError(f"few-shot: {split.where(position)} has several labels; use `data.limit` in its place")
            if label is not None:
                places[label_name(label)].append(position)
        small = {name: len(rows) for name, rows in sorted(places.items()) if len(rows) < self.shots}
        if small:
            name, count = next(iter(small.items()))
            raise DataError(
                f"few-shot: class {name!r} has {count} rows in the {split.name} split, not {self.shots}; lower `shots`"
                " or add rows"
            )
        kept = []
        for name, rows in places.items():
            order = permutation(len(rows), run.seed, "few-shot", split.name, name)
            kept += [rows[i] for i in order[: self.shots]]
        run.say(f"few-shot: {len(kept):,} of {len(split):,} {split.name} rows, {self.shots} of each class")
        return split.select(sorted(kept))
