"""Random problems for the losses, and an independent statement of what they are, for any floating dtype.

A problem's logits come from a seed: hypothesis shrinks shapes and options, not numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

# Below and across a vector (16, 8, 4 lanes), a block (2048), several blocks; 1 and 2 are real heads.
CLASSES = [1, 2, 3, 7, 8, 16, 17, 33, 77, 2047, 2048, 2049, 5000]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
LAYOUTS = ["contiguous", "offset", "transposed", "expanded"]


def wide(dtype: torch.dtype) -> torch.dtype:
    """What losses and sums of `dtype` are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def stated_loss(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    z_loss: float = 0.0,
    softcap: float | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exps by their formula, computed in the logits' dtype; every class has a target."""
    rows, classes = logits.shape
    soft = target.is_floating_point()
    counted = torch.ones(rows, dtype=torch.bool) if soft else target != ignore_index
    y = logits[counted] * scale
    y = y if softcap is None else softcap * torch.tanh(y / softcap)
    w = torch.ones(classes, dtype=y.dtype) if weight is None else weight.to(y.dtype)
    kept = target[counted]
    onehot = kept.to(y.dtype) if soft else torch.eye(classes, dtype=y.dtype)[kept]
    q = w * ((1 - label_smoothing) * onehot + label_smoothing / classes)
    surprise = -torch.log_softmax(y, -1)
    row, lse = (q * surprise).sum(-1), torch.logsumexp(y, -1)
    total = len(kept) if soft else (w[kept].sum() if weight is not None else len(kept))
    nothing, at = torch.zeros(rows, dtype=y.dtype), (counted.nonzero().squeeze(-1),)
    every_lse = nothing.index_put(at, lse)
    if reduction == "none":
        return nothing.index_put(at, row + z_loss * lse**2), every_lse
    loss, z = row.sum(), z_loss * (lse**2).sum()
    return (loss / total + z / len(kept) if reduction == "mean" else loss + z), every_lse


@dataclass
class Problem:
    """Logits, targets and options, and what comes in for the outputs."""

    logits: Tensor
    target: Tensor
    options: dict[str, Any] = field(default_factory=dict)
    use_lse: bool = False

    def outcome(self, function: Any, dtype: torch.dtype, **more: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, log-sum-exps and the gradient of logits in `dtype`, all in float64."""
        leaf = self.logits.detach().to(dtype).requires_grad_()
        loss, lse = function(leaf, self.target, **self.options, **more)
        coming = torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype).view(loss.shape)
        total = (loss * coming).sum()
        if self.use_lse:
            total = total + (lse * torch.linspace(-1.0, 1.0, lse.numel(), dtype=lse.dtype)).sum()
        (gradient,) = torch.autograd.grad(total, leaf)
        return loss.detach().double(), lse.detach().double(), gradient.double()

    def stated(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """The outcome of `stated_loss` on logits in `dtype`, computed in its wide dtype."""
        return self.outcome(lambda x, t, **options: stated_loss(x.to(wide(dtype)), t, **options), dtype)

    def bounds(self, exact: tuple[Tensor, Tensor, Tensor]) -> tuple[float, float, float]:
        """What rounding may cost where plain torch happens to lose nothing, for loss, lse and gradient.

        A logit y carries eps |y| from scale and softcap, and so does every difference of logits and lse; a row's loss
        adds h of those, its z term 2 z |lse| of them. A gradient is y' (a p - b) of terms of that relative error, then
        rounded to its dtype. In float64 the exact side rounds too: its sums of V terms carry up to V eps.
        """
        loss, _, gradient = exact
        dtype = self.logits.dtype
        eps, scale = torch.finfo(wide(dtype)).eps, self.options.get("scale", 1.0)
        classes = self.logits.shape[1]
        y = scale * float(self.logits.double().abs().max()) + 10
        y *= classes if dtype == torch.float64 else 1
        weight = self.options.get("weight")
        mass = 1.0 if weight is None else float(weight.double().max())
        mass += 2 * self.options.get("z_loss", 0.0) * y
        rows = len(self.target) if self.options.get("reduction") == "sum" else 1
        loss_bound = 4 * eps * mass * y * rows + eps * float(loss.abs().max())
        coming = 2.0 * mass + (1.0 if self.use_lse else 0.0)
        gradient_bound = 4 * eps * scale * coming * y + torch.finfo(dtype).eps * float(gradient.abs().max())
        return loss_bound, 4 * eps * y, gradient_bound


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The numbers of `values` [N, V] (of its first row, expanded) in another memory layout."""
    if layout == "offset":
        return torch.nn.functional.pad(values, (1, 2))[:, 1:-2]
    if layout == "transposed":
        return values.t().contiguous().t()
    return values[:1].expand(values.shape) if layout == "expanded" else values


@st.composite
def problems(draw: st.DrawFn, classes: list[int] = CLASSES, dtypes: list[torch.dtype] = DTYPES) -> Problem:
    """Any problem with a row that counts (the mean over nothing has tests of its own)."""
    rows, width = draw(st.integers(1, 9)), draw(st.sampled_from(classes))
    dtype = draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    spread = draw(st.sampled_from([0.01, 1.0, 8.0]))
    logits = laid_out(
        (torch.randn(rows, width, generator=generator) * spread).to(dtype), draw(st.sampled_from(LAYOUTS))
    )
    ignore_index = draw(st.sampled_from([-100, 0, width + 5] if width > 1 else [-100, 6]))
    if draw(st.booleans()):
        target = torch.randint(0, width, (rows,), generator=generator)
        target[torch.rand(rows, generator=generator) < 0.3] = ignore_index
        if bool((target == ignore_index).all()):
            target[0] = width - 1
    else:
        target = torch.softmax(torch.randn(rows, width, generator=generator), -1).to(dtype)
    options: dict[str, Any] = {
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1])),
    }
    if not target.is_floating_point():
        options["ignore_index"] = ignore_index
    if draw(st.booleans()):
        options["weight"] = (torch.rand(width, generator=generator) + 0.5).to(dtype)
    options |= draw(
        st.sampled_from([{}, {}, {"z_loss": 0.01}, {"scale": 0.3}, {"softcap": 5.0}, {"softcap": 30.0, "scale": 2.0}])
    )
    return Problem(logits, target, options, use_lse=draw(st.booleans()))


def assert_as_good_as_torch(problem: Problem, outcome: tuple[Tensor, Tensor, Tensor]) -> None:
    """Not further from float64 than twice what the formula in plain torch is, beyond what rounding explains."""
    exact, plain = problem.stated(torch.float64), problem.stated(problem.logits.dtype)
    for name, got, torchs, right, bound in zip(
        ("loss", "lse", "gradient"), outcome, plain, exact, problem.bounds(exact), strict=True
    ):
        error, its = (float((one - right).abs().max()) for one in (got, torchs))
        assert error <= 2 * its + bound, f"{name}: off by {error:.3g}, plain torch by {its:.3g}, allowed {bound:.3g}"
