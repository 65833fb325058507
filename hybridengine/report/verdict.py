"""The run in one sentence, for a reader who was not there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hybridengine.report.charts import ticks
from hybridengine.report.read import RunFolder, integer, mapping, number, sequence, text
from hybridengine.report.words import is_share, lower_is_better, metric, percent, title

__all__ = ["Result", "Strip", "Verdict", "make_verdict"]

_STATUS = {
    "finished": ("Finished", "good"),
    "stopped": ("Stopped", "warn"),
    "failed": ("Failed", "bad"),
}
_UNFINISHED = ("Not finished", "warn")


@dataclass(frozen=True)
class Result:
    """The main metric on one split, and what always answering the commonest label would get."""

    split: str
    metric: str
    value: float
    low: float | None = None
    high: float | None = None
    baseline: float | None = None
    baseline_label: str = ""

    @property
    def shown(self) -> str:
        """The value in its own form."""
        return metric(self.metric, self.value)

    @property
    def interval(self) -> str:
        """`89.5% to 92.7%`, or nothing."""
        if self.low is None or self.high is None:
            return ""
        return f"{metric(self.metric, self.low)} to {metric(self.metric, self.high)}"

    @property
    def beats(self) -> str:
        """`clearly`, `perhaps`, `above` (no interval), `no`, or nothing where there is no baseline."""
        if self.baseline is None:
            return ""
        if self.value <= self.baseline:
            return "no"
        if self.low is None:
            return "above"
        return "clearly" if self.low > self.baseline else "perhaps"


@dataclass(frozen=True)
class Bar:
    """One row of the strip, in percent of its width."""

    result: Result
    at: float
    low: float
    high: float
    baseline: float | None


@dataclass(frozen=True)
class Strip:
    """Intervals of all splits on one common scale."""

    bars: list[Bar]
    ticks: list[tuple[float, str]]


@dataclass(frozen=True)
class Verdict:
    """Status, the sentence, and what it rests on."""

    status: str
    tone: str
    sentence: str
    error: str = ""
    results: list[Result] = field(default_factory=list)
    strip: Strip | None = None


def make_verdict(run: RunFolder) -> Verdict:
    """Judge the run from what its folder says."""
    status, tone = _STATUS.get(text(run.summary.get("status")), _UNFINISHED)
    results = _results(run)
    parts = [_how_it_ended(run, status), _what_it_reached(run, results), _against_baseline(results)]
    sentence = " ".join(part for part in parts if part)
    return Verdict(status, tone, sentence, text(run.summary.get("error")), results, _strip(results))


def last_step(run: RunFolder) -> int | None:
    """Optimizer steps that were made, as far as the folder tells."""
    made = integer(run.summary.get("steps"))
    logged = [integer(record.get("step")) for record in run.train]
    return made if made is not None else max((step for step in logged if step is not None), default=None)


def _results(run: RunFolder) -> list[Result]:
    found = []
    for split, measured in mapping(run.summary.get("metrics")).items():
        measured = mapping(measured)
        main = _main(measured)
        if (value := number(measured.get(main))) is None:
            continue
        ends = [number(end) for end in sequence(measured.get("ci95"))]
        low, high = ends if len(ends) == 2 else (None, None)
        baseline, label = _majority(run, split, measured) if main == "accuracy" else (None, "")
        found.append(Result(split, main, value, low, high, baseline, label))
    if not found and run.evaluations:
        last = run.evaluations[-1]
        measured = mapping(last.get("metrics"))
        main = _main(measured)
        if (value := number(measured.get(main))) is not None:
            found.append(Result(text(last.get("kind")), main, value))
    return sorted(found, key=lambda result: (result.split != "validation", result.split))


def _main(measured: dict[str, Any]) -> str:
    named = text(measured.get("main"))
    return named or next((name for name in ("accuracy", *measured) if number(measured.get(name)) is not None), "")


def _majority(run: RunFolder, split: str, measured: dict[str, Any]) -> tuple[float | None, str]:
    """Accuracy of always giving the commonest training label, and that label."""
    supports = {
        label: number(mapping(row).get("support")) or 0.0 for label, row in mapping(measured.get("per_class")).items()
    }
    rows = sum(supports.values())
    one_label_each = bool(measured.get("confusion")) or rows == run.predictions.rows.get(split)
    if not rows or not one_label_each:
        return None, ""
    train = mapping(mapping(mapping(run.card.get("splits")).get("train")).get("labels"))
    counts = {label: number(train.get(label)) or 0.0 for label in supports}
    label = max(supports, key=lambda name: (counts[name], supports[name]))
    return supports[label] / rows, label


def _how_it_ended(run: RunFolder, status: str) -> str:
    step, total = last_step(run), integer(run.plan.get("total_steps"))
    reason = text(run.summary.get("stop_reason"))
    where = "" if step is None else f" after {step:,} of {total:,} steps" if total else f" after {step:,} steps"
    return {
        "Finished": f"The run finished: {reason.rstrip('.')}." if reason else "The run finished.",
        "Stopped": f"The run was stopped{where}; it can be resumed.",
        "Failed": f"The run failed{where}.",
    }.get(status, f"The run has not finished: it wrote no summary{where}.")


def _what_it_reached(run: RunFolder, results: list[Result]) -> str:
    if not results:
        return "Nothing was evaluated, so there is no result to judge."
    best = integer(mapping(run.summary.get("best")).get("step"))
    name = title(results[0].metric)
    name = name if name[:2].isupper() or name[1:2].isdigit() else name[:1].lower() + name[1:]
    reached = []
    for index, result in enumerate(results):
        what = f"{result.shown} {name}" if is_share(result.metric) and not index else result.shown
        interval = f" (95% interval {result.interval})" if result.interval else ""
        reached.append(f"{what} on {result.split}{interval}")
    who = f"Its best checkpoint (step {best:,})" if best is not None else "The model"
    verb = "reaches" if is_share(results[0].metric) else f"has a {name} of"
    return f"{who} {verb} {' and '.join(reached)}."


def _against_baseline(results: list[Result]) -> str:
    judged = next((r for r in reversed(results) if r.beats), None)
    if judged is None:
        return ""
    answer = f"always answering “{judged.baseline_label}” ({percent(judged.baseline)} on {judged.split})"
    return {
        "clearly": f"That is clearly better than {answer}.",
        "perhaps": f"That is above {answer}, but the difference may be chance.",
        "above": f"That is above {answer}; no interval was recorded.",
        "no": f"That is no better than {answer}.",
    }[judged.beats]


def _strip(results: list[Result]) -> Strip | None:
    """A common scale from below the lowest value to above the highest; only for shares of 1."""
    shares = [r for r in results if is_share(r.metric) and 0 <= r.value <= 1 and not lower_is_better(r.metric)]
    if not shares:
        return None
    ends = [v for r in shares for v in (r.value, r.low, r.high, r.baseline) if v is not None]
    low, high = max(0.0, min(ends) - 0.04), min(1.0, max(ends) + 0.03)

    def at(value: float) -> float:
        return round(min(100.0, max(0.0, 100 * (value - low) / (high - low))), 2)

    bars = [
        Bar(
            r,
            at(r.value),
            at(r.value if r.low is None else r.low),
            at(r.value if r.high is None else r.high),
            None if r.baseline is None else at(r.baseline),
        )
        for r in shares
    ]
    return Strip(bars, [(at(tick), percent(tick, 0)) for tick in ticks(low, high, most=6)])
