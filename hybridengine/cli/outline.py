"""A plan as text: which method wraps which, what a step costs, and on which kernels it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hybridengine.cli import console

if TYPE_CHECKING:
    from hybridengine.stack.plan import Phase, Plan

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
        (phase.start, _passes(phase), f"{phase.relative_cost:.2f}x", phase.sync_points, ", ".join(phase.active) or "-")
        for phase in plan.phases
    ]
    console.table(("from step", "passes", "cost", "syncs", "active methods"), rows, indent="  ")
    used = [letter for letter in PASSES if any(letter in phase.counts for phase in plan.phases)]
    console.line("  " + "; ".join(f"{letter} {PASSES[letter]}" for letter in used))
    console.line("  cost: floating-point operations relative to a plain step")
    console.line()
    console.field("steps", f"{plan.total_steps:,}, each of {plan.rows_per_step:,} rows")
    console.field("two views", "stacked into one forward pass" if plan.stack_views else "one forward pass each")
    if "parameters" in plan.memory:
        console.field("memory", _memory(plan.memory))
    if chosen := _kernels(plan.kernels):
        console.field("kernels", f"{', '.join(chosen)}; plain torch (reference) where calls are too small to gain")
    for note in plan.notes:
        console.field("note", note)
    console.line()
    console.line("members (`order:` of a method moves it, `name: {parameter: value}` changes it)", style="bold")
    for member in plan.members:
        console.field(f"  {member['name']}", f"{_parameters(member)}\n{member['cost']}", 18)


def diagram(layers: Mapping[str, list[str]]) -> list[str]:
    """The seams as an indented list, each with the methods around its base case, e.g. `gradient  sam > …`."""
    lines = []
    for depth, (seam, base) in enumerate(_BASES.items()):
        indent = "" if seam == "predict" else "  " * depth
        around = " > ".join([*layers.get(seam, []), base])
        lines.append(f"{indent + seam:<16} {around}")
    return lines


def _passes(phase: Phase) -> str:
    steps = len(phase.turns)
    return phase.passes if steps == 1 else f"in {steps} steps: {phase.passes}"


def _parameters(member: Mapping[str, Any]) -> str:
    return ", ".join([f"order {member['order']}", *(f"{name}={value}" for name, value in member["parameters"].items())])


def _kernels(rows: list[dict[str, Any]]) -> list[str]:
    return [f"{row['op']}: {row['impl']}" for row in rows if row.get("chosen", True)]


def _memory(memory: Mapping[str, Any]) -> str:
    bytes_of = {name.removesuffix("_bytes"): n for name, n in memory.items() if name.endswith("_bytes")}
    sizes = ", ".join(f"{name} {_size(n)}" for name, n in bytes_of.items())
    about = "" if memory.get("exact") else f" ({memory.get('why') or 'about'})"
    kept = ", ".join(f"{name} {copies:g}" for name, copies in (memory.get("state") or {}).items())
    return (
        f"{memory['trainable']:,} of {memory['parameters']:,} parameters are trained{about}\n"
        f"{_size(sum(bytes_of.values()))} and activations: {sizes}"
    ) + (f"\nstate, in copies of the trained parameters: {kept}" if kept else "")


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"
