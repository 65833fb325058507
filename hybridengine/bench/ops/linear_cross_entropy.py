"""Cases of the head and its loss in one: linear layer and cross-entropy without all logits at once."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from hybridengine import kernels
from hybridengine.bench.case import OURS, Case, Function, Mode, Tensors, Tier, label
from hybridengine.bench.competitors import imported, linear_cross_entropy_in_chunks

__all__ = ["KERNEL", "cases"]

KERNEL = "linear_cross_entropy"

# Hidden sizes and vocabularies: a classifier, BERT, GPT-2, Qwen 2.5 0.5B, Gemma 2 2B, Llama 3 8B.
HEADS = ((768, 2), (768, 30522), (768, 50257), (896, 151936), (2304, 256000), (4096, 128256))

# Products of size rows x hidden x classes, two FLOPs each: the logits; then one for each gradient; then, for the
# penalty on those gradients, the products of its own forward and backward.
PRODUCTS = {
    ("forward", False): 1,
    ("forward", True): 1,
    ("forward+backward", False): 3,
    ("forward+backward", True): 2,
    ("second order", False): 9,
    ("second order", True): 4,
}


def ours(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
    """Looked up by name: this file may be ahead of its kernel."""
    loss: Tensor = getattr(kernels, KERNEL)(x, weight, target, bias=bias)
    return loss


def low_memory(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same, a few classes at a time."""
    loss: Tensor = getattr(kernels, KERNEL)(x, weight, target, bias=bias, mode="low_memory")
    return loss


def eager(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
    """As usually written."""
    return functional.cross_entropy(functional.linear(x, weight, bias), target)


def float32_loss(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
    """As model libraries write it: the logits of a half-precision head are widened for the loss."""
    return functional.cross_entropy(functional.linear(x, weight, bias).float(), target)


def with_bias(function: Function) -> Function:
    """Pass a bias on only where there is one: not every version of every library has the argument."""

    def call(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
        loss: Tensor = function(x, weight, target, **({} if bias is None else {"bias": bias}))
        return loss

    return call


FUNCTIONS: dict[str, Function] = {
    OURS: ours,
    "low-memory": low_memory,
    "torch": eager,
    "torch fp32-loss": float32_loss,  # for half precision alone
    "torch-lce": linear_cross_entropy_in_chunks(None),
    "torch-lce 256": linear_cross_entropy_in_chunks(256),
    "torch-lce 512": linear_cross_entropy_in_chunks(512),
    "liger": with_bias(imported("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")),
    # Not tuned: that compiles kernels for minutes.
    "quack": with_bias(partial(imported("quack.linear_cross_entropy", "chunked_linear_cross_entropy"), tuned=False)),
    "cce": with_bias(imported("cut_cross_entropy", "linear_cross_entropy")),
}


def make(
    rows: int, device: torch.device, *, hidden: int, classes: int, dtype: torch.dtype, masked: float, bias: bool
) -> Tensors:
    """Hidden states, head and labels; masked labels lie scattered, as prompts and padding do."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(rows, hidden, device=device, generator=generator).to(dtype)
    weight = (torch.randn(classes, hidden, device=device, generator=generator) / hidden**0.5).to(dtype)
    target = torch.randint(0, classes, (rows,), device=device, generator=generator)
    target[torch.randperm(rows, device=device, generator=generator)[: int(masked * rows)]] = -100
    found = {"x": x, "weight": weight, "target": target}
    return found | ({"bias": torch.randn(classes, device=device, generator=generator).to(dtype)} if bias else {})


def cases(device: str) -> list[Case]:
    """The cases of a device; those of `--full` are the whole matrix."""
    half, single = torch.bfloat16, torch.float32
    if device == "cuda":
        found = [
            _case(8192, *HEADS[5], half, tier="quick"),
            *(_case(rows, *head, half) for rows, head in ((8192, HEADS[1]), (16384, HEADS[3]), (8192, HEADS[4]))),
            _case(8192, *HEADS[5], half, frozen=True),
            _case(8192, *HEADS[5], half, masked=0.5),
            _case(8192, *HEADS[5], half, masked=0.9),
            _case(2048, *HEADS[1], single, mode="second order"),
        ]
    else:
        found = [
            _case(128, *HEADS[1], single, tier="quick"),
            _case(512, *HEADS[1], single),
            _case(512, *HEADS[1], single, masked=0.9),
            _case(256, *HEADS[1], half),
            _case(256, *HEADS[1], half, frozen=True),
            _case(2048, *HEADS[1], half),
            _case(256, *HEADS[2], single, frozen=True, bias=True),
            _case(128, *HEADS[1], single, mode="second order"),
            _case(4096, *HEADS[0], single),
        ]
    return found + [
        _case(rows, *head, dtype, masked, frozen, mode, tier="full")
        for head in HEADS
        for rows in (512, 2048, 8192, 32768)
        for dtype in (single, half, torch.float16)
        for masked in (0.0, 0.5, 0.9)
        for frozen in (False, True)
        for mode in ("forward", "forward+backward", "second order")
    ]


def _case(
    rows: int,
    hidden: int,
    classes: int,
    dtype: torch.dtype,
    masked: float = 0.0,
    frozen: bool = False,
    mode: Mode = "forward+backward",
    bias: bool = False,
    tier: Tier = "default",
) -> Case:
    options = (f"masked {masked}" if masked else "", "frozen head" if frozen else "", "bias" if bias else "")
    wanted = ("x",) if frozen else ("x", "weight", "bias") if bias else ("x", "weight")
    facts = {"rows": rows, "hidden": hidden, "classes": classes, "dtype": str(dtype).removeprefix("torch.")}
    return Case(
        label=label(dtype, (rows, hidden, classes), mode, *options),
        facts=facts | {"masked": masked, "frozen": frozen, "bias": bias},
        dtype=dtype,
        mode=mode,
        rows=rows,
        width=classes,
        make=partial(make, hidden=hidden, classes=classes, dtype=dtype, masked=masked, bias=bias),
        wanted=wanted,
        functions={n: f for n, f in FUNCTIONS.items() if n != "torch fp32-loss" or dtype != torch.float32},
        memory=(rows * classes * (dtype.itemsize + 12) + 3 * classes * hidden * dtype.itemsize)
        * (2 if mode == "second order" else 1),
        flops=2 * PRODUCTS[mode, frozen] * rows * (1 - masked) * hidden * classes,
        tier=tier,
    )
