"""The stack as planned and as it acted: layers, phases, methods, kernels."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from hybridengine.report.read import RunFolder, integer, mapping, number, sequence, text
from hybridengine.report.words import PASSES, compact, describe_effect

__all__ = [
    "Effect",
    "Layer",
    "MethodRow",
    "PhaseRow",
    "kernel_rows",
    "layers",
    "method_rows",
    "outside",
    "phase_rows",
    "used_passes",
]

_SEAMS = {
    "step": "one optimizer step: the parameters have moved",
    "gradient": "the gradient of this step is complete",
    "backward": "one batch has added its gradient",
    "loss": "the loss of one batch",
}
_PREDICT = "the answer for one batch, when evaluating"
_BASES = {
    "step": "clip, optimizer, schedule",
    "gradient": "sum over micro-batches",
    "backward": "backward pass",
    "loss": "forward pass and task loss",
    "predict": "forward pass",
}
_PASS = re.compile(r"\(|\)(?: x(\d+))?|([A-Za-z])(\d*)")


@dataclass(frozen=True)
class Layer:
    """One seam: what it means, the methods around it from the outside in, and what lies at its heart."""

    seam: str
    meaning: str
    methods: list[str]
    base: str


@dataclass(frozen=True)
class Chip:
    """One pass, or an opening or closing bracket of a repeated group."""

    kind: str
    rows: str = ""
    meaning: str = ""


@dataclass(frozen=True)
class PhaseRow:
    """One phase of the schedule, its steps counted from 1.

    `share` is its part of all steps, in percent; `passes` are those of `period` steps.
    """

    start: int
    end: int | None
    active: str
    passes: str
    chips: list[Chip]
    cost: float | None
    sync_points: str
    share: float
    period: int


@dataclass(frozen=True)
class Effect:
    """One effect in numbers and words."""

    name: str
    meaning: str
    mean: str
    last: str
    count: str


@dataclass(frozen=True)
class MethodRow:
    """One method: its parameters, where it comes from, what it costs and what it did."""

    name: str
    parameters: str
    origin: str
    cost: str
    effects: list[Effect]
    acted: str


def layers(run: RunFolder) -> tuple[list[Layer], Layer | None]:
    """The nested training seams from the outside in, and the evaluation seam where a method wraps it."""
    found = mapping(run.plan.get("layers"))
    if not run.plan:
        return [], None
    nested = [Layer(s, meaning, _names(found.get(s)), _BASES[s]) for s, meaning in _SEAMS.items()]
    predict = _names(found.get("predict"))
    return nested, Layer("predict", _PREDICT, predict, _BASES["predict"]) if predict else None


def outside(run: RunFolder) -> list[str]:
    """Members that wrap no seam: they shape data, model, outputs or optimizer instead."""
    wrapping = {name for names in mapping(run.plan.get("layers")).values() for name in _names(names)}
    names = [text(mapping(member).get("name")) for member in sequence(run.plan.get("members"))]
    return [name for name in names if name and name not in wrapping]


def _names(value: Any) -> list[str]:
    return [text(name) for name in sequence(value)]


def phase_rows(run: RunFolder) -> list[PhaseRow]:
    """The phases of the schedule with their passes."""
    phases = [phase for phase in map(mapping, sequence(run.plan.get("phases"))) if phase]
    total = integer(run.plan.get("total_steps"))
    starts = [integer(phase.get("start")) or 0 for phase in phases]
    rows = []
    for index, (start, phase) in enumerate(zip(starts, phases, strict=True)):
        end = starts[index + 1] if index + 1 < len(starts) else total
        share = 100 * min(1.0, max(0, end - start) / total) if total and total > 0 and end is not None else 0.0
        passes = text(phase.get("passes"))
        rows.append(
            PhaseRow(
                start + 1,
                end,
                text(phase.get("active")) or "no method",
                passes,
                _chips(passes),
                number(phase.get("relative_cost")),
                text(phase.get("sync_points")),
                round(share, 2),
                len(sequence(phase.get("turns"))) or 1,
            )
        )
    return rows


def _chips(passes: str) -> list[Chip]:
    """`(F32 b32) x3 B S` taken apart; nothing where it is written in another way."""
    chips: list[Chip] = []
    for word in _PASS.finditer(passes):
        if word[2]:
            chips.append(Chip(word[2], word[3], PASSES.get(word[2], "pass")))
        else:
            chips.append(Chip("(") if word[0] == "(" else Chip(")", word[1] or ""))
    return chips if not _PASS.sub("", passes).strip() else []


def used_passes(phases: list[PhaseRow]) -> list[Chip]:
    """The legend: each kind of pass that occurs."""
    kinds = {chip.kind for phase in phases for chip in phase.chips}
    return [Chip(kind, "", meaning) for kind, meaning in PASSES.items() if kind in kinds]


def method_rows(run: RunFolder) -> list[MethodRow]:
    """Members of the stack as planned, then methods that only reported effects."""
    reported = {name: mapping(effects) for name, effects in mapping(run.summary.get("methods")).items()}
    members = [member for member in map(mapping, sequence(run.plan.get("members"))) if member]
    known = {text(member.get("name")) for member in members}
    members += [{"name": name} for name in reported if name not in known]
    return [_method_row(member, reported.get(text(member.get("name")), {})) for member in members]


def _method_row(member: dict[str, Any], reported: dict[str, Any]) -> MethodRow:
    effects, amounts = [], []
    for name, numbers in reported.items():
        numbers = mapping(numbers)
        mean, last, count = (number(numbers.get(key)) for key in ("mean", "last", "count"))
        amounts += [abs(value) for value in (mean, last) if value is not None]
        effects.append(Effect(name, describe_effect(name), compact(mean), compact(last), compact(count)))
    acted = "" if not amounts else "acted" if max(amounts) > 0 else "no effect"
    parameters = ", ".join(f"{k} {text(v)}" for k, v in mapping(member.get("parameters")).items() if v is not None)
    origin = " ".join(filter(None, (text(member.get("distribution")), text(member.get("version")))))
    return MethodRow(text(member.get("name")), parameters, origin, text(member.get("cost")), effects, acted)


def kernel_rows(run: RunFolder) -> list[tuple[str, str, str, str, bool]]:
    """Operation, implementation, state in words, how often it ran, and whether it is the default."""
    ran = {op: mapping(counts) for op, counts in mapping(run.summary.get("kernels")).items()}
    rows, seen = [], set()
    for row in map(mapping, sequence(run.plan.get("kernels"))):
        op, impl = text(row.get("op")), text(row.get("impl"))
        count = number(ran.get(op, {}).get(impl))
        state = "available" if row.get("available") else text(row.get("reason")) or "not available"
        rows.append((op, impl, state, "" if count is None else f"{count:,.0f}", bool(row.get("chosen"))))
        seen.add((op, impl))
    for op, counts in ran.items():
        rows += [(op, i, "", compact(number(n)), False) for i, n in counts.items() if (op, i) not in seen]
    return rows
