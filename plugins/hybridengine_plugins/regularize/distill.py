"""Distillation: learn from another model's predictions, hidden states and attention, or from one's own average."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hybridengine.errors import ModelError, StackError
from hybridengine.plugin import Band, Run, StackView, Traits, hook, parameter
from hybridengine.seams import (
    Average,
    Batch,
    Context,
    Out,
    Row,
    View,
    Work,
    add_terms,
    attention_distance,
    evaluating,
    hidden_distance,
    kl_rows,
    width_projection,
)
from hybridengine.text import base_model

__all__ = ["Distill"]


@dataclass(eq=False)
class Distill:
    """Mix the task's loss with the divergence from a teacher's softened predictions, and add that of inner states.

        loss = (1 - alpha) CE + alpha T^2 KL(softmax(teacher / T) || softmax(student / T))
             + hidden mean_i MSE(W h_i, h'_g(i)) + attention mean_i |A_i - A'_g(i)|^2

    T^2 keeps the gradient's size independent of the temperature T. The teacher's terms need no labels: rows of
    `data.unlabelled` are learned from too, and they are averaged over all rows. The teacher is frozen, sees clean
    inputs without dropout, and is evaluated once per micro-batch however many passes the stack makes (but anew for each
    doubled batch of an outer rdrop). A finished run that writes rows its own way (template, pet) is asked by the rows
    themselves, once for each, through all that it does when it predicts. Token tasks take each row's mean over its
    scored tokens; multi-label tasks put a sigmoid in the place of the softmax and sum over the labels.

    With `teacher: ema` the student's running average teaches (mean teacher): after step t it moves by 1 - d towards the
    weights, d = min(decay, (1 + t) / (10 + t)).

    `hidden` and `attention` compare states h and attention maps A of each layer with the teacher's at the same share of
    its depth; h_0 is below the first layer. MSE is the mean over tokens and coordinates; W is learned where widths
    differ, else there is none. The squared distance of maps is the mean over tokens and heads (of the heads' mean where
    their numbers differ); maps come from plain attention, which `attention` switches on, for fused kernels make none.

    Hooks: `on_run_start`, `check_stack`, `wrap_loss`, `wrap_step`. Defaults: alpha 0.5, temperature 2, no inner states.
    """

    traits: ClassVar[Traits] = Traits(
        family="regularize",
        order=Band.TERM,
        effect="kl",
        cost="1 forward of the teacher; 1.33x a plain step with a teacher of the same size, 2.67x with unlabelled rows",
        paper="Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015; Jiao et al.: TinyBERT, EMNLP"
        " 2020; Tarvainen, Valpola: Mean Teachers, NeurIPS 2017",
        combines="unlabelled data, lora, ema, embedding attacks (the teacher sees the clean input), rdrop",
    )

    teacher: str = parameter(
        help="a model folder, a hub id, `best/` of an earlier run, or `ema`: the student's own average", min_length=1
    )
    alpha: float = parameter(0.5, "share of the teacher's term; the task's loss gets the rest", ge=0, le=1)
    temperature: float = parameter(2.0, "softens both predictions", gt=0)
    hidden: float = parameter(0.0, "factor of the distance between hidden states", ge=0)
    attention: float = parameter(0.0, "factor of the distance between attention maps", ge=0)
    decay: float = parameter(0.99, "how much of the average survives a step, with `teacher: ema`", ge=0, lt=1)
    _answers: Callable[[Sequence[Row]], Tensor] | None = field(default=None, init=False, repr=False)
    _told: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)
    _taught: WeakKeyDictionary[Batch, Out] = field(default_factory=WeakKeyDictionary, init=False, repr=False)

    def __post_init__(self) -> None:
        self._averages = self.teacher == "ema"
        self._features = "attention" if self.attention else self.hidden > 0

    @hook
    def check_stack(self, stack: StackView) -> list[str]:
        """Layers are compared position by position, in one stack of them."""
        if not self._features:
            return []
        two = getattr(stack.facts["model"], "is_encoder_decoder", False)
        # Prefixes bring an attention that makes no maps; a teacher but the student has no soft tokens at all.
        clash = {"prefix"} if self.attention or not self._averages else set()
        clash |= set() if self._averages else {"soft_prompt", "soft_template"}
        found = ["this model has two stacks of layers"] if two else []
        found += [f"states beside {m.name} cannot be compared" for m in stack.methods if clash & set(m.traits.slots)]
        return [f"distill: {problem}; set `hidden` and `attention` to 0" for problem in found]

    @hook
    def on_run_start(self, run: Run) -> None:
        """Load the teacher, frozen and without dropout; predictions need none."""
        self._taught.clear()
        self._told.clear()
        if run.predicting:
            return
        teacher = run.model if self._averages else self._loaded(run)
        if self._features and not run.dry:
            self._prepare(run, teacher)

    def _loaded(self, run: Run) -> nn.Module | None:
        try:
            self._answers = run.load_answers(self.teacher)
            teacher = None if self._answers else run.load_model(self.teacher)
        except ModelError as error:
            raise ModelError(f"distill: {error}") from error
        if teacher is not None:
            run.add_module("teacher", teacher.eval().requires_grad_(False), static=True)
        return teacher

    def _prepare(self, run: Run, teacher: nn.Module | None) -> None:
        """Let both models return what is compared, and learn a projection where their widths differ."""
        if teacher is None:
            what = f"distill: {self.teacher} writes rows its own way and gives answers alone"
            raise ModelError(f"{what}; set `hidden` and `attention` to 0")
        if self.attention:
            for model in (run.model, teacher):
                base_model(model).set_attn_implementation("eager")
            run.say("distill: attention maps are compared, so attention is computed plainly, without fused kernels")
        projection = None if self._averages else width_projection(run.model, teacher, run.probe, run.seed)
        if self.hidden and projection is not None:
            run.add_module("distill", projection)

    @hook
    def wrap_loss(self, inner: Callable[..., Out], ctx: Context, batch: Batch, view: View) -> Out:
        """The mixture of the inner terms and the teacher's."""
        with ctx.with_features(self._features):
            out = inner(ctx, batch, view)
        apart, rows = self._apart(ctx, batch, out), batch.size
        if (part := batch.parts.get("unlabelled")) is not None:
            student = ctx.outputs(part, [view.clean().fork("unlabelled")], features=self._features)[0]
            apart, rows = add_terms(apart, self._apart(ctx, part, student)), rows + part.size
        factors = {"kl": self.alpha * self.temperature**2, "hidden": self.hidden, "attention": self.attention}
        terms = {name: ((1 - self.alpha) * value, unit) for name, (value, unit) in out.terms.items()}
        for name, value in apart.items():
            terms["distill" if name == "kl" else f"distill_{name}"] = (factors[name] * value, "all_rows")
        ctx.report(self, **{name: value / rows for name, value in apart.items()})
        return replace(out, terms=terms)

    @hook
    def wrap_step(
        self, inner: Callable[..., Mapping[str, Tensor]], ctx: Context, works: Sequence[Work]
    ) -> Mapping[str, Tensor]:
        """The inner step; then the average, where that teaches, follows the moved weights."""
        if not self._averages:
            return inner(ctx, works)
        average, step = Average(ctx.run, "distill"), ctx.run.step
        average.join()
        terms = inner(ctx, works)
        average.follow(rate=1 - min(self.decay, (1 + step) / (10 + step)))
        return terms

    def _apart(self, ctx: Context, batch: Batch, out: Out) -> dict[str, Tensor]:
        """How far predictions, and what of the inside is asked for, are from the teacher's: sums over rows."""
        taught, scores = self._teach(ctx, batch), out.scores
        if taught.scores.shape != scores.shape:
            raise ModelError(
                f"distill: the teacher {self.teacher} gives scores of shape {tuple(taught.scores.shape)}, the student"
                f" {tuple(scores.shape)}; both need the same classes or vocabulary"
            )
        apart = {"kl": kl_rows(taught.scores, scores, batch, ctx.run.task, temperature=self.temperature)}
        mask, project = batch.inputs.get("attention_mask"), ctx.run.modules.get("distill")
        try:
            if self.hidden:
                apart["hidden"] = hidden_distance(out.layers, taught.layers, mask, project)
            if self.attention:
                apart["attention"] = attention_distance(out.attentions, taught.attentions, mask)
        except ValueError as error:
            raise StackError(f"distill: {error}; set `hidden` and `attention` to 0") from error
        return apart

    @torch.no_grad()
    def _teach(self, ctx: Context, batch: Batch) -> Out:
        if self._answers is not None:
            return Out(logits=self._answered(ctx, batch))
        if batch not in self._taught:
            teacher = ctx.run.model if self._averages else ctx.run.module("teacher")
            other = None if self._averages else teacher
            view = View(Average(ctx.run, "distill").parameters()) if self._averages else View()
            with evaluating(teacher):
                (self._taught[batch],) = ctx.outputs(batch, [view], model=other, features=self._features)
        return self._taught[batch]

    def _answered(self, ctx: Context, batch: Batch) -> Tensor:
        """What a finished run says about the rows themselves."""
        assert self._answers is not None
        if missing := [row for row in dict.fromkeys(batch.rows) if row not in self._told]:
            ctx.trace.add("f", len(missing))
            found = self._answers(ctx.run.rows_of(missing))
            self._told.update(zip(missing, found.detach().to(ctx.run.device), strict=True))
        return torch.stack([self._told[row] for row in batch.rows])
