"""A plan as text: which method wraps which, what a step costs, and on which kernels it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hybridengine.cli import console

if TYPE_CHECKING:
    from hybridengine.stack.plan import Plan

__all__ = ["diagram", "show_plan"]

_BASES = {
    "step": "the optimizer moves the parameters",
    "gradient": "the gradient is summed over micro-batches, clipped once",
    "backward": "backward pass of one micro-batch",
    "loss": "loss of the task",
    "predict": "evaluation",
}


def show_plan(plan: Plan) -> None:
    """Print the whole plan."""
    from hybridengine.report.words import PASSES

    console.line("one training step, outermost first", style="bold")
    for text in diagram(plan.layers):
        console.line("  " + text)
    console.line()
    console.line("passes per step (letters with the rows they run on)", style="bold")
    rows = [
        (phase.start, phase.passes, f"{phase.relative_cost:.2f}x", phase.sync_points, ", ".join(phase.active) or "-")
        for phase in plan.phases
    ]
    console.table(("from step", "passes", "cost", "syncs", "active methods"), rows, indent="  ")
    used = [letter for letter in PASSES if any(letter in phase.counts for phase in plan.phases)]
    console.line("  " + "; ".join(f"{letter} {PASSES[letter]}" for letter in used))
    console.line("  cost: floating-point operations relative to a plain step")
    console.line()
    console.field("steps", f"{plan.total_steps:,} of {plan.rows_per_step:,} rows each")
    console.field("two views", "stacked into one forward pass" if plan.stack_views else "one forward pass each")
    for name, value in plan.memory.items():
        console.field(name.replace("_", " "), _amount(name, value), 18)
    if chosen := _kernels(plan.kernels):
        console.field("kernels", ", ".join(chosen))
    console.line()
    console.line("members (set `order:` of a method to move it, `name: {parameter: value}` to change it)", style="bold")
    members = [(m["name"], m["order"], m["cost"], _parameters(m["parameters"])) for m in plan.members]
    console.table(("name", "order", "cost", "parameters"), members, indent="  ")


def diagram(layers: Mapping[str, list[str]]) -> list[str]:
    """The seams as an indented list, each with the methods around its base case, e.g. `gradient  sam > …`."""
    lines = []
    for depth, (seam, base) in enumerate(_BASES.items()):
        indent = "" if seam == "predict" else "  " * depth
        around = " > ".join([*layers.get(seam, []), base])
        lines.append(f"{indent + seam:<16} {around}")
    return lines


def _parameters(parameters: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in parameters.items()) or "-"


def _kernels(rows: list[dict[str, Any]]) -> list[str]:
    return [f"{row['op']}: {row['impl']}" for row in rows if row.get("chosen", True) and "op" in row and "impl" in row]


def _amount(name: str, value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value / 2**20:,.0f} MiB" if name.endswith("bytes") else f"{value:,}"
    return str(value)
