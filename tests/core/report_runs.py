"""Two made-up run folders, drawn from a seed: one that finished well, one that failed half-way."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

__all__ = ["failed_run", "finished_run", "write_run"]

_GOOD = (
    "a warm, generous film",
    "the cast never puts a foot wrong",
    "works every day since I bought it",
    "funny and sad",
)
_BAD = ("two hours I will not get back", "the battery died within a week", "flat, loud and far too long", "poor sound")
_TURN = (
    "but I had hoped for more",
    "and yet I would watch it again",
    "which surprised me",
    "as everyone told me it would be",
)


def write_run(folder: Path, files: dict[str, Any]) -> Path:
    """Write contents by file name: text as it is, lists as JSON lines, mappings as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if isinstance(content, list):
            content = "".join(json.dumps(line) + "\n" for line in content)
        elif not isinstance(content, str):
            content = json.dumps(content)
        (folder / name).write_text(content, "utf-8")
    return folder


def finished_run(seed: int = 0) -> dict[str, Any]:
    """Binary sentiment with LoRA + FGM + R-Drop that finished, with every file."""
    rng, steps, every, epoch = random.Random(seed), 582, 2, 97
    train, lines = [], []
    for step in range(every, steps + 1, every):
        base = 0.16 + 0.55 * math.exp(-step / 90)
        task = max(0.01, base + rng.gauss(0, 0.05))
        attack, kl = (
            task * 1.25 + abs(rng.gauss(0, 0.02)),
            0.03 + 0.05 * math.exp(-step / 60) + abs(rng.gauss(0, 0.006)),
        )
        lr = 1e-4 * (step / 35 if step < 35 else (steps - step) / (steps - 35))
        train.append(
            {
                "kind": "train",
                "step": step,
                "epoch": step / epoch,
                "loss": task + attack + kl,
                "terms": {"cross_entropy": task, "fgm": attack, "rdrop": kl},
                "lr": lr,
                "gradient_norm": math.exp(rng.gauss(0.9 - step / 900, 0.35)),
                "samples_per_second": rng.gauss(71, 3),
                "seconds": step * 0.45,
                "effects": {"fgm": {"delta_norm": 1.0}, "rdrop": {"kl": kl}, "lora": {"trainable_share": 0.0065}},
            }
        )
    lines += train
    for number, accuracy in enumerate((0.842, 0.887, 0.9, 0.912, 0.909, 0.911), start=1):
        metrics = {
            "accuracy": accuracy,
            "f1_macro": accuracy - 0.004,
            "loss": 0.39 - 0.045 * number + 0.006 * number**2,
        }
        lines.append({"kind": "validation", "step": number * epoch, "metrics": metrics})
    lines.append({"kind": "test", "step": steps, "metrics": {"accuracy": 0.904, "f1_macro": 0.9, "loss": 0.26}})
    return {
        "config.yaml": _CONFIG,
        "plan.json": _plan(),
        "data_card.json": _card(),
        "metrics.jsonl": lines,
        "summary.json": _summary(steps),
        "predictions.jsonl": _predictions(rng),
    }


def failed_run(seed: int = 1) -> dict[str, Any]:
    """Six intents in three schedule phases that met NaN; no card, no predictions, a last line cut short."""
    rng, lines = random.Random(seed), []
    for step in range(10, 1250, 10):
        loss = 1.8 * math.exp(-step / 400) + abs(rng.gauss(0, 0.08)) + (0 if step < 1150 else (step - 1150) ** 2 / 900)
        effects = {"freelb": {"delta_norm": 0.2 + 0.01 * rng.random()}, "ema": {"distance": 0.02 * math.sqrt(step)}}
        if step < 400:
            effects.pop("freelb")
        lines.append(
            {
                "kind": "train",
                "step": step,
                "epoch": step / 500,
                "loss": loss,
                "terms": {"cross_entropy": loss},
                "lr": 3e-4 * (1 + math.cos(math.pi * step / 3000)) / 2,
                "gradient_norm": loss * 2,
                "effects": effects,
            }
        )
        if step % 250 == 0:
            lines.append(
                {"kind": "validation", "step": step, "metrics": {"accuracy": 0.4 + 0.0003 * step, "loss": loss}}
            )
    lines[-1]["loss"] = float("nan")
    labels = ["开户", "转账", "挂失", "余额", "贷款", "other"]
    matrix = [[40 if i == j else rng.randint(0, 12) for j in range(6)] for i in range(6)]
    per_class = {}
    for i, label in enumerate(labels):
        recall, precision = 40 / sum(matrix[i]), 40 / sum(row[i] for row in matrix)
        f1 = 2 * precision * recall / (precision + recall)
        per_class[label] = {"precision": precision, "recall": recall, "f1": f1, "support": sum(matrix[i])}
    plan = _plan()
    plan["total_steps"] = 3000
    plan["layers"] = {"step": ["ema"], "backward": ["freelb"], "predict": ["episodes"]}
    plan["phases"] = [
        {
            "start": 0,
            "active": ["gradual-unfreeze"],
            "passes": "F32 B S",
            "counts": {"F": 1, "B": 1, "S": 1},
            "relative_cost": 1.0,
            "sync_points": 1,
        },
        {
            "start": 400,
            "active": ["freelb", "gradual-unfreeze"],
            "passes": "(F32 b) x3 F32 B S",
            "counts": {},
            "relative_cost": 4.0,
            "sync_points": 1,
        },
        {
            "start": 1000,
            "active": ["ema", "freelb"],
            "passes": "(F32 b) x3 F32 B S",
            "counts": {},
            "relative_cost": 4.0,
            "sync_points": 1,
        },
    ]
    plan["members"] = [
        _member("freelb", {"steps": 3, "epsilon": 0.2}, "3 further passes"),
        _member("ema", {"decay": 0.999}, "one copy"),
        _member("gradual-unfreeze", {"every": 400}, "less than full tuning"),
    ]
    validation = {
        "main": "accuracy",
        "accuracy": 0.7,
        "ci95": [0.64, 0.75],
        "per_class": per_class,
        "confusion": {"labels": labels, "matrix": matrix},
        "loss": 0.9,
    }
    summary = {
        "status": "failed",
        "task": "text-classification",
        "model": "/models/tiny-bert",
        "steps": 1240,
        "seconds": 4031.0,
        "error": "NonFiniteError: step 1240: loss is NaN on rows 411, 77, 1023; the weights are unchanged.\n"
        "Lower train.lr (3e-4), or set train.clip (0 now).",
        "metrics": {"validation": validation},
        "best": {"step": 1000, "metric": "accuracy", "value": 0.7},
        "methods": {
            "freelb": {"delta_norm": {"mean": 0.2, "last": 0.2, "count": 84}},
            "ema": {"distance": {"mean": 0.4, "last": 0.7, "count": 124}},
            "gradual-unfreeze": {"tensors": {"mean": 0.0, "last": 0.0, "count": 124}},
        },
    }
    metrics = "".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "train", "step": 12'
    return {
        "config.yaml": "task: text-classification\n",
        "plan.json": plan,
        "metrics.jsonl": metrics,
        "summary.json": summary,
    }


_CONFIG = """\
task: text-classification
model:
  name: models/all-MiniLM-L6-v2
data:
  use: vader-reviews
  archive: downloads/vaderSentiment-0.5.tar.gz
train: {epochs: 6.0, batch_size: 32, lr: 0.0001, seed: 0, precision: auto, clip: 1.0, max_length: 64}
methods:
- lora: {r: 8, alpha: 16}
- fgm: {epsilon: 1.0}
- rdrop: {alpha: 1.0}
output: runs/first
resume: auto
"""


def _member(name: str, parameters: dict[str, Any], cost: str) -> dict[str, Any]:
    return {
        "name": name,
        "order": 10,
        "parameters": parameters,
        "cost": cost,
        "distribution": "hybridengine",
        "version": "0.1.0",
    }


def _plan() -> dict[str, Any]:
    def kernel(op: str, impl: str, reason: str = "", chosen: bool = False) -> dict[str, Any]:
        return {"op": op, "impl": impl, "available": not reason, "reason": reason, "chosen": chosen}

    return {
        "layers": {"backward": ["fgm"], "loss": ["rdrop"]},
        "phases": [
            {
                "start": 0,
                "active": ["lora", "fgm", "rdrop"],
                "passes": "F64 b F64 B S",
                "counts": {"B": 1, "F": 2, "S": 1, "b": 1},
                "relative_cost": 4.0,
                "sync_points": 1,
            }
        ],
        "rows_per_step": 32,
        "stack_views": True,
        "total_steps": 582,
        "members": [
            _member("lora", {"r": 8, "alpha": 16, "dropout": 0.0}, "fewer gradients than full tuning"),
            _member("fgm", {"epsilon": 1.0, "norm": "l2"}, "one further forward and backward"),
            _member("rdrop", {"alpha": 1.0}, "two views of each row"),
            _member("adamw", {"betas": [0.9, 0.999]}, "two numbers a parameter"),
        ],
        "memory": {"exact": True, "weights_bytes": 91447304, "optimizer_bytes": 1185808},
        "kernels": [
            kernel("cross_entropy", "cuda", "not built: no nvcc was found"),
            kernel("cross_entropy", "cpu", chosen=True),
            kernel("cross_entropy", "reference"),
            kernel("perturb", "cuda", "not built: no nvcc was found"),
            kernel("perturb", "cpu", chosen=True),
            kernel("perturb", "reference"),
        ],
    }


def _card() -> dict[str, Any]:
    def split(rows: int, positive: int, share: float) -> dict[str, Any]:
        return {
            "rows": rows,
            "source": "vaderSentiment-0.5.tar.gz",
            "duplicates": 0 if rows < 5000 else 3,
            "labels": {"negative": rows - positive, "positive": positive},
            "words": {"median": 17, "p95": 39, "max": 122},
            "tokens": {"median": 22, "p95": 51, "max": 170, "truncated": share},
        }

    return {
        "splits": {
            "train": split(9298, 5041, 0.018),
            "validation": split(1182, 640, 0.016),
            "test": split(1141, 611, 0.02),
        },
        "overlap": {"train/validation": 0, "train/test": 2, "validation/test": 0},
        "max_length": 64,
        "skipped": {"train": {"rating below 1": 2510, "text seen before": 182}},
        "inferred": {"train": {"text": "sentence", "label": "rating"}},
    }


def _summary(steps: int) -> dict[str, Any]:
    def split(accuracy: float, low: float, high: float, matrix: list[list[int]]) -> dict[str, Any]:
        scores = {}
        for i, label in enumerate(("negative", "positive")):
            precision, recall = matrix[i][i] / (matrix[0][i] + matrix[1][i]), matrix[i][i] / sum(matrix[i])
            f1 = 2 * precision * recall / (precision + recall)
            scores[label] = {"precision": precision, "recall": recall, "f1": f1, "support": sum(matrix[i])}
        return {
            "main": "accuracy",
            "accuracy": accuracy,
            "ci95": [low, high],
            "f1_macro": accuracy - 0.002,
            "mcc": 0.82,
            "auroc": 0.967,
            "ece": 0.031,
            "loss": 0.251,
            "per_class": scores,
            "confusion": {"labels": ["negative", "positive"], "matrix": matrix},
        }

    return {
        "status": "finished",
        "task": "text-classification",
        "model": "models/all-MiniLM-L6-v2",
        "output": "runs/first",
        "metrics": {
            "validation": split(0.912, 0.895, 0.927, [[487, 55], [49, 591]]),
            "test": split(0.904, 0.886, 0.921, [[470, 60], [50, 561]]),
        },
        "best": {"step": 388, "metric": "accuracy", "value": 0.912},
        "steps": steps,
        "seconds": 262.4,
        "samples_per_second": 71.2,
        "parameters": {"total": 22_861_826, "trainable": 148_226},
        "methods": {
            "lora": {
                "trainable_share": {"mean": 0.0065, "last": 0.0065, "count": 1},
                "tensors": {"mean": 24, "last": 24, "count": 1},
            },
            "fgm": {"delta_norm": {"mean": 1.0, "last": 1.0, "count": 582}},
            "rdrop": {"kl": {"mean": 0.0412, "last": 0.0308, "count": 582}},
            "adamw": {},
        },
        "kernels": {"cross_entropy": {"cpu": 1164}, "perturb": {"cpu": 582}},
        "versions": {
            "hybridengine": "0.1.0",
            "torch": "2.13.0+cpu",
            "transformers": "5.0.0",
            "peft": "0.18.0",
            "python": "3.11.9",
        },
        "device": "cpu, 2 threads",
        "precision": {"name": "fp32", "reason": "this CPU has no bf16 instructions"},
        "notes": ["The test split was evaluated once, with the best weights."],
        "data_source": "vaderSentiment 0.5, hutto_ICWSM_2014.tar.gz (sha256 verified)",
    }


def _predictions(rng: random.Random) -> list[dict[str, Any]]:
    rows = []
    for split, count, wrong in (("validation", 300, 26), ("test", 280, 27)):
        for row in range(count):
            label = rng.choice(["negative", "positive"])
            text = f"{rng.choice(_GOOD if label == 'positive' else _BAD)}, {rng.choice(_TURN)}."
            correct = row >= wrong
            sure = 0.5 + rng.random() / 2
            prediction = label if correct else {"negative": "positive", "positive": "negative"}[label]
            other = "negative" if prediction == "positive" else "positive"
            rows.append(
                {
                    "split": split,
                    "row": row * 4,
                    "text": text,
                    "label": label,
                    "prediction": prediction,
                    "probabilities": {prediction: sure, other: 1 - sure},
                    "correct": correct,
                }
            )
    return rows
