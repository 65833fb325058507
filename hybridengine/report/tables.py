"""Results as tables: metrics, classes, confusions, wrong answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hybridengine.report.read import RunFolder, integer, mapping, number, sequence, text
from hybridengine.report.words import metric, percent, title

__all__ = ["ClassRow", "Confusion", "WrongAnswer", "class_tables", "confusions", "metric_rows", "wrong_answers"]

_LARGEST_MATRIX = 16
_MOST_PAIRS = 20
_MOST_CLASSES = 60
_LONGEST_TEXT = 600
_KNOWN = frozenset(
    {"split", "row", "label", "prediction", "probabilities", "correct", "confidence", "text", "tokens", "id"}
)


@dataclass(frozen=True)
class ClassRow:
    """Scores of one label, and whether it is the weakest."""

    label: str
    precision: float | None
    recall: float | None
    f1: float | None
    support: int | None
    weakest: bool


@dataclass(frozen=True)
class Confusion:
    """True labels by row, answers by column: a matrix, or for many labels the commonest confusions."""

    split: str
    labels: list[str]
    rows: list[tuple[str, list[tuple[int, float, bool]]]]
    pairs: list[tuple[str, str, int, float]]


@dataclass(frozen=True)
class WrongAnswer:
    """One wrong answer. `tokens` are (token, true tag, given tag), the tags empty where they agree."""

    split: str
    row: str
    content: str
    extra: list[tuple[str, str]]
    tokens: list[tuple[str, str, str]]
    label: str
    prediction: str
    confidence: str


def metric_rows(run: RunFolder) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Splits, and each scalar metric with its value per split."""
    splits = {name: mapping(measured) for name, measured in mapping(run.summary.get("metrics")).items()}
    names = dict.fromkeys(n for m in splits.values() for n, value in m.items() if number(value) is not None)
    return list(splits), [(title(n), [metric(n, m.get(n)) for m in splits.values()]) for n in names]


def class_tables(run: RunFolder) -> list[tuple[str, list[ClassRow]]]:
    """Scores per class by split, in the order of the run, the weakest marked."""
    tables = []
    for split, measured in mapping(run.summary.get("metrics")).items():
        scores = {k: mapping(v) for k, v in mapping(mapping(measured).get("per_class")).items()}
        ranked = {label: value for label, row in scores.items() if (value := number(row.get("f1"))) is not None}
        weakest = min(ranked, key=lambda label: ranked[label]) if len(ranked) > 1 else None
        rows = [
            ClassRow(
                label,
                number(row.get("precision")),
                number(row.get("recall")),
                number(row.get("f1")),
                integer(row.get("support")),
                label == weakest,
            )
            for label, row in scores.items()
        ]
        if len(rows) > _MOST_CLASSES:
            rows = sorted(rows, key=lambda row: 2.0 if row.f1 is None else row.f1)[:_MOST_CLASSES]
        if rows:
            tables.append((split, rows))
    return tables


def confusions(run: RunFolder) -> list[Confusion]:
    """The confusion of each split that has a well-formed one."""
    found = []
    for split, measured in mapping(run.summary.get("metrics")).items():
        raw = mapping(mapping(measured).get("confusion"))
        labels = [text(label) for label in sequence(raw.get("labels"))]
        matrix = [[max(0, integer(cell) or 0) for cell in sequence(row)] for row in sequence(raw.get("matrix"))]
        if labels and len(matrix) == len(labels) and all(len(row) == len(labels) for row in matrix):
            found.append(_confusion(split, labels, matrix))
    return found


def _confusion(split: str, labels: list[str], matrix: list[list[int]]) -> Confusion:
    rows, pairs = [], []
    for i, counts in enumerate(matrix):
        total = sum(counts)
        shares = [count / total if total > 0 else 0.0 for count in counts]
        rows.append((labels[i], [(count, shares[j], i == j) for j, count in enumerate(counts)]))
        pairs += [(labels[i], labels[j], count, shares[j]) for j, count in enumerate(counts) if i != j and count > 0]
    pairs.sort(key=lambda pair: -pair[2])
    return Confusion(split, labels, rows if len(labels) <= _LARGEST_MATRIX else [], pairs[:_MOST_PAIRS])


def wrong_answers(run: RunFolder) -> list[WrongAnswer]:
    """The wrong answers that were given with most confidence, most confident first."""
    return [_wrong_answer(record) for record in run.predictions.worst]


def _wrong_answer(record: dict[str, Any]) -> WrongAnswer:
    tokens = _tagged(record)
    extra = [(key, _cut(text(value))) for key, value in record.items() if key not in _KNOWN and text(value)]
    return WrongAnswer(
        text(record.get("split")),
        text(record.get("row")),
        "" if tokens else _cut(text(record.get("text") or " ".join(map(text, sequence(record.get("tokens")))))),
        extra,
        tokens,
        "" if tokens else _cut(text(record.get("label"))),
        "" if tokens else _cut(text(record.get("prediction"))),
        percent(number(record.get("confidence"))) if record.get("confidence") is not None else "",
    )


def _tagged(record: dict[str, Any]) -> list[tuple[str, str, str]]:
    tokens, true, given = (sequence(record.get(key)) for key in ("tokens", "label", "prediction"))
    if not tokens or len(tokens) != len(true) or len(tokens) != len(given):
        return []
    triples = zip(tokens[:_LONGEST_TEXT], true, given, strict=False)
    return [(text(a), "", "") if b == c else (text(a), text(b), text(c)) for a, b, c in triples]


def _cut(content: str) -> str:
    return content if len(content) <= _LONGEST_TEXT else content[: _LONGEST_TEXT - 1] + "…"
