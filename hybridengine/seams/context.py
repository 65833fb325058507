"""`ctx`, the only door to effects: precision, dropout keys, tracing and kernels live here and nowhere else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hybridengine import kernels
from hybridengine.errors import SeamError
from hybridengine.seams.at_sites import AtSites
from hybridengine.seams.backbone import Backbone
from hybridengine.seams.host import Host
from hybridengine.seams.layered import Wanted, asking, both, layers_of
from hybridengine.seams.randomness import KeyedRows, dropout_key
from hybridengine.seams.trace import Trace
from hybridengine.seams.types import Batch, Out, Prediction, Term, View, Work

__all__ = ["Context"]

_NOTHING = contextlib.nullcontext()
_FEW_TOKENS = 64  # below, no kernel of `fast_forward` pays, and watching the forward costs time


class Context(AtSites):
    """What a method may do: evaluate, differentiate, move weights, draw keyed randomness, report effects.

    The folded seams `loss`, `backward`, `gradient`, `step`, `predict` are set by the stack, as are `task_loss`
    (the leaf alone) and `transform_outputs`.
    """

    loss: Callable[[Context, Batch, View], Out]
    backward: Callable[[Context, Work], Mapping[str, Tensor]]
    gradient: Callable[[Context, Sequence[Work]], Mapping[str, Tensor]]
    step: Callable[[Context, Sequence[Work]], Mapping[str, Tensor]]
    predict: Callable[[Context, Batch, View], Prediction]
    leaf: Callable[[Context, Batch, View], Out]
    transform_outputs: Callable[[Context, Batch, Any], Any]

    def __init__(self, run: Host, *, stack_views: bool = True, report: Callable[..., None] | None = None) -> None:
        super().__init__(run, Trace())
        self.stack_views = stack_views
        self.transform_outputs = lambda ctx, batch, outputs: outputs
        self._report = report
        self._live: Mapping[str, Tensor] | None = None
        self._memo: dict[tuple[str, int], Any] | None = None
        self._features: Wanted = False
        run.value = self.value

    # ---- evaluating -------------------------------------------------------------------------------------------

    def outputs(
        self, batch: Batch, views: Sequence[View], *, model: nn.Module | None = None, features: Wanted = False
    ) -> list[Out]:
        """Logits of `batch` under each view, without a loss.

        Several views are stacked into one forward when the plan chose so, their keys differ and their parameters
        are the same; equal keys must see equal masks and therefore run apart.

        Args:
            model: another module in place of the run's model (a teacher); its logits stay untransformed.
            features: also return hidden states, with "attention" attention maps too.
        """
        features = both(features, self._features) if model is None else features
        if not self._stackable(batch, views):
            return [self._forward(batch, view, model, features) for view in views]
        whole = self._forward(*self._stacked(batch, views), model, features)
        logits = cast(Tensor, whole.logits).chunk(len(views))
        hidden = [None] * len(views) if whole.features is None else whole.features.chunk(len(views))
        return [Out({}, x, h, view, replay=False) for x, h, view in zip(logits, hidden, views, strict=True)]

    def several(
        self, inner: Callable[[Context, Batch, View], Out], batch: Batch, views: Sequence[View]
    ) -> tuple[dict[str, Term], list[Out]]:
        """Evaluate `inner` under each view: the mean of its terms over the views, and one `Out` per view."""
        if self._stackable(batch, views):
            whole = inner(self, *self._stacked(batch, views))
            logits = cast(Tensor, whole.logits).chunk(len(views))
            outs = [Out({}, x, None, view, replay=False) for x, view in zip(logits, views, strict=True)]
            terms = {name: (value / len(views), unit) for name, (value, unit) in whole.terms.items()}
            return terms, outs
        outs = [inner(self, batch, view) for view in views]
        terms = {}
        for name, (_, unit) in outs[0].terms.items():
            values = [out.terms[name][0] for out in outs]
            terms[name] = (torch.stack(values).sum(0) / len(views), unit)
        return terms, outs

    def task_loss(self, batch: Batch, view: View) -> Out:
        """The leaf loss alone, without the methods around it: for delta-only ascents and inner loops."""
        return self.leaf(self, batch, view)

    def value(self, name: str, parameter: Tensor) -> Tensor:
        """A run module's parameter `module/name` under the view being evaluated."""
        return (self._live or {}).get(name, parameter)

    def _stackable(self, batch: Batch, views: Sequence[View]) -> bool:
        if len(views) < 2 or not self.stack_views or batch.parts:
            return False
        if any(view.params is not views[0].params for view in views):
            return False
        return views[0].key is None or len({view.key for view in views}) == len(views)

    def _stacked(self, batch: Batch, views: Sequence[View]) -> tuple[Batch, View]:
        sites = sorted({site for view in views for site in view.delta})
        zeros = self.zeros(batch) if sites else {}
        delta = {site: torch.cat([view.delta.get(site, zeros[site]) for view in views]) for site in sites}
        return batch.repeat(len(views)), replace(views[0], delta=delta)

    def _forward(self, batch: Batch, view: View, model: nn.Module | None, features: Wanted) -> Out:
        own = self.run.model
        target = model if model is not None else (self.run.forward_model if view.params is None else own)
        if view.params is not None and own.training and _is_checkpointed(own):
            raise SeamError(
                "functional parameters cannot be used with gradient checkpointing: the recomputation would see the"
                " base weights; set `train.checkpointing: false`"
            )
        below, held = self._below(batch, view, model)
        target = own if below else target  # what is kept lies in no compiled graph
        if self.trace.recording and not held:  # a record takes microseconds of every pass
            self.trace.add("F" if torch.is_grad_enabled() else "f", batch.size)
        self.trace.features |= bool(features)
        foreign = model is not None and self._knows_no_soft_tokens(model)
        inputs = asking(self.run.soft_tokens.without(batch.inputs) if foreign else batch.inputs, features)
        device = self.run.device
        before, self._live = self._live, view.params
        try:
            with (
                dropout_key(device, view.key),
                kernels.fast_forward() if self._is_fast(target, batch) else _NOTHING,
                self._shortcut(target, features),
                self._lazily(target),
                self.sites.armed(view.delta) if view.delta and not held else _NOTHING,
                below.armed(batch.inputs, view.delta, view.params) if below else _NOTHING,
                self.run.precision.autocast(device),
            ):
                if view.params is None:
                    outputs = target(**inputs)
                else:
                    params = {name: p for name, p in view.params.items() if "/" not in name}
                    outputs = functional_call(target, params, (), inputs, tie_weights=True)
            if model is None:
                outputs = self.transform_outputs(self, batch, outputs)
        finally:
            self._live = before
        if foreign and outputs.logits.dim() > 2:
            raise SeamError(
                "a teacher that knows no soft tokens has other positions than its student, so it cannot teach token by"
                " token; remove the soft prompt or the teacher"
            )
        return Out({}, outputs.logits, view=view, **layers_of(outputs, features))

    def _knows_no_soft_tokens(self, model: nn.Module) -> bool:
        return len(self.run.soft_tokens) > 0 and self.run.sites is not None and not self.run.sites.reach(model)

    def _below(self, batch: Batch, view: View, model: nn.Module | None) -> tuple[Backbone | None, bool]:
        """What lies below the head, inside `heads_alone`, and whether this pass needs none of it."""
        below = self.run.backbone
        if below is None or not below.keeps or model is not None:
            return None, False
        return below, below.holds(batch.inputs, view.delta, view.params)

    def _shortcut(self, target: nn.Module, features: Wanted) -> contextlib.AbstractContextManager[None]:
        """Training passes compute the last layer where it is read; evaluation stays as `best/` will be, to the bit."""
        short = self.run.first_position
        return short.armed() if short and not features and target is self.run.model and target.training else _NOTHING

    def _lazily(self, target: nn.Module) -> contextlib.AbstractContextManager[Any]:
        """Training passes make logits only where they are read; evaluation stays as `best/` will be, to the bit."""
        head = self.run.lazy_head
        if head is None or target is not self.run.model or not target.training or kernels.why_not_patched(head):
            return _NOTHING
        return kernels.patch(head, on_read=self._logits_are_read)

    def _logits_are_read(self) -> None:
        self.trace.logits = True

    def _is_fast(self, target: nn.Module, batch: Batch) -> bool:
        """Whether the forward runs on a CPU, eagerly and once: checkpointing would recompute it with other masks."""
        if next(iter(batch.inputs.values())).numel() < _FEW_TOKENS or not target.training:
            return False
        eager = self.run.forward_model is self.run.model and self.run.device.type == "cpu"
        return eager and not _is_checkpointed(target)

    # ---- randomness, sharing, effects --------------------------------------------------------------------------

    def rng(self, stream: str, rows: Sequence[int]) -> KeyedRows:
        """Random numbers keyed by (seed, stream, optimizer step, row)."""
        return KeyedRows((self.run.seed, stream, self.run.step), rows)

    @contextlib.contextmanager
    def with_features(self, wanted: Wanted = True) -> Iterator[None]:
        """Evaluations inside also return hidden states (and attention maps), as if every caller had asked for them."""
        before, self._features = self._features, both(wanted, self._features)
        try:
            yield
        finally:
            self._features = before

    @contextlib.contextmanager
    def heads_alone(self, change: Callable[[Tensor], Tensor] | None = None) -> Iterator[None]:
        """Evaluations inside of one batch, at one delta and one set of parameters, share a pass below the head.

        The first one makes it, under its dropout key; the others run the head alone, under theirs.

        Args:
            change: what each head gets in place of the states below, e.g. dropout of its own.

        Raises:
            SeamError: `run.backbone` is not set.
        """
        if self.run.backbone is None:
            raise SeamError("the head of this model is not known apart; set `run.backbone` to `Backbone.find(...)`")
        with self.run.backbone.kept(change):
            yield

    @contextlib.contextmanager
    def sharing(self) -> Iterator[None]:
        """Within this context `shared` computes each named result once per work (AWP's passes share one attack)."""
        before, self._memo = self._memo, {}
        try:
            yield
        finally:
            self._memo = before

    def shared(self, name: str, work: Work, make: Callable[[], Any]) -> Any:
        """`make()`, or its earlier result for this work inside `sharing`. Results must carry no graph."""
        if self._memo is None:
            return make()
        key = (name, work.id)
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    def report(self, method: object, **effects: Tensor | float) -> None:
        """Record what a method really did in this step, e.g. `delta_norm`, `kl`, `tensors`."""
        if self._report is not None:
            self._report(method, effects)

    @contextlib.contextmanager
    def second_order(self) -> Iterator[None]:
        """Forwards inside can be differentiated twice: fused attention has no second derivative."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(SDPBackend.MATH):
            yield


def _is_checkpointed(model: Any) -> bool:
    # transformers renamed it; asking for the old name first would warn.
    for name in ("is_activation_checkpointing", "is_gradient_checkpointing"):
        if hasattr(model, name):
            return bool(getattr(model, name))
    return False
