"""Class weights: rare classes count more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hybridengine.data import label_name, labels_of
from hybridengine.errors import ConfigError, did_you_mean
from hybridengine.plugin import Band, Run, Traits, hook, parameter
from hybridengine.seams import Batch, Context, Out, View

__all__ = ["ClassWeights"]

_MEASURE_EVERY = 10  # steps between measurements of the effect, each a second look at the logits


@dataclass(eq=False)
class ClassWeights:
    """Multiply each row's (or token's) loss by the weight of its class.

        loss = sum_i w[y_i] CE_i / n,        balanced: w_c = n / (C n_c), n_c the training rows of class c

    Balanced weights average to 1 over the training set, so the size of the loss stays. It is the leaf loss: the
    task's plain cross-entropy is not computed beside it, except every tenth step to report how far the two differ.

    Hooks: `on_run_start`, `wrap_loss`. Default: balanced, so that all classes have the same say.
    """

    traits: ClassVar[Traits] = Traits(
        family="regularize",
        order=Band.LEAF,
        slots=("leaf_loss",),
        requires=("labels",),
        ignores_inner=("loss",),
        effect="loss_change",
        paper="King, Zeng: Logistic Regression in Rare Events Data, Political Analysis 2001",
        combines="anything but another leaf loss; smooth labels through its own label_smoothing",
    )

    weights: Literal["balanced"] | dict[str | int, float] = parameter(
        "balanced", "balanced, or a weight per label; labels left out weigh 1"
    )
    label_smoothing: float = parameter(0.0, "share of the label spread over all classes", ge=0, lt=1)
    _weight: Tensor = field(default_factory=lambda: torch.ones(0), init=False, repr=False)

    def __post_init__(self) -> None:
        if self.weights != "balanced" and not all(weight > 0 for weight in self.weights.values()):
            raise ValueError(f"weights must be positive, got {dict(self.weights)}; to drop a class, drop its rows")

    @hook
    def on_run_start(self, run: Run) -> None:
        """Fix the weight of every class; none matters where nothing is trained."""
        labels = [str(label) for label in run.labels]
        if run.dry or run.predicting:
            values = [1.0] * len(labels)
        elif self.weights == "balanced":
            values = self._balanced(run, labels)
        else:
            given = {label_name(label): weight for label, weight in self.weights.items()}
            if unknown := sorted(set(given) - set(labels)):
                hint = did_you_mean(unknown[0], labels)
                raise ConfigError(f"class-weights: no label is named {', '.join(map(repr, unknown))}.{hint}")
            values = [given.get(label, 1.0) for label in labels]
        self._weight = torch.tensor(values, device=run.device)

    @hook
    def wrap_loss(self, inner: Callable[..., Out], ctx: Context, batch: Batch, view: View) -> Out:
        """The task's loss with weighted classes."""
        out = ctx.outputs(batch, [view])[0]
        logits, task = out.logits, ctx.run.task
        exact = logits is not None and logits.dtype == torch.float64
        weight = self._weight.double() if exact else self._weight
        terms = task.terms(logits, batch, weight=weight, label_smoothing=self.label_smoothing)
        if ctx.run.step % _MEASURE_EVERY == 0:
            with torch.no_grad():
                plain = task.terms(logits, batch)
                change = sum(abs(terms[name][0] - value) for name, (value, _) in plain.items())
                ctx.report(self, loss_change=change / batch.size)
        return replace(out, terms=terms)

    @staticmethod
    def _balanced(run: Run, labels: list[str]) -> list[float]:
        counts = Counter(name for row in run.splits["train"].rows for name in labels_of(row))
        if not counts:
            raise ConfigError(
                "class-weights: the training rows carry no label to count; give `weights` a weight per label"
            )
        total, classes = sum(counts.values()), len(counts)
        return [total / (classes * counts[label]) if counts[label] else 1.0 for label in labels]
