"""Read a run folder as it is: files may be missing, cut short by a crash, or of another version.

Every string is cleaned here, once, so that no later step can show a raw control character.
"""

from __future__ import annotations

import heapq
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybridengine.errors import OutputError

__all__ = ["FILES", "RunFolder", "clean", "integer", "mapping", "number", "read_run", "sequence", "text"]

FILES = ("summary.json", "config.yaml", "plan.json", "data_card.json", "metrics.jsonl", "predictions.jsonl")
_MARKS_OF_A_RUN = ("summary.json", "config.yaml", "plan.json", "metrics.jsonl")
_WORST = 20

# ANSI sequences (CSI and OSC), then C0 but tab and newline, DEL, C1, lone surrogates and bidirectional overrides, which
# could make a text read as another one.
_ESCAPES = re.compile("\x1b\\[[0-?]*[ -/]*[@-~]|\x1b\\][^\x07\x1b]*(?:\x07|\x1b\\\\)|\x1b[@-Z\\\\-_]")
_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ufffe\uffff]"
)


@dataclass
class RunFolder:
    """What a run left behind. `missing` names absent files, `problems` what could not be read."""

    path: Path
    summary: dict[str, Any] = field(default_factory=dict)
    config: str = ""
    plan: dict[str, Any] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)
    train: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    predictions: Predictions = field(default_factory=lambda: Predictions())
    missing: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass
class Predictions:
    """Counts by split, and the wrong answers that the model was most confident of."""

    rows: dict[str, int] = field(default_factory=dict)
    wrong: dict[str, int] = field(default_factory=dict)
    worst: list[dict[str, Any]] = field(default_factory=list)


def read_run(folder: Path) -> RunFolder:
    """Read a run folder.

    Raises:
        OutputError: if the folder does not exist or holds no run.
    """
    if not folder.is_dir():
        raise OutputError(f"{folder}: no such folder; give the `output` folder of a run, e.g. runs/first")
    if not any((folder / name).is_file() for name in _MARKS_OF_A_RUN):
        raise OutputError(
            f"{folder} is not a run folder: it holds none of {', '.join(_MARKS_OF_A_RUN)}."
            " Give the `output` folder of a run, e.g. runs/first"
        )
    run = RunFolder(folder)
    run.missing = [name for name in FILES if not (folder / name).is_file()]
    run.summary = _json(run, "summary.json")
    run.plan = _json(run, "plan.json")
    run.card = _json(run, "data_card.json")
    run.config = clean(_content(run, "config.yaml"))
    for record in _lines(run, "metrics.jsonl"):
        (run.train if record.get("kind", "train") == "train" else run.evaluations).append(record)
    run.predictions = _predictions(_lines(run, "predictions.jsonl"))
    return run


def clean(value: Any) -> Any:
    """`value` with terminal sequences, control characters and lone surrogates taken out of every string in it."""
    if isinstance(value, str):
        return value if value.isprintable() else _CONTROLS.sub("", _ESCAPES.sub("", value))
    if isinstance(value, dict):
        return {clean(str(key)): clean(item) for key, item in value.items()}
    if isinstance(value, list):
        return [clean(item) for item in value]
    return value


def mapping(value: Any) -> dict[str, Any]:
    """`value` where it is a mapping, else an empty one."""
    return value if isinstance(value, dict) else {}


def sequence(value: Any) -> list[Any]:
    """`value` where it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def number(value: Any) -> float | None:
    """`value` as a finite float, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def integer(value: Any) -> int | None:
    """`value` as an int, or None."""
    found = number(value)
    return None if found is None else int(found)


def text(value: Any) -> str:
    """`value` in words: lists joined, nothing for None."""
    if isinstance(value, list):
        return ", ".join(text(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key}: {text(item)}" for key, item in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)


def _content(run: RunFolder, name: str) -> str:
    if name in run.missing:
        return ""
    try:
        return (run.path / name).read_text("utf-8", errors="replace")
    except OSError as error:
        run.problems.append(f"{name}: {error.strerror or error}")
        return ""


def _json(run: RunFolder, name: str) -> dict[str, Any]:
    content = _content(run, name)
    if not content:
        return {}
    try:
        found = clean(json.loads(content))
    except (ValueError, RecursionError):
        run.problems.append(f"{name} is not valid JSON and was left out")
        return {}
    if not isinstance(found, dict):
        run.problems.append(f"{name} does not hold a JSON object and was left out")
    return mapping(found)


def _lines(run: RunFolder, name: str) -> Iterator[dict[str, Any]]:
    """Records of a JSON-lines file, one at a time: predictions can be larger than memory."""
    if name in run.missing:
        return
    broken = 0
    try:
        with (run.path / name).open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    record = clean(json.loads(line)) if line.strip() else None
                except (ValueError, RecursionError):
                    record = ...
                if isinstance(record, dict):
                    yield record
                elif record is not None:
                    broken += 1
    except OSError as error:
        run.problems.append(f"{name}: {error.strerror or error}")
    if broken:
        run.problems.append(f"{name}: {broken:,} line(s) could not be read (the run may have been cut off)")


def _predictions(records: Iterator[dict[str, Any]]) -> Predictions:
    found = Predictions()
    heap: list[tuple[float, int, dict[str, Any]]] = []
    for index, record in enumerate(records):
        split = text(record.get("split")) or "rows"
        found.rows[split] = found.rows.get(split, 0) + 1
        found.wrong.setdefault(split, 0)
        if record.get("correct") is not False:
            continue
        found.wrong[split] += 1
        record["confidence"] = _confidence(record)
        entry = (-1.0 if record["confidence"] is None else record["confidence"], -index, record)
        if len(heap) < _WORST:
            heapq.heappush(heap, entry)
        else:
            heapq.heappushpop(heap, entry)
    found.worst = [record for *_, record in sorted(heap, key=lambda item: item[:2], reverse=True)]
    return found


def _confidence(record: dict[str, Any]) -> float | None:
    """Probability that was given to the (wrong) answer."""
    return number(mapping(record.get("probabilities")).get(text(record.get("prediction"))))
