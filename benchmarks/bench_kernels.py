"""Time the kernels against torch eager: `python benchmarks/bench_kernels.py [--quick] [--output FILE]`.

The variants of a case alternate block by block in one process, so that foreign load hits all of them; reported are
medians over the rounds with quartiles, and ratios of medians. Forward and backward are timed together.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import hybridengine
from hybridengine import kernels
from hybridengine.kernels import native

RESULTS = Path(__file__).parent / "results"
# rows by classes: a classifier's head, a wide one, BERT's and GPT-2's vocabulary
CROSS_ENTROPY = [(4096, 2), (8192, 77), (1024, 30522), (512, 50257)]
PERTURB = (32, 128, 384)
# a small BERT: embeddings, and in each of 6 layers 4 square matrices, 2 of 4 times the width, and vectors
WIDTH = 384
LAYER = [(WIDTH, WIDTH)] * 4 + [(WIDTH,)] * 9 + [(4 * WIDTH, WIDTH), (4 * WIDTH,), (WIDTH, 4 * WIDTH)]
WEIGHTS = [(30522, WIDTH), (512, WIDTH), (WIDTH,), (WIDTH,), *LAYER * 6]
# hidden states, and the attention weights of 12 heads
DROPOUT = [(32, 24, 384), (32, 128, 384), (32, 12, 24, 24), (32, 12, 128, 128)]
# tokens by the inner width of a small BERT and of a base one; float32 only, as the kernel
GELU = [(512, 1536), (800, 3072)]

Variants = dict[str, Callable[[], object]]


def measure(variants: Variants, rounds: int, block_seconds: float) -> dict[str, dict[str, float]]:
    """Return median and quartiles in milliseconds for each variant."""
    repeats = {}
    for name, run in variants.items():
        run()
        start = time.perf_counter()
        run()
        repeats[name] = max(1, int(block_seconds / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                run()
            times[name].append((time.perf_counter() - start) / repeats[name] * 1e3)
    quartiles = {name: statistics.quantiles(values, n=4) for name, values in times.items()}
    return {
        name: {"median_ms": round(q2, 4), "q1_ms": round(q1, 4), "q3_ms": round(q3, 4)}
        for name, (q1, q2, q3) in quartiles.items()
    }


def row(op: str, case: dict[str, object], variants: Variants, options: argparse.Namespace) -> dict[str, object]:
    """Measure one case and print it."""
    times = measure(variants, options.rounds, options.block)
    base = times["eager"]["median_ms"]
    faster = {name: round(base / one["median_ms"], 2) for name, one in times.items() if name != "eager"}
    print(f"{op} {case}: eager {base:.3f} ms; times faster: {faster}", flush=True)
    return {"op": op, **case, "times": times, "times_faster_than_eager": faster}


def cross_entropy_variants(rows: int, classes: int, dtype: torch.dtype) -> Variants:
    """Eager is torch on the logits as they are; in bfloat16 it keeps only a bfloat16 loss.

    `eager_float32` is torch with the float32 loss that the kernels promise.
    """
    logits = torch.randn(rows, classes).to(dtype).requires_grad_()
    target = torch.randint(0, classes, (rows,))

    def both_ways(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
        def run() -> None:
            logits.grad = None
            loss(logits, target).backward()

        return run

    variants: Variants = {
        "eager": both_ways(F.cross_entropy),
        "automatic": both_ways(kernels.cross_entropy),
        "cpu": both_ways(lambda x, t: kernels.cross_entropy(x, t, impl="cpu")),
    }
    if dtype != torch.float32:
        variants["eager_float32"] = both_ways(lambda x, t: F.cross_entropy(x.float(), t))
    return variants


def eager_step(delta: Tensor, gradient: Tensor, mask: Tensor, epsilon: float | None) -> Tensor:
    """One step as attacks usually write it."""
    g = gradient * mask.unsqueeze(-1)
    moved = delta + g / (g.flatten(1).norm(dim=1).view(-1, 1, 1) + 1e-12)
    if epsilon is None:
        return moved
    size = moved.flatten(1).norm(dim=1).view(-1, 1, 1)
    return moved * (epsilon / (size + 1e-12)).clamp(max=1.0)


def perturb_variants(epsilon: float | None, dtype: torch.dtype) -> Variants:
    """FGM is a step without projection, PGD one with."""
    batch, length, _ = PERTURB
    gradient = torch.randn(PERTURB).to(dtype)
    mask = torch.arange(length) < torch.randint(length // 8, length + 1, (batch, 1))
    delta = torch.randn(PERTURB).to(dtype) * mask.unsqueeze(-1)
    return {
        "eager": lambda: eager_step(delta, gradient, mask, epsilon),
        "automatic": lambda: kernels.perturb_step(delta, gradient, mask, step_size=1.0, epsilon=epsilon),
        "reference": lambda: kernels.perturb_step(
            delta, gradient, mask, step_size=1.0, epsilon=epsilon, impl="reference"
        ),
    }


def foreach_move(weights: list[Tensor], gradients: list[Tensor], adaptive: bool) -> None:
    """SAM's or ASAM's move and the way back, as written with torch's `foreach`; the gradients' memory is kept."""
    saved = [weight.clone() for weight in weights]
    sizes = torch._foreach_add(torch._foreach_abs(weights), 0.01) if adaptive else []
    measured = torch._foreach_mul(sizes, gradients) if adaptive else gradients
    rate = 0.05 / float(torch.nn.utils.get_total_norm(measured))
    if adaptive:
        torch._foreach_mul_(measured, sizes)
        torch._foreach_mul_(measured, rate)
        torch._foreach_add_(weights, measured)
    else:
        torch._foreach_add_(weights, gradients, alpha=rate)
    torch._foreach_copy_(weights, saved)


def weights_variants(adaptive: bool) -> Variants:
    """A move and the way back, of all weights of a small model."""
    weights, gradients = ([torch.randn(shape) for shape in WEIGHTS] for _ in range(2))

    def kernel() -> None:
        with kernels.perturb_weights(weights, gradients, rho=0.05, rule="asam" if adaptive else "sam"):
            pass

    return {"eager": lambda: foreach_move(weights, gradients, adaptive), "automatic": kernel}


def ema_variants() -> Variants:
    """One update of the average of all weights of a small model."""
    averages, weights = ([torch.randn(shape) for shape in WEIGHTS] for _ in range(2))
    return {
        "eager": lambda: torch._foreach_lerp_(averages, weights, 0.001),
        "automatic": lambda: kernels.ema_update(averages, weights, rate=0.001),
    }


def elementwise_variants(
    shape: tuple[int, ...], dtype: torch.dtype, eager: Callable[[Tensor], Tensor], kernel: Callable[[Tensor], Tensor]
) -> Variants:
    """Forward and backward of a function of activations or attention weights."""
    x, gradient = torch.randn(shape).to(dtype).requires_grad_(), torch.randn(shape).to(dtype)

    def both_ways(function: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def run() -> None:
            x.grad = None
            function(x).backward(gradient)

        return run

    return {"eager": both_ways(eager), "automatic": both_ways(kernel)}


def machine() -> dict[str, object]:
    """Describe where the numbers come from."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "isa": native.module().isa() if native.why_missing() is None else None,
        "load_average": [round(one, 2) for one in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hybridengine": getattr(hybridengine, "__version__", "unknown"),
        "note": "figures are medians; other processes shared the CPU where the load average exceeds the threads",
    }


def main() -> None:
    """Run every case and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--block", type=float, default=0.1, help="seconds a variant runs before the next one")
    parser.add_argument("--quick", action="store_true", help="3 rounds of short blocks")
    parser.add_argument("--output", type=Path, default=RESULTS / f"kernels-{datetime.now(UTC):%Y-%m-%d}.json")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.block = 3, 0.02
    torch.manual_seed(0)
    result: dict[str, Any] = {"date": f"{datetime.now(UTC):%Y-%m-%dT%H:%MZ}", "machine": machine(), "rows": []}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for rows, classes in CROSS_ENTROPY:
            case = {"rows": rows, "classes": classes, "dtype": name}
            variants = cross_entropy_variants(rows, classes, dtype)
            result["rows"].append(row("cross_entropy", case, variants, options))
        for attack, epsilon in (("FGM", None), ("PGD", 1.0)):
            case = {"attack": attack, "shape": list(PERTURB), "dtype": name}
            result["rows"].append(row("perturb", case, perturb_variants(epsilon, dtype), options))
        for shape in DROPOUT:
            case = {"shape": list(shape), "dtype": name}
            drop = elementwise_variants(shape, dtype, lambda x: F.dropout(x, 0.1), lambda x: kernels.dropout(x, 0.1))
            result["rows"].append(row("dropout", case, drop, options))
        for shape in GELU if dtype == torch.float32 else ():
            case = {"shape": list(shape), "dtype": name}
            result["rows"].append(row("gelu", case, elementwise_variants(shape, dtype, F.gelu, kernels.gelu), options))
    for rule in ("sam", "asam"):
        result["rows"].append(row("perturb_weights", {"rule": rule}, weights_variants(rule == "asam"), options))
    result["rows"].append(row("ema", {}, ema_variants(), options))
    result["machine"]["load_average_after"] = [round(one, 2) for one in os.getloadavg()]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
