"""Whole runs on a tiny checkpoint and made-up rows, and what they leave behind, bit for bit."""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from hybridengine.data.rows import TARGET_ROLES
from hybridengine.engine import Engine
from hybridengine.errors import Stopped
from hybridengine.testing import tiny_checkpoint

LABELS = ("poor", "fine", "good", "great")
_FILLER = "the movie was a book and actor of story with price".split()
_TIMINGS = {"seconds", "samples_per_second", "samples"}


def text_rows(count: int = 48) -> list[dict[str, Any]]:
    """Rows of different lengths whose label word stands in the text most of the time."""
    rows = []
    for i in range(count):
        label = LABELS[i % len(LABELS)]
        said = label if i % 7 else LABELS[(i + 1) % len(LABELS)]
        filler = [_FILLER[(i * 3 + j) % len(_FILLER)] for j in range(1 + i % 6)]
        rows.append({"text": " ".join([*filler, said, f"number {i}"]), "label": label})
    return rows


def tagged_rows(count: int = 48) -> list[dict[str, Any]]:
    """Words with tags: cities are places, names are persons."""
    kinds = {"paris": "B-LOC", "london": "B-LOC", "john": "B-PER", "mary": "B-PER"}
    names = list(kinds)
    rows = []
    for i in range(count):
        words = [names[i % 4], "visited", names[(i // 4) % 4], *_FILLER[: i % 5], f"n{i}"]
        rows.append({"tokens": words, "tags": [kinds.get(word, "O") for word in words]})
    return rows


def summary_rows(count: int = 48) -> list[dict[str, Any]]:
    """Texts whose summary is their label word."""
    return [{"text": row["text"], "summary": f"{row['label']} movie"} for row in text_rows(count)]


_ROWS = {"token-classification": tagged_rows, "summarization": summary_rows}


@functools.cache
def checkpoint(
    architecture: str = "bert", auto_class: str | None = None, labels: tuple[str, ...] = (), **config: Any
) -> str:
    """The folder of a tiny checkpoint, made once per process; `labels` name a classification head's outputs."""
    if labels:
        config.update(id2label=dict(enumerate(labels)), label2id={label: i for i, label in enumerate(labels)})
    folder = Path(tempfile.mkdtemp(prefix="hybridengine-tiny-"))
    return str(tiny_checkpoint(folder, architecture, auto_class, **config))


@functools.cache
def synonyms() -> str:
    """A table of synonyms for the made-up texts."""
    path = Path(tempfile.mkdtemp(prefix="hybridengine-tiny-")) / "synonyms.tsv"
    path.write_text("movie\tfilm\nbook\tnovel\nstory\tplot\nnumber\tfigure\n", encoding="utf-8")
    return str(path)


def with_dropout() -> str:
    """A tiny BERT whose dropout is on."""
    return checkpoint("bert", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)


def run_config(
    methods: list[Any],
    output: Path | str,
    *,
    model: str | None = None,
    task: Any = "text-classification",
    data: dict[str, Any] | None = None,
    evaluate: dict[str, Any] | None = None,
    unlabelled: bool = False,
    **train: Any,
) -> dict[str, Any]:
    """A configuration of a few steps; keyword arguments go to its `train` section."""
    name = task if isinstance(task, str) else next(iter(task))
    make = _ROWS.get(name, text_rows)
    rows = make()
    splits: dict[str, Any] = {"train": rows[:36], "validation": rows[36:]}
    if unlabelled:
        splits["unlabelled"] = [{k: v for k, v in row.items() if k not in TARGET_ROLES} for row in make(12)]
    defaults = {"max_steps": 4, "batch_size": 4, "lr": 5e-3, "precision": "fp32", "device": "cpu", "max_length": 24}
    return {
        "task": task,
        "model": {"name": model or with_dropout()},
        "data": {**splits, **(data or {})},
        "train": {**defaults, **train},
        "methods": methods,
        "output": str(output),
        "evaluate": {"resamples": 20, **(evaluate or {})},
        "log": {"every": 3},  # not every step: what methods reported in between must survive as well
    }


class StopAfter:
    """Asks for a stop after `steps` optimizer steps of this engine."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __call__(self) -> bool:
        self.left -= 1
        return self.left <= 0


def train_stopping_after(config: dict[str, Any], steps: int) -> bool:
    """Train and stop after so many steps; returns whether the run finished before that."""
    try:
        Engine(config, cancel=StopAfter(steps)).train()
    except Stopped:
        return False
    return True


# ---- what a run leaves behind ----------------------------------------------------------------------------------------


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _without_timings(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_timings(v) for k, v in sorted(value.items()) if k not in _TIMINGS}
    if isinstance(value, list):
        return [_without_timings(v) for v in value]
    return value


def checkpoint_bits(folder: Path) -> dict[str, Any]:
    """A checkpoint's parameters, buffers, optimizer and method states, as digests, and what the loop remembers."""
    bits: dict[str, Any] = {p.name: _digest(p) for p in folder.glob("*.safetensors")}
    for name in ("optimizer.json", "states.json", "trainer.json"):
        bits[name] = _without_timings(json.loads((folder / name).read_text(encoding="utf-8")))
    bits["states.json"]["methods"].sort()
    return bits


def run_bits(folder: Path) -> dict[str, Any]:
    """Everything a finished run promises to reproduce: all but timings, notes and the order in which it was made."""
    best = folder / "best"
    files = sorted(p for p in best.rglob("*") if p.is_file())
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    promised = ("status", "metrics", "best", "steps", "methods", "parameters", "stop_reason", "skipped_rows")
    assert (folder / "report.html").is_file()
    return {
        "best": {str(p.relative_to(best)): _digest(p) for p in files},
        "checkpoint": checkpoint_bits(max((folder / "checkpoints").glob("step-*"))),
        "metrics": [_without_timings(json.loads(line)) for line in lines],
        "predictions": _digest(folder / "predictions.jsonl"),
        "summary": {key: _without_timings(summary[key]) for key in promised},
    }


def leftovers(folder: Path) -> list[str]:
    """Staged or retired files and folders that a crash left."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob(".*"))
