"""What surrounds a run: the data card, the environment, the headline figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hybridengine.report.read import RunFolder, integer, mapping, number, text
from hybridengine.report.stack import PhaseRow, phase_rows
from hybridengine.report.words import amount, compact, duration, percent, size, title

__all__ = ["SplitCard", "data_notes", "environment", "figures", "split_cards"]

_MOST_LABELS = 20
_CARD_KEYS = frozenset(
    {"splits", "overlap", "skipped", "carved", "carve_rule", "limit", "inferred", "max_length", "columns", "source"}
)


@dataclass(frozen=True)
class SplitCard:
    """One split: rows, facts about them, and its labels as (name, count, percent of the largest)."""

    name: str
    rows: str
    source: str
    facts: list[tuple[str, str]]
    labels: list[tuple[str, str, float]]
    more_labels: int


def split_cards(run: RunFolder) -> list[SplitCard]:
    """The data card split by split."""
    limit = text(run.card.get("max_length"))
    return [_split_card(name, mapping(split), limit) for name, split in mapping(run.card.get("splits")).items()]


def _split_card(name: str, split: dict[str, Any], limit: str) -> SplitCard:
    facts = []
    for unit in ("words", "tokens"):
        if spread := mapping(split.get(unit)):
            shown = " · ".join(f"{key} {compact(number(spread.get(key)))}" for key in ("median", "p95", "max"))
            facts.append((title(unit), shown))
    cut = number(mapping(split.get("tokens")).get("truncated"))
    if cut is not None:
        facts.append((f"Cut at {limit} tokens" if limit else "Cut", percent(cut)))
    if split.get("duplicates") is not None:
        facts.append(("Repeated texts", compact(number(split.get("duplicates")))))
    counts = sorted(
        ((label, max(0.0, number(n) or 0.0)) for label, n in mapping(split.get("labels")).items()),
        key=lambda item: -item[1],
    )
    largest = max((n for _, n in counts), default=0.0)
    labels = [
        (label, f"{n:,.0f}", round(100 * n / largest, 1) if largest > 0 else 0.0) for label, n in counts[:_MOST_LABELS]
    ]
    return SplitCard(
        name,
        compact(number(split.get("rows"))),
        text(split.get("source")),
        facts,
        labels,
        max(0, len(counts) - _MOST_LABELS),
    )


def data_notes(run: RunFolder) -> list[tuple[str, str]]:
    """Remarks on the data as (tone, sentence): leaks and skipped rows first."""
    card, notes = run.card, []
    for pair, count in mapping(card.get("overlap")).items():
        first, _, second = pair.partition("/")
        if number(count):
            notes.append(("warn", f"{compact(number(count))} rows of {second} have a text that {first} holds too."))
    for name, reasons in {**mapping(card.get("skipped")), **mapping(run.summary.get("skipped_rows"))}.items():
        if mapping(reasons):
            listed = ", ".join(f"{reason} ({text(count)})" for reason, count in reasons.items())
            notes.append(("warn", f"Skipped rows of {name}: {listed}."))
        elif number(reasons):
            notes.append(("warn", f"Skipped rows of {name}: {compact(number(reasons))}."))
    for name, share in mapping(card.get("carved")).items():
        rule = text(card.get("carve_rule"))
        notes.append(("", f"{name} is {percent(number(share), 0)} of the training texts{': ' if rule else ''}{rule}."))
    if limit := mapping(card.get("limit")):
        notes.append(("", f"train is limited to {text(limit.get('rows'))} of {text(limit.get('of'))} rows."))
    for name, roles in mapping(card.get("inferred")).items():
        notes.append(("", f"Columns read in {name}: {text(roles)}."))
    notes += [("", f"{title(key)}: {text(value)}.") for key, value in card.items() if key not in _CARD_KEYS and value]
    if source := text(run.summary.get("data_source")) or text(card.get("source")):
        notes.append(("", f"Data: {source}."))
    return notes


def figures(run: RunFolder) -> list[tuple[str, str, str]]:
    """Headline figures as (name, value, detail); those that are unknown are left out."""
    summary = run.summary
    parameters = mapping(summary.get("parameters"))
    total, trainable = number(parameters.get("total")), number(parameters.get("trainable"))
    steps, speed = integer(summary.get("steps")), number(summary.get("samples_per_second"))
    cost = mean_cost(phase_rows(run))
    found = [
        ("Training time", duration(summary.get("seconds")), "" if steps is None else f"{steps:,} steps"),
        ("Speed", f"{compact(speed)}/s" if speed is not None else "–", "training rows"),
        ("Cost of a step", f"{cost:.2f}×" if cost is not None else "–", "a plain step is 1×"),
        (
            "Trained parameters",
            amount(trainable),
            f"{percent(trainable / total)} of {amount(total)}" if trainable is not None and total else "",
        ),
    ]
    return [figure for figure in found if figure[1] != "–"]


def mean_cost(phases: list[PhaseRow]) -> float | None:
    """Relative cost of a step over the whole schedule."""
    known = [(phase.cost, phase.share or 1.0) for phase in phases if phase.cost is not None]
    weight = sum(share for _, share in known)
    return sum(cost * share for cost, share in known) / weight if known else None


def environment(run: RunFolder) -> list[tuple[str, str]]:
    """Device, precision with its reason, versions and notes."""
    precision = mapping(run.summary.get("precision"))
    named = " — ".join(filter(None, (text(precision.get("name")), text(precision.get("reason")))))
    memory = mapping(run.plan.get("memory"))
    rows = [
        ("Task", text(run.summary.get("task"))),
        ("Model", text(run.summary.get("model"))),
        ("Output", text(run.summary.get("output"))),
        ("Device", text(run.summary.get("device"))),
        ("Precision", named or text(run.summary.get("precision"))),
        *(
            (title(f"{key.removesuffix('_bytes')} memory"), size(value))
            for key, value in memory.items()
            if key.endswith("_bytes")
        ),
        *((name, text(version)) for name, version in mapping(run.summary.get("versions")).items()),
    ]
    return [row for row in rows if row[1]]
