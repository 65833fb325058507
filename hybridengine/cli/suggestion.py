"""A suggested stack as text that can be put into a config, and as JSON."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from hybridengine.cli import console

if TYPE_CHECKING:
    from hybridengine.suggest import Entry, Suggestion

__all__ = ["show_suggestion", "suggestion_dict"]

_WIDTH = 100


def show_suggestion(suggestion: Suggestion) -> None:
    """Print the stack as YAML with the reasons as comments, what it costs, and what was left out."""
    why = {_text(proposal.entry): proposal.why for proposal in suggestion.kept}
    console.line("methods:" if suggestion.methods else "methods: []  # nothing to add within the budget")
    for entry in suggestion.methods:
        for line in textwrap.wrap(why.get(_text(entry), "your own"), _WIDTH):
            console.line(f"  # {line}")
        console.line(f"  - {_text(entry)}")
    console.line()
    for proposal in suggestion.left_out:
        console.field("left out", f"{_text(proposal.entry)}: {proposal.why}")
    console.field("cost", f"{_cost(suggestion):.2f}x a plain step at most; {suggestion.plan.total_steps:,} steps")
    console.line(
        "These are rules of thumb. Compare with the plain run on your validation rows before you believe them."
    )


def suggestion_dict(suggestion: Suggestion) -> dict[str, Any]:
    """JSON-able form."""
    return {
        "methods": suggestion.methods,
        "kept": [proposal._asdict() for proposal in suggestion.kept],
        "left_out": [proposal._asdict() for proposal in suggestion.left_out],
        "relative_cost": _cost(suggestion),
    }


def _cost(suggestion: Suggestion) -> float:
    return max(phase.relative_cost for phase in suggestion.plan.phases)


def _text(entry: Entry) -> str:
    if isinstance(entry, str):
        return entry
    import yaml  # as all of the heavier libraries, only when needed

    return str(yaml.safe_dump(entry, default_flow_style=True, width=1000, allow_unicode=True)).strip()[1:-1]
