"""What the case table leaves out: rows without an ordinary answer, bad labels, large logits, far rows.

Run as a script, this file checks the Triton kernels in the interpreter, with every n-th case of the table:
`TRITON_INTERPRET=1 python cross_entropy_edges.py n`.
"""

from __future__ import annotations

import functools
import itertools
import mmap
import sys
from typing import Any

import torch
from cross_entropy_cases import CASES, DTYPES, FILLER, IGNORE_INDEX, check
from torch import Tensor

MAP_NORESERVE = 0x4000  # Linux; Python's mmap has no name for it


def edge_rows(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows: +inf, NaN, all -inf, some -inf, -inf at the label, huge, hugely negative, only the label finite."""
    inf, classes = float("inf"), 70
    logits = torch.randn(8, classes, generator=torch.Generator().manual_seed(0))
    logits[0, 5], logits[1, 5], logits[2] = inf, float("nan"), -inf
    logits[3, ::2], logits[4, 3] = -inf, -inf
    huge = 3e4 if dtype == torch.float16 else 1e30
    logits[5], logits[6] = huge, -huge
    logits[7] = -inf
    logits[7, 3] = 2.0
    return logits.to(dtype), torch.full((8,), 3)


def check_edges(implementation: Any, dtype: torch.dtype, smoothing: float, scale: float) -> None:
    """Rows without an ordinary answer come out as torch has them; so does the gradient."""
    logits, target = edge_rows(dtype)
    rows, classes = logits.shape
    loss, lse, gradient = torch.empty(rows), torch.empty(rows), torch.empty_like(logits)
    options = (None, float(classes), IGNORE_INDEX, smoothing, scale, 0.0, 0.0, torch.ones(2))
    implementation.forward(logits, target, *options, loss, lse, gradient, None)
    leaf = logits.float().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(leaf * scale, target, reduction="none", label_smoothing=smoothing)
    (slope,) = torch.autograd.grad(wanted.sum(), leaf)
    torch.testing.assert_close(loss, wanted.detach(), equal_nan=True, rtol=1e-5, atol=1e-5)
    assert torch.equal(lse.isnan(), torch.tensor([True] * 3 + [False] * 5))
    torch.testing.assert_close(gradient.float(), slope.to(dtype).float(), equal_nan=True, rtol=1e-2, atol=1e-6)


def check_shares_of_nothing(implementation: Any) -> None:
    """A class without weight adds nothing, even where its logit is -inf: soft, smoothed, and as the label."""
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(3))
    logits[:, 7] = -float("inf")
    kept = torch.arange(50) != 7
    weight = kept.float()
    soft = torch.softmax(torch.randn(2, 50, generator=torch.Generator().manual_seed(4)), -1) * weight
    log_p = torch.log_softmax(logits.double(), -1)
    q = {"soft": soft.double(), "smoothed": 0.1 / 50 * weight.expand(2, 50).double(), "label": torch.zeros(2, 50)}
    targets = {"soft": (soft, None, 0.0), "smoothed": (torch.tensor([7, 7]), weight, 0.1)}
    targets["label"] = (torch.tensor([7, 7]), weight, 0.0)
    for name, (target, weights, smoothing) in targets.items():
        loss, lse, gradient = torch.empty(2), torch.empty(2), torch.empty_like(logits)
        options = (
            weights,
            49.0 if weights is not None else 50.0,
            IGNORE_INDEX,
            smoothing,
            1.0,
            0.0,
            0.0,
            torch.ones(2),
        )
        implementation.forward(logits, target, *options, loss, lse, gradient, None)
        wanted = torch.where(q[name] == 0, 0.0, -q[name] * log_p).sum(-1)
        torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=1e-6)
        slope = q[name].sum(-1, keepdim=True) * log_p.exp() - q[name]
        torch.testing.assert_close(gradient.double(), slope.double(), rtol=1e-5, atol=1e-7)


def check_bad_labels(implementation: Any) -> None:
    """A label that is no class is noted, and its row counts as ignored."""
    from hybridengine.kernels.cross_entropy import layout

    logits = torch.randn(5, 9)
    target = torch.tensor([3, 9, IGNORE_INDEX, -1, 8])
    loss, lse, gradient = torch.full((5,), FILLER), torch.full((5,), FILLER), torch.full((5, 9), FILLER)
    flag = layout.new_flag("cpu")
    options = (None, 9.0, IGNORE_INDEX, 0.0, 1.0, 0.0, 0.0, torch.ones(2))
    implementation.forward(logits, target, *options, loss, lse, gradient, flag)
    assert flag.tolist() in ([2, 9, 9], [4, -1, 9])
    for row in (1, 2, 3):
        assert loss[row] == 0 and lse[row] == 0 and not gradient[row].any()
    assert bool((loss[[0, 4]] > 0).all())
    before = flag.clone()
    implementation.forward(logits, target.clamp(max=10), *options, loss, lse, gradient, flag)
    assert torch.equal(flag, before), "only the first one is noted"
    try:
        layout.raise_if_set(flag, IGNORE_INDEX)
    except IndexError as error:
        assert "target[1] = 9 is not one of the 9 classes (ignore_index is -7)" in str(error) or flag[1] == -1
    else:
        raise AssertionError("no error for a set flag")
    layout.raise_if_set(layout.new_flag("cpu"), IGNORE_INDEX)


def check_large_logits(implementation: Any) -> None:
    """Around 1e4 float32 resolves 1e-3; loss and gradient come from differences and lose nothing of it."""
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(1)) + 1e4
    target = torch.arange(4)
    loss, lse, gradient = torch.empty(4), torch.empty(4), torch.empty_like(logits)
    options = (None, 300.0, IGNORE_INDEX, 0.1, 1.0, 0.0, 0.0, torch.ones(2))
    implementation.forward(logits, target, *options, loss, lse, gradient, None)
    leaf = logits.double().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(leaf, target, reduction="none", label_smoothing=0.1)
    (slope,) = torch.autograd.grad(wanted.sum(), leaf)
    torch.testing.assert_close(loss.double(), wanted.detach(), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(gradient.double(), slope, rtol=2e-6, atol=1e-7)


FAR_ROWS, FAR_STRIDE, FAR_CLASSES = 5, 2**30 + 8, 40
FAR_ELEMENTS = FAR_ROWS * FAR_STRIDE


def untouched_memory() -> Tensor:
    """Return FAR_ELEMENTS bfloat16 of which only touched pages take memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, FAR_ELEMENTS * 2, flags=flags), dtype=torch.bfloat16)


def check_far_rows(implementation: Any, memory: Tensor | None = None) -> None:
    """Rows further than 2^32 elements away, in `memory` of FAR_ELEMENTS bfloat16."""
    memory = untouched_memory() if memory is None else memory
    device = memory.device
    logits = memory.as_strided((FAR_ROWS, FAR_CLASSES), (FAR_STRIDE, 1))
    logits.copy_(torch.randn(FAR_ROWS, FAR_CLASSES, generator=torch.Generator().manual_seed(2)))
    leaf, target = logits.float().requires_grad_(), torch.arange(FAR_ROWS, device=device)
    wanted = torch.nn.functional.cross_entropy(leaf, target, reduction="none")
    (slope,) = torch.autograd.grad(wanted.sum(), leaf)
    loss, lse = torch.empty(FAR_ROWS, device=device), torch.empty(FAR_ROWS, device=device)
    factors = torch.ones(2, device=device)
    options = (None, float(FAR_CLASSES), IGNORE_INDEX, 0.0, 1.0, 0.0, 0.0, factors)
    implementation.forward(logits, target, *options, loss, lse, logits, None)
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.float(), slope, rtol=2**-7, atol=1e-6)


def check_all(implementation: Any, units: float, every: int) -> list[str]:
    """Run every `every`th case and all the rest; return what failed."""
    checks: dict[str, Any] = {str(case): functools.partial(check, case=case, units=units) for case in CASES[::every]}
    for dtype, smoothing, scale in itertools.product(DTYPES, (0.0, 0.1), (1.0, 0.5)):
        name = f"edges-{dtype}-{smoothing}-{scale}"
        checks[name] = functools.partial(check_edges, dtype=dtype, smoothing=smoothing, scale=scale)
    checks |= {
        one.__name__: one for one in (check_shares_of_nothing, check_bad_labels, check_large_logits, check_far_rows)
    }
    failures = []
    for name, one in checks.items():
        try:
            one(implementation)
        except AssertionError as error:
            failures.append(f"{name}: {error}")
    return failures


def main() -> int:
    from interpreter import repair_loop_bounds

    from hybridengine.kernels.cross_entropy import triton_kernel

    repair_loop_bounds()
    # The interpreter truncates where a GPU rounds to nearest: a whole unit.
    failures = check_all(triton_kernel, units=1.0, every=int(sys.argv[1]))
    print("\n".join(failures) or "all pass")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
