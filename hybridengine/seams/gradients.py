"""The half of `ctx` that differentiates, moves weights exactly, and applies the update."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from hybridengine import kernels
from hybridengine.errors import NonFiniteError
from hybridengine.seams.host import Host
from hybridengine.seams.precision import wide
from hybridengine.seams.trace import Trace

__all__ = ["Gradients"]


class Gradients:
    """Gradients in and out of `.grad`, exact weight moves, and the one place where the optimizer steps."""

    def __init__(self, run: Host, trace: Trace) -> None:
        self.run = run
        self.trace = trace
        self.synchronise = True
        self.witness: list[tuple[tuple[int, ...], Tensor]] = []
        """(rows, loss) of each backward of this step, to name the culprits of a non-finite gradient."""
        self._overflows: list[Tensor] = []
        """Whether an inner loop's gradient left fp16's range at a finite loss: later losses are then not finite."""
        self._inner_steps = 0
        self._ticking = True

    # ---- gradients --------------------------------------------------------------------------------------------

    def grad(self, loss: Tensor, wrt: Sequence[Tensor], *, create_graph: bool = False) -> list[Tensor | None]:
        """d loss / d `wrt`, unscaled, at least fp32, without touching any `.grad`.

        Only the chosen tensors are differentiated: an ascent on a delta computes no weight gradients.
        """
        delta_only = all(t.is_leaf and not isinstance(t, nn.Parameter) for t in wrt)
        self.trace.add("G" if delta_only else "H")
        if create_graph:
            self._inner_steps += 1
        scaled = loss * self.run.loss_scale.value if self.run.loss_scale.value != 1.0 else loss
        grads = torch.autograd.grad(scaled, list(wrt), create_graph=create_graph, allow_unused=True)
        if self.run.loss_scale.dynamic and not delta_only:
            norm = torch.nn.utils.get_total_norm([g.detach() for g in grads if g is not None])
            self._overflows.append(loss.detach().isfinite().all() & ~norm.isfinite())
        return [None if g is None else self.unscaled(g) for g in grads]

    def unscaled(self, gradient: Tensor) -> Tensor:
        """A gradient without the loss scale, in at least fp32."""
        value = wide(gradient)
        return value if self.run.loss_scale.value == 1.0 else value / self.run.loss_scale.value

    def accumulate(self, loss: Tensor, weight: Tensor | None = None) -> None:
        """Add the (scaled) gradient of `loss`, or of `weight * loss`, to `.grad` of every leaf it reaches.

        Args:
            weight: a constant of the loss's shape and dtype.
        """
        self.trace.add("B" if self.synchronise else "b")
        if (scale := self.run.loss_scale.value) != 1.0:
            weight = torch.full_like(loss, scale) if weight is None else weight * scale
        loss.backward(weight)  # type: ignore[no-untyped-call]

    def zero(self) -> None:
        """Drop all gradients of the optimised parameters and start the step's record."""
        self.witness.clear()
        self._overflows.clear()
        for parameter in self.run.optimised().values():
            parameter.grad = None

    def take_grads(self) -> dict[str, Tensor]:
        """Remove and return the accumulated gradients, unscaled, at least fp32."""
        taken = {}
        for name, parameter in self.run.optimised().items():
            if parameter.grad is not None:
                taken[name] = self.unscaled(parameter.grad)
                parameter.grad = None
        return taken

    def add_grads(self, grads: Mapping[str, Tensor]) -> None:
        """Add unscaled gradients to `.grad`."""
        parameters = self.run.optimised()
        for name, gradient in grads.items():
            parameter = parameters[name]
            value = (gradient * self.run.loss_scale.value).to(parameter.dtype).detach()
            parameter.grad = value if parameter.grad is None else parameter.grad + value

    def pull_back(self, adapted: Mapping[str, Tensor], leaves: Mapping[str, Tensor]) -> None:
        """The vector-Jacobian product of an inner loop: gradients at `leaves` flow through `adapted` to the base.

        The cut: query passes run on detached `leaves`, so that they may run backward as often as they like, and the
        adaptation graph is differentiated once.
        """
        self.trace.add("P", depth=self._inner_steps)
        self._inner_steps = 0
        pairs = [(adapted[k], leaf.grad) for k, leaf in leaves.items() if leaf.grad is not None]
        moved = [(value, g) for value, g in pairs if value.requires_grad]
        torch.autograd.backward([value for value, _ in moved], [g for _, g in moved])

    @contextlib.contextmanager
    def no_sync(self, when: bool = True) -> Iterator[None]:
        """Backward passes inside are not the step's last: with several processes they need no communication."""
        before, self.synchronise = self.synchronise, self.synchronise and not when
        try:
            yield
        finally:
            self.synchronise = before

    # ---- weights ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def swapped(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Optimised parameters hold `values` inside, and exactly their old bits afterwards, whatever happens."""
        with self._kept(values) as parameters:
            if parameters:
                torch._foreach_copy_(parameters, list(values.values()))
            yield

    @contextlib.contextmanager
    def moved(self, offsets: Mapping[str, Tensor]) -> Iterator[None]:
        """Parameters hold `w + offset` inside; restored from a copy, for subtraction does not restore bits."""
        self.trace.add("W")
        with self._kept(offsets) as parameters:
            if parameters:
                own = [offset.to(p.dtype) for p, offset in zip(parameters, offsets.values(), strict=True)]
                torch._foreach_add_(parameters, own)
            yield

    def ascend_weights(
        self, gradient: Mapping[str, Tensor], *, rho: float, rule: kernels.Rule = "sam", eta: float = 0.0
    ) -> kernels.MovedWeights:
        """Move the named parameters uphill, now; leaving the result's context restores them (`perturb_weights`).

        Not a generator: the caller may free `gradient` for the time inside.
        """
        optimised = self.run.optimised()
        parameters = [optimised[name] for name in gradient]
        moved = kernels.perturb_weights(parameters, list(gradient.values()), rho=rho, rule=rule, eta=eta)
        if moved.usable:
            self.trace.add("W")
        return moved

    @contextlib.contextmanager
    def _kept(self, names: Iterable[str]) -> Iterator[list[Tensor]]:
        """Data of the named parameters, to be changed in place; one copy of them is the only extra memory."""
        optimised = self.run.optimised()
        parameters = [optimised[name].detach() for name in names]
        with kernels.keep(parameters):
            yield parameters

    @contextlib.contextmanager
    def resting(self, names: Iterable[str]) -> Iterator[None]:
        """The named optimised parameters are fixed inside: no gradient, no decay, no optimizer state of theirs."""
        optimised = self.run.optimised()
        parameters = [optimised[name] for name in names]
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None  # of an earlier step: the optimizer would apply it again
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)

    # ---- the update -------------------------------------------------------------------------------------------

    def apply(self) -> float:
        """Unscale, clip once, step optimizer and scheduler. Returns the gradient norm before clipping.

        With a dynamic fp16 scale, a gradient that overflowed at finite losses halves the scale and skips the update.
        The scheduler ticks all the same: a schedule is a function of `run.step`, which counts skipped steps too, and
        so ends with `run.total_steps`.

        Raises:
            NonFiniteError: before the update, naming step and rows: a loss is not finite, or a gradient is not and no
                smaller loss scale is left.
        """
        self.trace.add("S")
        run, scale = self.run, self.run.loss_scale.value
        grads = [p.grad for p in run.optimised().values() if p.grad is not None]
        asked = [kernels.total_norm(grads), *(loss for _, loss in self.witness), *self._overflows]
        norm, *others = _numbers(asked, run.device)
        losses, overflowed = others[: len(self.witness)], any(others[len(self.witness) :])
        sound = all(map(math.isfinite, losses))
        finite, norm = sound and math.isfinite(norm), norm / scale
        if not finite and not ((sound or overflowed) and run.loss_scale.can_shrink):
            raise NonFiniteError(self._accuse(norm, losses))
        if finite:
            clip = run.clip
            self._update(grads, (min(1.0, clip / max(norm, 1e-12)) if clip else 1.0) / scale)
        run.loss_scale.update(finite)
        if run.scheduler is not None and self._ticking:
            with contextlib.nullcontext() if finite else _tick_without_update():
                run.scheduler.step()
        return norm

    @contextlib.contextmanager
    def holding_schedule(self, when: bool = True) -> Iterator[None]:
        """Updates inside are not the step's last: the schedule counts steps of the run, and ticks at the last one."""
        before, self._ticking = self._ticking, self._ticking and not when
        try:
            yield
        finally:
            self._ticking = before

    def _update(self, grads: list[Tensor], factor: float) -> None:
        """Step the optimizer on the gradients times `factor`."""
        optimizer = self.run.optimizer
        if factor == 1.0:
            optimizer.step()
        elif getattr(optimizer, "_step_supports_amp_scaling", False):
            # A fused optimizer divides by `grad_scale` as it reads a gradient, by the protocol of torch's GradScaler:
            # one pass over all gradients less.
            optimizer.grad_scale = torch.tensor(1 / factor, device=self.run.device)
            try:
                optimizer.step()
            finally:
                optimizer.grad_scale = None
        else:
            torch._foreach_mul_(grads, factor)
            optimizer.step()

    def _accuse(self, norm: float, losses: Sequence[float]) -> str:
        pairs = zip(self.witness, losses, strict=True)
        bad = [row for (rows, _), loss in pairs if not math.isfinite(loss) for row in rows]
        what = "loss is not finite" if bad else f"loss is finite but the gradient norm is {norm}"
        if not bad and self.run.loss_scale.dynamic:
            what += f" at the smallest loss scale, {self.run.loss_scale.value:g},"
        rows = bad or [row for rows, _ in self.witness for row in rows]
        places = ", ".join(self.run.places(sorted(set(rows))[:32]))
        return (
            f"step {self.run.step + 1}: the {what} on rows [{places}]; the update was not made and the"
            " weights are unchanged. Look at these rows, lower `train.lr`, or use `precision: fp32`."
        )


def _numbers(scalars: Sequence[Tensor], device: torch.device) -> list[float]:
    """The scalars on the host; from a GPU they come in one transfer, for each would wait for it."""
    if device.type == "cpu":
        return [scalar.item() for scalar in scalars]
    numbers: list[float] = torch.stack([scalar.reshape(()).to(device) for scalar in scalars]).tolist()
    return numbers


@contextlib.contextmanager
def _tick_without_update() -> Iterator[None]:
    """Torch takes a scheduler's tick before the first update for a mistake, and says so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        yield
