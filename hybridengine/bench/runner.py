"""A whole run: which cases, in which order, and the report of all figures."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch

from hybridengine.bench import catalogue, memory
from hybridengine.bench.case import TIERS, Case, Tier
from hybridengine.bench.competitors import FAMILIES
from hybridengine.bench.floor import Rates
from hybridengine.bench.machine import describe, load_average
from hybridengine.bench.measure import Bench, left_out, measure
from hybridengine.bench.timing import DEFAULT, FULL, QUICK
from hybridengine.errors import ConfigError

__all__ = ["Plan", "run"]

EFFORTS = {"quick": QUICK, "default": DEFAULT, "full": FULL}
_MOST_MEMORY = {"quick": 3e9, "default": 5e9, "full": float("inf")}

_LATE = "the {0} run ends after {1:.0f} s; name operations with --op to have all their cases"

Progress = Callable[[str], None]
Keep = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Plan:
    """What is asked for.

    Args:
        ops: names; none means every operation whose kernel is there.
        against: families of competitors; none means all.
        tier: how much.
        device: "cpu" or "cuda"; None takes a GPU where there is one.
    """

    ops: Sequence[str] = ()
    against: Sequence[str] = ()
    tier: Tier = "default"
    device: str | None = None


def run(plan: Plan, progress: Progress = lambda text: None, keep: Keep = lambda report: None) -> dict[str, Any]:
    """Measure everything that the plan asks for and return the report.

    Args:
        plan: what to measure.
        progress: told of each case before it is measured.
        keep: given the report after each case, marked as interrupted: what a process that is killed leaves behind.

    Raises:
        ConfigError: for an unknown operation, competitor or device.
    """
    catalogue.check_names(plan.ops, catalogue.names(), "operation")
    catalogue.check_names(plan.against, list(FAMILIES), "competitor")
    device = _device(plan.device)
    bench = _bench(plan, device)
    report: dict[str, Any] = {
        "date": f"{datetime.now(UTC):%Y-%m-%dT%H:%MZ}",
        "tier": plan.tier,
        "against": list(bench.against),
        "machine": describe(device),
        "memory": memory.why_not(device) or memory.METHODS[device.type],
        "interrupted": True,
        "not_run": {},
        "rows": [],
    }
    selected = _selected(plan, device, report["not_run"])
    begun = time.monotonic()
    for number, (op, case) in enumerate(selected, 1):
        progress(f"{number}/{len(selected)} {op}: {case.label}")
        torch.manual_seed(0)
        late = not plan.ops and time.monotonic() - begun > bench.effort.total
        try:
            row = left_out(case, _LATE.format(plan.tier, bench.effort.total)) if late else measure(case, bench)
            report["rows"].append({"op": op, **row})
            if not late:
                keep(_complete(report, bench))
        except KeyboardInterrupt:  # what is measured is not lost
            break
    else:
        report["interrupted"] = False
    return _complete(report, bench)


def _complete(report: dict[str, Any], bench: Bench) -> dict[str, Any]:
    """Bring the report up to date with its rows."""
    report["rows"].sort(key=lambda row: row["op"])
    report["floor"] = {
        "copy_gb_per_s": bench.rates.bandwidth / 1e9,
        "products_gflop_per_s": {str(d).removeprefix("torch."): r / 1e9 for d, r in bench.rates.products.items()},
    }
    report["machine"]["load_average_after"] = load_average()
    return report


def _device(asked: str | None) -> torch.device:
    if asked not in (None, "cpu", "cuda"):
        raise ConfigError(f"bench: --device is cpu or cuda, not {asked!r}")
    if asked == "cuda" and not torch.cuda.is_available():
        raise ConfigError("bench: torch sees no GPU here; leave --device out, or say --device cpu")
    return torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))


def _bench(plan: Plan, device: torch.device) -> Bench:
    effort = EFFORTS[plan.tier]
    # Compiling takes longer than all of --quick, so it is left out there unless it is named.
    usual = [name for name in FAMILIES if name != "compile" or plan.tier != "quick"]
    return Bench(
        device=device,
        effort=effort,
        rates=Rates(device),
        against=tuple(plan.against or usual),
        compile_seconds=effort.compile_seconds,
        most_memory=_MOST_MEMORY[plan.tier] if device.type == "cpu" else float("inf"),
    )


def _selected(plan: Plan, device: torch.device, not_run: dict[str, str]) -> list[tuple[str, Case]]:
    """All cases: the quick ones first, and of each tier one of every operation in turn, in case the time runs out.

    An operation that is asked for and has no kernel yet is told in `not_run`.
    """
    most = TIERS.index(plan.tier)
    found: list[tuple[int, int, str, Case]] = []
    for name in dict.fromkeys(plan.ops) or catalogue.names():
        op = catalogue.load(name)
        if reason := catalogue.why_missing(op):
            not_run.update({name: reason} if plan.ops else {})
            continue
        for tier, word in enumerate(TIERS[: most + 1]):
            same = [case for case in op.cases(device.type) if case.tier == word]
            found += [(tier, place, name, case) for place, case in enumerate(same)]
    return [(name, case) for *_, name, case in sorted(found, key=lambda one: one[:2])]
