"""Distillation: learn from another model's predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hybridengine.errors import ModelError
from hybridengine.plugin import Band, Run, Traits, hook, parameter
from hybridengine.seams import Batch, Context, Out, Row, View, kl_rows

__all__ = ["Distill"]


@dataclass(eq=False)
class Distill:
    """Mix the task's loss with the divergence from a fixed teacher's softened predictions.

        loss = (1 - alpha) CE + alpha T^2 KL(softmax(teacher / T) || softmax(student / T))

    T^2 keeps the gradient's size independent of the temperature T. The teacher's term needs no labels: rows of
    `data.unlabelled` are learned from too, and it is averaged over all rows. The teacher is frozen, sees clean inputs
    without dropout, and is evaluated once per micro-batch however many passes the stack makes (but anew for each
    doubled batch of an outer rdrop). A finished run that writes rows its own way (template, pet) is asked by the rows
    themselves, once for each, through all that it does when it predicts. Token tasks take each row's mean over its
    scored tokens; multi-label tasks put a sigmoid in the place of the softmax and sum over the labels.

    Hooks: `on_run_start`, `wrap_loss`. Defaults: alpha 0.5, temperature 2, the middle of the published range.
    """

    traits: ClassVar[Traits] = Traits(
        family="regularize",
        order=Band.TERM,
        effect="kl",
        cost="1 forward of the teacher; 1.33x a plain step with a teacher of the same size, 2.67x with unlabelled rows",
        paper="Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015",
        combines="unlabelled data, lora, ema, embedding attacks (the teacher sees the clean input), rdrop",
    )

    teacher: str = parameter(help="the teacher: a model folder, a hub id, or `best/` of an earlier run", min_length=1)
    alpha: float = parameter(0.5, "share of the teacher's term; the task's loss gets the rest", ge=0, le=1)
    temperature: float = parameter(2.0, "softens both predictions", gt=0)
    _answers: Callable[[Sequence[Row]], Tensor] | None = field(default=None, init=False, repr=False)
    _told: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)
    _taught: WeakKeyDictionary[Batch, Tensor] = field(default_factory=WeakKeyDictionary, init=False, repr=False)

    @hook
    def on_run_start(self, run: Run) -> None:
        """Load the teacher, frozen and without dropout; predictions need none."""
        self._taught.clear()
        self._told.clear()
        if run.predicting:
            return
        try:
            self._answers = run.load_answers(self.teacher)
            if self._answers is not None:
                return
            teacher = run.load_model(self.teacher)
        except ModelError as error:
            raise ModelError(f"distill: {error}") from error
        run.add_module("teacher", teacher.eval().requires_grad_(False), static=True)

    @hook
    def wrap_loss(self, inner: Callable[..., Out], ctx: Context, batch: Batch, view: View) -> Out:
        """The mixture of the inner terms and the teacher's."""
        out = inner(ctx, batch, view)
        kl, rows = self._divergence(ctx, batch, out.scores), batch.size
        if (part := batch.parts.get("unlabelled")) is not None:
            student = ctx.outputs(part, [view.clean().fork("unlabelled")])[0].scores
            kl, rows = kl + self._divergence(ctx, part, student), rows + part.size
        terms = {name: ((1 - self.alpha) * value, unit) for name, (value, unit) in out.terms.items()}
        terms["distill"] = (self.alpha * self.temperature**2 * kl, "all_rows")
        ctx.report(self, kl=kl / rows)
        return replace(out, terms=terms)

    def _divergence(self, ctx: Context, batch: Batch, scores: Tensor) -> Tensor:
        taught = self._teach(ctx, batch) if self._answers is None else self._answered(ctx, batch)
        if taught.shape != scores.shape:
            raise ModelError(
                f"distill: the teacher {self.teacher} gives scores of shape {tuple(taught.shape)}, the student"
                f" {tuple(scores.shape)}; both need the same classes or vocabulary"
            )
        return kl_rows(taught, scores, batch, ctx.run.task, temperature=self.temperature)

    def _teach(self, ctx: Context, batch: Batch) -> Tensor:
        if batch not in self._taught:
            with torch.no_grad():
                self._taught[batch] = ctx.outputs(batch, [View()], model=ctx.run.module("teacher"))[0].scores
        return self._taught[batch]

    def _answered(self, ctx: Context, batch: Batch) -> Tensor:
        """What a finished run says about the rows themselves."""
        assert self._answers is not None
        if missing := [row for row in dict.fromkeys(batch.rows) if row not in self._told]:
            ctx.trace.add("f", len(missing))
            found = self._answers(ctx.run.rows_of(missing))
            self._told.update(zip(missing, found.detach().to(ctx.run.device), strict=True))
        return torch.stack([self._told[row] for row in batch.rows])
