"""What to add to a stack: rules of thumb from rows, model, memory and budget, kept only where the plan allows it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hybridengine.bench.memory import available
from hybridengine.config import load_config, split_entry
from hybridengine.engine import Engine
from hybridengine.errors import ConfigError, StackError
from hybridengine.model import choose_device
from hybridengine.stack import Plan

__all__ = ["Proposal", "Suggestion", "suggest"]

Entry = str | dict[str, dict[str, Any] | None]

_FEW, _SOME, _MANY = 200, 2_000, 10_000  # training rows
_UNEVEN = 3  # times as many rows of the most frequent label as of the rarest
_ROOM = 0.8  # of the free memory, which activations share


class Proposal(NamedTuple):
    """A method with its parameters, and why."""

    entry: Entry
    why: str


class Suggestion(NamedTuple):
    """A stack that plans within the budget."""

    kept: list[Proposal]  # to add to the config's own methods
    left_out: list[Proposal]  # sensible, but refused or over the budget: `why` says which
    methods: list[Entry]  # the whole stack
    plan: Plan


def suggest(config: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), budget: float = 2.5) -> Suggestion:
    """Propose methods for a config's task, rows and model; trains and writes nothing.

    These are rules of thumb (few rows: probe first, regularise; no room: adapters). Every proposal is planned with
    those kept before it, in order of priority, and left out where the stack is refused or a step would cost
    more than the budget.

    Args:
        config: path of a YAML file, or a mapping; its own methods stay.
        overrides: as the command line takes them, e.g. `["train.epochs=2"]`.
        budget: what a step may cost, in plain steps.

    Raises:
        ConfigError: what is wrong with the config, or one with stages, each of which wants a stack of its own.
    """
    loaded, _ = load_config(config, overrides)
    if loaded.stages:
        raise ConfigError(
            "suggest: a config with `stages` has several stacks; remove `stages` and ask for each by itself"
        )
    values = loaded.model_dump()
    methods: list[Entry] = list(values["methods"])
    plan = Engine(values).plan()
    kept, left_out = [], []
    for proposal in _proposals(plan, values):
        name, _ = split_entry(proposal.entry)
        if any(split_entry(entry)[0] == name for entry in methods):
            continue
        tried, reason = _planned({**values, "methods": [*methods, proposal.entry]}, budget)
        if tried is None:
            left_out.append(Proposal(proposal.entry, f"{proposal.why}; but {reason}"))
            continue
        plan = tried
        methods.append(proposal.entry)
        kept.append(proposal)
    return Suggestion(kept, left_out, methods, plan)


def _planned(values: dict[str, Any], budget: float) -> tuple[Plan | None, str]:
    try:
        plan = Engine(copy.deepcopy(values)).plan()
    except (StackError, ConfigError) as error:
        return None, str(error).splitlines()[0]
    cost = max(phase.relative_cost for phase in plan.phases)
    if cost > budget:
        return None, f"a step would cost {cost:.2f} plain ones, the budget is {budget:g}"
    return plan, ""


def _proposals(plan: Plan, values: Mapping[str, Any]) -> Iterator[Proposal]:
    """In order of priority."""
    rows, labels = plan.splits["train"]["rows"], plan.splits["train"]["labels"]
    names = {member["name"] for member in plan.members}
    whole = plan.memory.get("trainable", 0) == plan.memory.get("parameters", 1)
    if whole and (needed := _bytes(plan)) > _ROOM * (free := available(choose_device(values["train"]["device"]))):
        yield Proposal(
            {"lora": {"r": 8}},
            f"weights, gradients and optimizer want {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free; adapters"
            " leave the weights alone",
        )
    if not names & {"constant", "cosine", "wsd"}:
        yield Proposal(
            {"linear": {"warmup": 0.1}}, "warm-up keeps the first steps of a new head from wrecking the model"
        )
    if labels and rows <= _FEW and plan.total_steps >= 10:
        steps = max(1, round(0.3 * plan.total_steps))
        yield Proposal(
            {"lp-ft": {"steps": steps}}, f"{rows:,} rows: a new head learns first, then the model moves less"
        )
    if (
        labels
        and "macro" in str(values["evaluate"]["metric"])
        and max(labels.values()) >= _UNEVEN * min(labels.values())
    ):
        why = f"the rarest label has {min(labels.values()):,} rows, the most frequent {max(labels.values()):,}, and"
        yield Proposal("class-weights", f"{why} a macro average counts them alike")
    if rows <= _MANY:
        yield Proposal("rdrop", f"{rows:,} rows: two dropout passes that must agree regularise")
    if whole and rows <= _SOME:
        yield Proposal({"llrd": {"decay": 0.9}}, f"{rows:,} rows: lower layers, which know the language, move less")
    if plan.total_steps >= 100:
        yield Proposal("ema", "an average of the weights is free at each step and steadier than the last one")
    yield Proposal("fgm", "training on the worst small change of the embeddings, for one more pass")


def _bytes(plan: Plan) -> int:
    return sum(count for name, count in plan.memory.items() if name.endswith("_bytes"))
