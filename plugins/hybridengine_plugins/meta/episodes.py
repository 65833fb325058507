"""Episodes: N-way K-shot tasks sampled from labelled rows, and adaptation to new classes at test time."""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from hybridengine.data import label_name
from hybridengine.errors import DataError, StackError
from hybridengine.evaluate import rows_interval
from hybridengine.plugin import Band, Run, Split, Traits, hook, parameter
from hybridengine.seams import Batch, Context, Draw, Prediction, View, permutation, weighted_sum

__all__ = ["Episodes"]


@dataclass(eq=False)
class Episodes:
    """Cuts every split into episodes: N classes, K support and Q query rows of each, labels renumbered 0..N−1.

    Maths: episode i of an epoch draws N distinct classes and K + Q distinct rows of each, as a function of (seed,
    split, epoch, i) alone; the numbering of the classes is random, so a head cannot learn names. One episode is one
    micro-batch, `train.accumulate` episodes make a step. Validation and test episodes are fixed; before each
    prediction the model takes `adapt_steps` steps θ ← θ − adapt_lr·∇L_support(θ) and is as before afterwards. `ci95`
    resamples episodes, not rows; the best weights are those of the best validation episodes.

    Paper: Vinyals et al. 2016, "Matching Networks for One Shot Learning" (episodic training).
    Hooks: `transform_data`, `build_sampler`, `wrap_predict`, `transform_metrics`. Cost: none in training, 3·adapt_steps
    per evaluated episode. Combines with `maml`, `reptile` and everything that does not count on fixed classes.
    """

    traits: ClassVar[Traits] = Traits(
        family="meta",
        order=Band.META,
        slots=("sampler",),
        requires=("labels", "functional"),
        provides=("episodes",),
        conflicts={
            "template": "label words name classes, but episodes renumber them; use one of the two",
            "class-weights": "weights belong to classes, but episodes renumber them; remove `class-weights`",
        },
        paper="Vinyals et al. 2016, arXiv:1606.04080",
        combines="maml, reptile, lora, attacks",
    )

    ways: int = parameter(5, "classes per episode", ge=2)
    shots: int = parameter(1, "support rows per class", ge=1)
    queries: int = parameter(5, "query rows per class", ge=1)
    per_epoch: int = parameter(100, "training episodes per epoch", ge=1)
    evaluation_episodes: int = parameter(200, "fixed episodes of each evaluation split", ge=1)
    adapt_steps: int = parameter(5, "gradient steps on the support rows before a prediction", ge=0)
    adapt_lr: float = parameter(0.1, "step size of these steps; best that of the inner loop in training", gt=0)
    adapt_parameters: list[str] = parameter(
        list, "patterns of the parameters that these steps move; none: what the inner loop in training moves"
    )

    _episodes: dict[tuple[int, ...], dict[str, float]] = field(default_factory=dict, init=False, repr=False)
    _classes: list[str] = field(default_factory=list, init=False, repr=False)

    @hook
    def transform_data(self, run: Run, splits: dict[str, Split]) -> dict[str, Split]:
        """Let the task number the classes of all splits; the model's outputs (`run.labels`) are the ways.

        Raises:
            StackError: for a task whose rows have no label of their own.
            DataError: for rows with several labels.
        """
        if "label" not in run.task.columns:
            raise StackError(
                f"episodes cuts rows by their label, but this task reads {', '.join(run.task.columns)}; remove episodes"
                " from methods, or use a classification task"
            )
        labelled = {name: [row for row in split.rows if "label" in row] for name, split in splits.items()}
        if any(isinstance(row["label"], list | tuple) for rows in labelled.values() for row in rows):
            raise DataError("episodes: every row must have one label, not a list; use a task without `multi_label`")
        run.task.prepare(run, [row for rows in labelled.values() for row in rows])
        self._classes, run.labels = list(run.labels), [f"way {i}" for i in range(self.ways)]
        names = {split: {label_name(row["label"]) for row in rows} for split, rows in labelled.items()}
        for split in ("validation", "test"):
            if shared := names.get(split, set()) & names["train"]:
                run.say(
                    f"episodes: {len(shared)} of {len(names[split])} classes of the {split} split also occur in"
                    " training; it measures new rows, not new classes"
                )
        return splits

    @hook
    def build_sampler(self, run: Run, split: str) -> Callable[[int], list[Draw]] | None:
        """Episodes of a split; the same every epoch except in training.

        Raises:
            DataError: too few classes with enough rows, with the numbers.
        """
        if split == "unlabelled":
            return None
        pools = self._pools(run, split)
        training = split == "train"
        count = self.per_epoch if training else self.evaluation_episodes

        def draws(epoch: int) -> list[Draw]:
            turn = epoch if training else 0
            return [self._draw(run.seed, split, pools, turn, index) for index in range(count)]

        return draws

    def _pools(self, run: Run, split: str) -> dict[int, list[int]]:
        """Positions of the rows of each class that has enough of them."""
        classes = run.labels if run.dry or not self._classes else self._classes
        ids = {name: index for index, name in enumerate(classes)}
        pools: dict[int, list[int]] = defaultdict(list)
        for position, row in enumerate(run.splits[split].rows):
            if "label" in row:
                pools[ids[label_name(row["label"])]].append(position)
        need = self.shots + self.queries
        large = {label: rows for label, rows in sorted(pools.items()) if len(rows) >= need}
        if len(large) < self.ways:
            raise DataError(
                f"episodes: the {split} split has {len(pools)} classes, {len(large)} of them with the {need} rows that"
                f" {self.shots} shots and {self.queries} queries take, but an episode needs {self.ways}; lower `ways`,"
                " `shots` or `queries`, or add rows"
            )
        if len(large) < len(pools):
            run.say(f"episodes: {len(pools) - len(large)} classes of the {split} split have fewer than {need} rows")
        return large

    def _draw(self, seed: int, split: str, pools: dict[int, list[int]], epoch: int, index: int) -> Draw:
        key = (seed, "episodes", split, epoch, index)
        labels = list(pools)
        chosen = [labels[i] for i in permutation(len(labels), *key)[: self.ways]]
        support: list[int] = []
        query: list[int] = []
        for label in chosen:
            rows = [pools[label][i] for i in permutation(len(pools[label]), *key, label)[: self.shots + self.queries]]
            support += rows[: self.shots]
            query += rows[self.shots :]
        parts = {"support": (split, tuple(support)), "query": (split, tuple(query))}
        return Draw(tuple(query), parts, {label: way for way, label in enumerate(chosen)}, epoch)

    @hook
    def wrap_predict(self, inner: Callable[..., Prediction], ctx: Context, batch: Batch, view: View) -> Prediction:
        """Predict the query rows with parameters adapted to the episode's support rows."""
        support = batch.parts.get("support")
        if support is None:
            return inner(ctx, batch, view)
        prediction = inner(ctx, batch, self._adapted(ctx, support, view))
        if prediction is not None and prediction.scores is not None and batch.targets is not None:
            right = prediction.scores.argmax(-1) == batch.targets
            of = {"accuracy": float(right.double().mean())}
            of.update({name: float(value) / batch.counts[unit] for name, (value, unit) in prediction.terms.items()})
            self._episodes[(*support.rows, *batch.rows)] = of
        return prediction

    @hook
    def transform_metrics(self, run: Run, metrics: dict[str, Any]) -> dict[str, Any]:
        """The interval over episodes: rows of one episode share their support rows and are no independent draws."""
        found, self._episodes = list(self._episodes.values()), {}
        if len(found) * self.ways * self.queries != metrics.get("rows"):
            return metrics
        main = metrics["main"]
        ends = None
        if all(main in of for of in found):
            values = np.array([of[main] for of in found])
            ends = rows_interval(values, resamples=run.config.evaluate.resamples, seed=run.seed)
        else:
            run.say(f"episodes: {main} is no mean over episodes, so it has no interval; accuracy and loss have one")
        return {**metrics, "episodes": len(found), "ci95": None if ends is None else list(ends)}

    def _adapted(self, ctx: Context, support: Batch, view: View) -> View:
        own = {unit: 1 / max(count, 1) for unit, count in support.counts.items()}
        patterns = self.adapt_parameters or ctx.run.inner_patterns
        mine = {k: p for k, p in ctx.run.may_optimise.items() if "/" not in k}
        chosen = {k: p for k, p in mine.items() if any(fnmatch.fnmatchcase(k, pattern) for pattern in patterns)}
        if not chosen or not self.adapt_steps:
            return view
        move = ctx.run.inner_update or self._stepped
        fast: dict[str, Tensor] = {k: p.detach().requires_grad_() for k, p in chosen.items()}
        with torch.enable_grad():
            for step in range(self.adapt_steps):
                out = ctx.task_loss(support, view.clean().with_params(fast).fork("adapt", step))
                pairs = zip(fast.items(), ctx.grad(weighted_sum(out.terms, own), list(fast.values())), strict=True)
                moved = {k: x if g is None else move(step, k, x.detach(), g) for (k, x), g in pairs}
                fast = {k: x.detach().requires_grad_() for k, x in moved.items()}
        adapted = {name: value.detach() for name, value in fast.items()}
        return view.with_params(adapted)

    def _stepped(self, step: int, name: str, value: Tensor, gradient: Tensor) -> Tensor:
        return value - (self.adapt_lr * gradient).to(value.dtype)
