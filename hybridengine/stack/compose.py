"""Fold the methods' layers into the five seams of a context."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol, runtime_checkable

import torch

from hybridengine.errors import PluginError
from hybridengine.plugin.calling import Hooks, blame
from hybridengine.plugin.traits import Band
from hybridengine.run import Run
from hybridengine.seams.base import base_backward, base_gradient, base_step
from hybridengine.seams.context import Context
from hybridengine.seams.onion import fold
from hybridengine.seams.types import Batch, Out, Prediction, View

__all__ = ["OutputsWithLogits", "compose", "evaluation"]


@runtime_checkable
class OutputsWithLogits(Protocol):
    """What models return and `transform_outputs` changes."""

    logits: Any


def compose(run: Run, hooks: Hooks, *, stack_views: bool = True, report: Callable[..., None] | None = None) -> Context:
    """The context of a run: each seam's base case wrapped by the methods, once.

    Args:
        stack_views: several views of a batch may run as one forward pass; a method that is not `stackable` forbids it.
    """
    stack_views = stack_views and all(method.traits.stackable for method in hooks.methods)
    ctx = Context(run, stack_views=stack_views, report=report)
    losses = hooks.layers("wrap_loss", Out)
    leaf_layers = [layer for method, layer in losses if method.order < Band.TERM]
    other_layers = [layer for method, layer in losses if method.order >= Band.TERM]
    ctx.leaf = fold(_own(_base_loss), leaf_layers)
    ctx.loss = fold(ctx.leaf, other_layers)
    ctx.backward = _folded(hooks, "wrap_backward", base_backward, Mapping)
    ctx.gradient = _folded(hooks, "wrap_gradient", base_gradient, Mapping)
    ctx.step = _folded(hooks, "wrap_step", base_step, Mapping)
    ctx.predict = _folded(hooks, "wrap_predict", _base_predict, Prediction)
    ctx.transform_outputs = hooks.chain("transform_outputs", OutputsWithLogits) or ctx.transform_outputs
    return ctx


def _folded(hooks: Hooks, name: str, base: Callable[..., Any], expect: type) -> Callable[..., Any]:
    return fold(_own(base), [layer for _, layer in hooks.layers(name, expect)])


def _own(base: Callable[..., Any]) -> Callable[..., Any]:
    """The engine's own base case: no layer outside is blamed for what fails in here."""

    def guarded(*args: Any) -> Any:
        try:
            return base(*args)
        except Exception as error:
            blame(error, None, "")
            raise

    return guarded


def _base_loss(ctx: Context, batch: Batch, view: View) -> Out:
    out: Out = ctx.run.task.loss(ctx, batch, view)
    return out


def _base_predict(ctx: Context, batch: Batch, view: View) -> Prediction:
    with torch.no_grad():
        prediction: Prediction = ctx.run.task.predict(ctx, batch, view)
    return prediction


@contextmanager
def evaluation(ctx: Context, hooks: Hooks, *, stored: bool = False) -> Iterator[None]:
    """Evaluation mode, inside every `wrap_evaluation` context (averaged weights and the like).

    Effects are those of training: what methods report inside, in test-time adaptation for instance, is dropped.

    Args:
        stored: the weights were loaded from `best/`, which already holds what those contexts showed.
    """
    model = ctx.run.model
    training = model.training
    with ExitStack() as stack:
        for method, function in () if stored else hooks.implementations("wrap_evaluation"):
            try:
                context = function(ctx)
                if not isinstance(context, AbstractContextManager):
                    kind = type(context).__name__
                    raise PluginError(
                        f"plugin {method.label}: wrap_evaluation must return a context manager, got {kind}"
                    )
                stack.enter_context(context)
            except Exception as error:
                blame(error, method, "wrap_evaluation")
                raise
        model.eval()
        report, ctx._report = ctx._report, None
        try:
            yield
        finally:
            ctx._report = report
            model.train(training)
