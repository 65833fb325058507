"""What a step of each method costs, against the passes it declares; and the engine's own overhead on a null model.

    python benchmarks/bench_methods.py --out benchmarks/results/methods-cpu.json

For every method: measured step time over the model  full·T(F+B) + delta·T(F+δB) + T(optimizer) + T(weight copy), all
parts measured in the same process, in alternating rounds; medians of the per-round ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from bench_engine import cpu_name, model_folder
from torch import nn
from torch.nn import functional
from transformers import AutoModelForSequenceClassification

from hybridengine import kernels
from hybridengine.model.loading import quiet
from hybridengine.testing import Bench, make_batch, set_up
from hybridengine_plugins.adversarial.fgm import FGM
from hybridengine_plugins.adversarial.freelb import FreeLB
from hybridengine_plugins.adversarial.pgd import PGD
from hybridengine_plugins.adversarial.sam import SAM
from hybridengine_plugins.adversarial.vat import VAT
from hybridengine_plugins.regularize.rdrop import RDrop

# name: (plugins, full passes, delta-only passes, weight copies, rows of a full pass relative to the batch)
METHODS: dict[str, tuple[Callable[[], list[object]], int, int, int]] = {
    "plain": (list, 1, 0, 0),
    "fgm": (lambda: [FGM(epsilon=1.0)], 2, 0, 0),
    "pgd(3)": (lambda: [PGD(steps=3)], 1, 3, 0),
    "freelb(3)": (lambda: [FreeLB(steps=3)], 3, 0, 0),
    "rdrop": (lambda: [RDrop()], 2, 0, 0),
    "sam": (lambda: [SAM()], 2, 0, 1),
    "vat": (lambda: [VAT()], 2, 1, 0),
}


class Parts:
    """The unit costs, by plain torch on the same model and batch, with the dropout that the engine uses."""

    def __init__(self, bench: Bench, batch: Any) -> None:
        self.model = bench.run.model
        self.batch = batch
        self.parameters = list(self.model.parameters())
        bench.run.clip = 1.0
        bench.run.optimizer = torch.optim.AdamW(self.parameters, lr=1e-6, fused=True)
        self.apply = bench.ctx.apply
        self.delta: torch.Tensor | None = None
        modules = dict(self.model.named_modules())
        (site,) = bench.run.sites.table  # type: ignore[union-attr]
        modules[site].register_forward_hook(lambda m, a, o: o if self.delta is None else o + self.delta)
        self.width = modules[site].weight.shape[1]

    def _loss(self) -> torch.Tensor:
        with kernels.fast_forward():
            logits = self.model(**self.batch.inputs).logits
        return functional.cross_entropy(logits, self.batch.targets)

    def full(self) -> None:
        for p in self.parameters:
            p.grad = None
        self._loss().backward()

    def delta_only(self) -> None:
        ids = self.batch.inputs["input_ids"]
        self.delta = torch.zeros(*ids.shape, self.width, requires_grad=True)
        torch.autograd.grad(self._loss(), self.delta)
        self.delta = None

    def update(self) -> None:
        """Norm, clipping and optimizer as the engine makes them, so that its savings there flatter no ratio."""
        self.apply()

    def copy(self) -> None:
        """Read the gradient norm, move the weights, put them back: what any weight perturbation must do."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        saved = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            for p in self.parameters:
                if p.grad is not None:
                    p.add_(p.grad, alpha=0.05 / float(norm))
            torch._foreach_copy_(self.parameters, saved)


def timed(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def real_model(rounds: int, size: int, length: int) -> dict[str, Any]:
    kernels.tune_allocator()
    batch = make_batch(size, length, classes=2, vocabulary=30000, padded=False)
    with quiet():
        load = lambda: AutoModelForSequenceClassification.from_pretrained(model_folder(), num_labels=2)  # noqa: E731
        benches = {}
        for name, (plugins, *_counts) in METHODS.items():
            bench = set_up(plugins(), load(), batch, labels=("a", "b"))
            bench.run.clip = 1.0
            bench.run.optimizer = torch.optim.AdamW(bench.run.may_optimise.values(), lr=1e-6, fused=True)
            bench.ctx.trace.recording = False
            benches[name] = bench
        reference = set_up([], load(), batch, labels=("a", "b"))
        reference.ctx.trace.recording = False
    parts = Parts(reference, batch)
    parts.model.train()
    units: dict[str, list[float]] = {}
    measured: dict[str, list[float]] = {name: [] for name in METHODS}
    ratios: dict[str, list[float]] = {name: [] for name in METHODS}
    for turn in range(rounds + 2):
        unit = {"full": timed(parts.full)}
        unit["copy"] = timed(parts.copy)
        unit["update"] = timed(parts.update)
        unit["delta"] = timed(parts.delta_only)
        unit["full"] = statistics.median([unit["full"], timed(parts.full), timed(parts.full)])
        for name, (_, full, delta, copies) in METHODS.items():
            seconds = timed(lambda b=benches[name]: b.step([batch]))  # type: ignore[misc]
            again = timed(parts.full)
            if turn < 2:
                continue
            near = statistics.median([unit["full"], again])
            expected = full * near + delta * unit["delta"] + copies * unit["copy"] + unit["update"]
            measured[name].append(seconds)
            ratios[name].append(seconds / expected)
        if turn >= 2:
            for key, value in unit.items():
                units.setdefault(key, []).append(value)
    return {
        "batch": [size, length],
        "rounds": rounds,
        "milliseconds": {k: round(1e3 * statistics.median(v), 3) for k, v in {**units, **measured}.items()},
        "ratio_to_declared_passes": {
            name: {
                "median": round(statistics.median(v), 4),
                "quartiles": [round(q, 4) for q in statistics.quantiles(v, n=4)[::2]],
            }
            for name, v in ratios.items()
        },
    }


class NullModel(nn.Module):
    """As little arithmetic as a model can have."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 4)
        self.classifier = nn.Linear(4, 2)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        out = type("Output", (), {})()
        out.logits = self.classifier(self.embedding(input_ids).mean(1))
        return out


def overhead(rounds: int) -> dict[str, Any]:
    """Microseconds that the engine adds: per step of a plain stack, and per further pass (micro-batches 1 to 8).

    Blocks of 20 steps alternate, not single steps: code that runs in turn with another finds the caches full of it.
    """
    batch = make_batch(4, 5, classes=2, padded=False)
    plain = set_up([], NullModel(), batch, labels=("a", "b"))
    null = NullModel()
    optimizer = torch.optim.SGD(null.parameters(), lr=0.0)
    parameters = list(null.parameters())

    def by_hand(passes: int = 1) -> None:
        for p in parameters:
            p.grad = None
        for _ in range(passes):
            functional.cross_entropy(null(**batch.inputs).logits, batch.targets, reduction="sum").backward()
        torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        optimizer.step()

    def block(function: Callable[[], Any]) -> float:
        return timed(lambda: [function() for _ in range(20)]) / 20

    steps, passes, bare = [], [], []
    plain.ctx.trace.recording = False
    for _ in range(rounds):
        one, hand = block(lambda: plain.step([batch])), block(by_hand)
        eight, hand_eight = block(lambda: plain.step([batch] * 8)), block(lambda: by_hand(8))
        steps.append(1e6 * (one - hand))
        passes.append(1e6 * ((eight - hand_eight) - (one - hand)) / 7)
        bare.append(1e6 * (hand_eight - hand) / 7)
    return {
        "microseconds_per_step": round(statistics.median(steps), 1),
        "microseconds_per_further_pass": round(statistics.median(passes), 1),
        "microseconds_of_a_bare_pass": round(statistics.median(bare), 1),
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    result = {
        "what": "step time over the time of the declared passes",
        "device": {"cpu": cpu_name(), "threads": torch.get_num_threads()},
        "versions": {"torch": torch.__version__},
        "overhead": overhead(60),
        "methods": real_model(args.rounds, args.batch, args.length),
        "load_average": os.getloadavg(),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
