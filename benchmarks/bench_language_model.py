"""A training step of a language model with its logits, and without: `kernels.patch`, which the engine uses.

    python benchmarks/bench_language_model.py [--rounds 7] [--precision bf16] [--output FILE.json]

Both ways alternate in one process on one model: forward, backward and a fused AdamW step, in blocks of two steps of
which the second counts, so that each pays for giving back its own memory. Models have random weights and the shape of a
small encoder or decoder (6 layers, 384 wide); 15% of the tokens are scored by the masked one, all by the causal one.
`bf16` runs the forward pass under autocast, as the engine does where a CPU multiplies bfloat16.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import transformers

from hybridengine import kernels
from hybridengine.bench.machine import describe
from hybridengine.bench.memory import peak

RESULTS = Path(__file__).parent / "results" / "language-model-cpu.json"
# kind, vocabulary, rows, length
CASES = [("masked", 30522, 16, 128), ("causal", 30522, 8, 128), ("masked", 151936, 8, 128), ("causal", 151936, 8, 128)]
SIZES = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12}


def make(kind: str, vocabulary: int, rows: int, length: int) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model and a batch."""
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": vocabulary}
    model: Any
    if kind == "masked":
        model = transformers.BertForMaskedLM(transformers.BertConfig(**sizes, intermediate_size=1536))
    else:
        config = transformers.LlamaConfig(**sizes, intermediate_size=1024, tie_word_embeddings=True)
        model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(5, vocabulary - 5, (rows, length))
    hidden = torch.rand(ids.shape) < (0.15 if kind == "masked" else 1.0)
    return model.train(), {"input_ids": ids, "labels": ids.masked_fill(~hidden, -100)}


def steps(model: Any, batch: dict[str, torch.Tensor], precision: str) -> dict[str, Callable[[], float]]:
    """One step each way; both return the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def update(loss: torch.Tensor) -> float:
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    def loss_of() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return cast(torch.Tensor, model(**batch).loss)

    def whole() -> float:
        optimizer.zero_grad()
        return update(loss_of())

    def lazy() -> float:
        optimizer.zero_grad()
        with kernels.patch(model):
            loss = loss_of()
        return update(loss)

    return {"plain torch": whole, "hybridengine": lazy}


def measure(case: tuple[str, int, int, int], rounds: int, precision: str) -> dict[str, Any]:
    """Medians with quartiles, and the peak beyond what is resident between steps."""
    kind, vocabulary, rows, length = case
    model, batch = make(*case)
    ways = steps(model, batch, precision)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, step in ways.items():
            step()
            start = time.perf_counter()
            step()
            if turn:  # the first warms up
                times[name].append(time.perf_counter() - start)
    gradients = sum(p.numel() * p.itemsize for p in model.parameters())
    result: dict[str, Any] = {"model": kind, "vocabulary": vocabulary, "rows": rows, "length": length}
    result["gradient_bytes"] = gradients
    for name, step in ways.items():
        q1, median, q3 = statistics.quantiles(times[name], n=4)
        used = peak(step, model.zero_grad, torch.device("cpu"))
        result[name] = {"median_ms": median * 1e3, "q1_ms": q1 * 1e3, "q3_ms": q3 * 1e3, "peak_bytes": used}
    result["times_faster"] = result["plain torch"]["median_ms"] / result["hybridengine"]["median_ms"]
    return result


def main() -> None:
    """Measure every case and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    results: dict[str, Any] = {
        "machine": describe(torch.device("cpu")),
        "precision": options.precision,
        "rows": [],
    }
    for case in CASES:
        row = measure(case, options.rounds, options.precision)
        results["rows"].append(row)
        before, after = (row[name]["peak_bytes"] / 2**20 for name in ("plain torch", "hybridengine"))
        print(f"{case}: {row['times_faster']:.2f} times faster, peak {before:.0f} -> {after:.0f} MiB", flush=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
