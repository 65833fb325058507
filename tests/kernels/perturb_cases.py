"""Random steps of attacks, and the exact step by the formula, in extended precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from hybridengine import kernels
from hybridengine.kernels import native

Sites = dict[str, Tensor]
Exact = dict[str, np.ndarray]  # of np.longdouble: 64 bits of mantissa on x86, and an exponent that no square leaves

SCALES = [0.0, 1e-41, 1e-30, 1e-12, 1.0, 1e19, 1e30]  # of gradients: where squares leave float32, and where ways change
TROUBLES = ["none", "none", "none", "nan", "inf", "-inf"]
LAYOUTS = ["plain", "plain", "transposed", "strided", "expanded"]


@dataclass
class Case:
    delta: Sites
    gradient: Sites
    mask: Sites
    options: dict[str, Any]

    def step(self, impl: str, device: str = "cpu") -> Sites:
        """The new delta on the CPU, computed on `device`."""
        sites = [
            {name: one.to(device) for name, one in part.items()} for part in (self.delta, self.gradient, self.mask)
        ]
        moved = kernels.perturb_step(*sites, **self.options, impl=impl)
        return {name: one.cpu() for name, one in moved.items()}


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same numbers (expanded: those of the first row) in other places of memory."""
    if layout == "transposed":
        return tensor.transpose(0, 2).contiguous().transpose(0, 2)
    if layout == "strided":
        return torch.stack([tensor, torch.full_like(tensor, 7)], -1).flatten(-2)[..., ::2]
    return tensor[:1].expand_as(tensor) if layout == "expanded" and len(tensor) else tensor


@st.composite
def cases(draw: st.DrawFn, dtypes: list[torch.dtype], widths: list[int]) -> Case:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(dtypes))
    size = draw(st.sampled_from([0, 1, 2, 3, 5]))
    scale = draw(st.sampled_from(SCALES if dtype != torch.float16 else [0.0, 1.0, 1e4]))
    options = {
        "step_size": draw(st.sampled_from([0.0, 1e-3, 0.1, 1.0])),
        "epsilon": draw(st.sampled_from([None, 0.0, 0.05, 0.25, 5.0])),
        "norm": draw(st.sampled_from(["l2", "l2", "linf"])),
        "per": draw(st.sampled_from(["sequence", "token"])),
    }
    start, fill = draw(st.sampled_from([0.0, 0.1, 3.0])), draw(st.sampled_from([0.0, 0.6, 1.0]))
    case = Case({}, {}, {}, options)
    for name in draw(st.sampled_from([["a"], ["a"], ["a", "b"], ["a", "b", "c"]])):
        length, width = draw(st.integers(0, 6)), draw(st.sampled_from(widths))
        gradient, delta = (torch.randn((size, length, width), generator=generator) for _ in range(2))
        if draw(st.booleans()):  # tokens of very different sizes
            gradient *= 10 ** torch.randn((size, length, 1), generator=generator)
        mask = torch.rand((size, length), generator=generator) < fill
        if draw(st.integers(0, 4)) == 0:
            delta = -gradient  # the step undoes it: digits cancel
        delta = (delta * start).masked_fill_(~mask[..., None], float("nan")).to(dtype)  # masked: whatever it holds
        gradient = (gradient * scale).to(dtype)
        if (trouble := draw(st.sampled_from(TROUBLES))) != "none" and gradient.numel():
            place = int(torch.randint(gradient.numel(), (), generator=generator))
            gradient.view(-1)[place] = float(trouble)
        case.mask[name] = mask.to(draw(st.sampled_from([torch.bool, torch.int64, torch.float32])))
        case.gradient[name] = laid_out(gradient, draw(st.sampled_from(LAYOUTS)))
        case.delta[name] = laid_out(delta, draw(st.sampled_from(LAYOUTS[:-1])))
    return case


def wide(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy().astype(np.longdouble)


def groups_of(case: Case) -> list[dict[str, tuple[Any, ...]]]:
    """Where each group of numbers with a norm of its own lies: {site: index}."""
    size = len(next(iter(case.mask.values())))
    if case.options["per"] == "sequence":
        return [{name: (row,) for name in case.mask} for row in range(size)]
    return [{n: (row, at)} for n, mask in case.mask.items() for row in range(size) for at in range(mask.shape[1])]


def exact_group(d: Exact, g: Exact, options: dict[str, Any]) -> Exact:
    """The step of one group, masked numbers being 0."""
    if not all(np.isfinite(one).all() for one in g.values()):
        return d
    step, epsilon = np.longdouble(options["step_size"]), options["epsilon"]
    if options["norm"] == "linf":
        z = {name: d[name] + step * np.sign(g[name]) for name in d}
        return z if epsilon is None else {name: np.clip(one, -epsilon, epsilon) for name, one in z.items()}
    norm = np.sqrt(sum(np.sum(one * one) for one in g.values()))
    z = {name: d[name] + (step * g[name] / norm if norm > 0 else 0) for name in d}
    size = np.sqrt(sum(np.sum(one * one) for one in z.values()))
    shrink = epsilon / size if epsilon is not None and size > epsilon else np.longdouble(1)
    return {name: one * shrink for name, one in z.items()}


def check(case: Case, impl: str, *, truncates: bool = False, device: str = "cpu") -> None:
    """The step by `impl` against the exact one.

    Derivation. u is half of the accumulator's eps. A norm is off by at most 10 u of itself (csrc/perturb/step.inl;
    torch and Triton sum in trees, no worse for so few numbers), hence the rate, after its division and rounding, by
    12 u, and so is the shrinkage. A moved number is d + r g, off by 12 u of |r g| and one rounding; shrunk, by 12 u
    more and another rounding: 26 u of |d| + |r g|, where |r g| is at most the step. The result is rounded to its dtype
    once. Subnormal results are off by one step of the dtype. Triton's interpreter truncates to bfloat16.

    Args:
        impl: by which implementation.
        truncates: rounding to the result's dtype may be off by a whole unit.
        device: where the step is computed.
    """
    before = {name: (case.delta[name].clone(), case.gradient[name].clone()) for name in case.delta}
    result = case.step(impl, device)
    dtype = next(iter(case.delta.values())).dtype
    u = torch.finfo(native.accumulator_dtype(dtype)).eps / 2
    rounding = torch.finfo(dtype).eps * (1 if truncates else 0.5)
    kept = {name: (mask != 0).numpy()[..., None] for name, mask in case.mask.items()}
    for name, one in result.items():
        assert one.dtype == dtype and one.shape == case.delta[name].shape
        assert not bool(one[~torch.from_numpy(kept[name][..., 0])].any()), "masked positions are zero"
        for now, was in zip((case.delta[name], case.gradient[name]), before[name], strict=True):
            assert torch.equal(now.nan_to_num(3), was.nan_to_num(3)), "the inputs are left alone"
    d, g = (
        {name: np.where(kept[name], wide(t), 0) for name, t in part.items()} for part in (case.delta, case.gradient)
    )
    for group in groups_of(case):
        here = {name: index for name, index in group.items() if d[name][index].size}
        exact = exact_group({n: d[n][i] for n, i in here.items()}, {n: g[n][i] for n, i in here.items()}, case.options)
        for name, index in here.items():
            sizes = np.abs(d[name][index]) + np.longdouble(case.options["step_size"])
            bound = 26 * u * sizes + rounding * np.abs(exact[name]) + torch.finfo(dtype).smallest_normal * 2.0**-7
            off = np.abs(wide(result[name])[index] - exact[name])
            assert (off <= bound).all(), f"{name}{index}: {(off - bound).max()} beyond the bound"
