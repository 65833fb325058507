"""Run methods on a small model step by step: what plugin authors and this project's own tests stand on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hybridengine.config import Config, load_config
from hybridengine.plugin.calling import Hooks
from hybridengine.plugin.stacking import Method
from hybridengine.run import Run
from hybridengine.seams import Batch, Context, Out, Prediction, Sites, Term, View
from hybridengine.seams.base import make_works
from hybridengine.seams.precision import LossScale, Precision
from hybridengine.stack import EffectLog, as_method, compose, evaluation

__all__ = ["Bench", "SimpleTask", "make_batch", "set_up", "tiny_config"]

_CONFIG = {"task": "none", "model": {"name": "none"}, "data": {"train": "none"}}


def tiny_config(**train: Any) -> Config:
    """A config for tests; keyword arguments go to its `train` section."""
    return load_config({**_CONFIG, "train": train})[0]


class SimpleTask:
    """A task over any model that returns `.logits`: summed cross-entropy per row, or per token.

    Args:
        unit: `rows` for `[B, C]` logits, `tokens` for `[B, L, C]` with targets -100 where unscored.
    """

    metric = "accuracy"
    greater_is_better = True
    head: Sequence[str] = ("classifier*", "score*")

    def __init__(self, unit: str = "rows") -> None:
        self.unit = unit

    def loss(self, ctx: Context, batch: Batch, view: View) -> Out:
        """The leaf loss, as real tasks write it."""
        out = ctx.outputs(batch, [view])[0]
        return replace(out, terms=self.terms(out.scores, batch))

    def terms(self, logits: Tensor, batch: Batch, **options: Any) -> dict[str, Term]:
        """Summed cross-entropy by plain torch, in the logits' own precision."""
        target = batch.targets
        if logits.dim() > 2:
            logits, target = logits.flatten(0, -2), target.flatten()
        return {"loss": (functional.cross_entropy(logits, target, reduction="sum", **options), self.unit)}

    def predict(self, ctx: Context, batch: Batch, view: View) -> Prediction:
        """Softmax probabilities."""
        return Prediction(ctx.outputs(batch, [view])[0].scores.softmax(-1))


def make_batch(
    size: int = 4,
    length: int = 7,
    *,
    seed: int = 0,
    first_row: int = 0,
    kind: str = "rows",
    classes: int = 3,
    vocabulary: int = 60,
    padded: bool = True,
    parts: Mapping[str, Batch] | None = None,
) -> Batch:
    """A made-up batch: `kind` is `rows`, `tokens` or `seq2seq`; rows are right-padded to different lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (size, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        for row in range(1, size):
            mask[row, max(3, length - (3 * row + seed) % (length - 2)) :] = 0
    ids[mask == 0] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    masks: dict[str, dict[str, Tensor]] = {kind_: {"input_ids": mask} for kind_ in ("attention", "perturbable")}
    counts = {"rows": size, "all_rows": size, "episodes": 1}
    if kind == "rows":
        targets = torch.randint(0, classes, (size,), generator=generator)
    elif kind == "tokens":
        targets = torch.randint(0, classes, (size, length), generator=generator)
        targets[mask == 0] = -100
        masks["scored"] = {"input_ids": mask}
    else:
        decoder = torch.randint(3, vocabulary, (size, 5), generator=generator)
        inputs["decoder_input_ids"] = decoder
        for entry in masks.values():
            entry["decoder_input_ids"] = torch.ones_like(decoder)
        masks["scored"] = {"decoder_input_ids": torch.ones_like(decoder)}
        targets = torch.randint(3, vocabulary, (size, 5), generator=generator)
    if kind != "rows":
        counts["tokens"] = int((targets != -100).sum())
    if (unlabelled := (parts or {}).get("unlabelled")) is not None:
        counts["unlabelled_rows"] = unlabelled.size
    rows = tuple(range(first_row, first_row + size))
    return Batch(inputs, targets, rows, masks, counts, dict(parts or {}))


@dataclass
class Bench:
    """A model, a stack and its context, ready to make steps."""

    run: Run
    ctx: Context
    hooks: Hooks
    methods: list[Method]
    effects: EffectLog

    def step(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """One optimizer step over the micro-batches, exactly as the training loop makes it."""
        self.ctx.trace.clear()
        terms = dict(self.ctx.step(self.ctx, make_works(self.run.seed, self.run.step, batches)))
        self.effects.step_end(self.run.step)
        self.run.step += 1
        return terms

    def gradients(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """The gradient that one step leaves in `.grad`, before it was clipped (clipping is off) or applied (lr 0)."""
        self.step(batches)
        return {k: p.grad.clone() for k, p in self.run.may_optimise.items() if p.grad is not None}

    def parameters(self) -> dict[str, Tensor]:
        """A copy of all optimised parameters."""
        return {k: p.detach().clone() for k, p in self.run.may_optimise.items()}

    def effect(self, method: str, name: str) -> float:
        """The last reported value of a method's effect.

        Raises:
            KeyError: if the method never reported it.
        """
        self.effects.flush()
        return self.effects.summary()[method][name]["last"]

    def evaluation(self) -> AbstractContextManager[None]:
        """Evaluation mode, inside every `wrap_evaluation` of the stack."""
        return evaluation(self.ctx, self.hooks)


def set_up(
    plugins: Sequence[object],
    model: nn.Module,
    batch: Batch,
    *,
    task: Any = None,
    lr: float = 0.0,
    seed: int = 0,
    precision: Precision | None = None,
    loss_scale: float = 1.0,
    stack_views: bool = True,
    labels: Sequence[str] = ("a", "b", "c"),
    prepare: Callable[[Run], None] | None = None,
    **train: Any,
) -> Bench:
    """Build a bench: adapters applied, sites found, parameter sets fixed, seams folded, SGD at `lr` (0: weights stay).

    Args:
        plugins: method objects.
        batch: any batch of the shape to come; the embedding sites are found with its inputs.
        task: `SimpleTask()` by default.
        prepare: called with the run before the methods see it.
        train: further keys of the `train` section.
    """
    config = tiny_config(seed=seed, clip=0, **train)
    run = Run(config, torch.device("cpu"), precision or Precision("fp32", None), LossScale(loss_scale))
    run.task = task or SimpleTask()
    run.labels = list(labels)
    run.load_model = lambda name: run.copy_of_model()
    run.total_steps = 100
    if prepare is not None:
        prepare(run)
    methods = [as_method(plugin) for plugin in plugins]
    hooks = Hooks(methods)
    run.attach(hooks)
    run.model = run.forward_model = hooks.transform("transform_model", run, model.train())
    run.probe = batch.inputs
    run.sites = Sites(run.model, run.probe)
    hooks.notify("on_run_start", run)
    run.freeze_parameter_sets()
    run.optimizer = torch.optim.SGD(list(run.may_optimise.values()), lr=lr)
    effects = EffectLog(methods)
    ctx = compose(run, hooks, stack_views=stack_views, report=effects.report)
    return Bench(run, ctx, hooks, methods, effects)
