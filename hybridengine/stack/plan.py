"""The dry run: the real onion on a toy model, once per phase of the schedule, before anything is loaded."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from hybridengine import kernels
from hybridengine.batches import Assembler, Sampler, bucketed, with_unlabelled
from hybridengine.config import Config
from hybridengine.plugin.calling import Hooks
from hybridengine.plugin.stacking import Method
from hybridengine.run import Run
from hybridengine.seams.base import make_works
from hybridengine.seams.onion import SEAMS
from hybridengine.seams.trace import Event, cost_of, summarise
from hybridengine.stack.compose import compose
from hybridengine.stack.toy import UNLABELLED, toy_run

__all__ = ["Phase", "Plan", "make_plan", "passes_text", "stack_views_for", "training_sampler"]

_PLAIN = 3.0  # forward 1 + backward 2
_STACK_TOKENS = 32768


@dataclass(frozen=True)
class Phase:
    """One phase of the schedule: from `start` on, each step makes these passes, or the steps of a period take turns.

    Attributes:
        active: methods that act.
        passes: of a step, or of all steps of a period in order.
        counts: how many of each kind of pass these are.
        relative_cost: of a step in the mean, a plain step being 1.
        sync_points: how often several processes would have to agree on a gradient in a step, at most.
        turns: the counts of each step of a period, the first being that of `start`; one where all steps are alike.
    """

    start: int
    active: list[str]
    passes: str
    counts: dict[str, int]
    relative_cost: float
    sync_points: int
    turns: list[dict[str, int]]

    def counts_at(self, step: int) -> dict[str, int]:
        """How many of each kind of pass a step of this phase makes."""
        return self.turns[(step - self.start) % len(self.turns)]


@dataclass
class Plan:
    """What will run: layers by seam (outermost first), passes per step, and what it costs."""

    layers: dict[str, list[str]]
    phases: list[Phase]
    rows_per_step: int
    stack_views: bool
    total_steps: int
    members: list[dict[str, Any]]
    features: bool = False  # whether a method reads hidden states
    logits: bool = False  # whether a method reads logits beyond their cross-entropy
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)  # rows and label counts of the user's data
    memory: dict[str, Any] = field(default_factory=dict)
    kernels: list[dict[str, Any]] = field(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """Methods that act in no phase, because their schedule lies beyond the last step."""
        acting = {name for phase in self.phases for name in phase.active}
        idle = [member["name"] for member in self.members if member["name"] not in acting]
        why = f"never acts: its schedule starts after the last of the {self.total_steps} steps"
        return [f"{name} {why}" for name in idle]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, `plan.json`."""
        return asdict(self)


def make_plan(
    config: Config, methods: Sequence[Method], total_steps: int, splits: Mapping[str, Mapping[str, Any]] | None = None
) -> Plan:
    """Trace one step of every phase, or one period, on the toy model; nothing of the user's is loaded or written.

    Args:
        splits: what the data card says of each split of the user's data.
    """
    copies = [copy.copy(m) for m in methods]
    for member in copies:
        member.plugin = copy.deepcopy(member.plugin)
    hooks = Hooks(copies)
    run, features = toy_run(config, *_toy_size(config, copies))
    for name in UNLABELLED:
        if name not in (splits or {}):
            run.splits.pop(name)
    run.total_steps = total_steps
    hooks.notify("on_run_start", run)
    run.freeze_parameter_sets()
    run.optimizer = torch.optim.SGD(run.may_optimise.values(), lr=0.0)
    ctx = compose(run, hooks, stack_views=stack_views_for(config))
    sampler = training_sampler(run, hooks, [f["length"] for f in features["train"]])
    assembler = Assembler(run, features)
    phases, rows, period = [], 0, _period(copies)
    draws = sampler(0)[: config.train.accumulate]
    for start, end in itertools.pairwise([*_phase_starts(copies, total_steps), max(total_steps, 1)]):
        steps = []
        for step in range(start, min(start + period, end)):
            run.step = step
            batches = [assembler.batch("train", draw, step) for draw in draws]
            rows = sum(batch.size for batch in batches)
            ctx.trace.clear()
            ctx.step(ctx, make_works(run.seed, step, batches))
            steps.append(list(ctx.trace.events))
        phases.append(_phase(start, copies, steps, rows))
    members = [_member(m) for m in hooks.methods]
    plan = Plan(
        _layers(hooks), phases, rows, ctx.stack_views, total_steps, members, ctx.trace.features, ctx.trace.logits
    )
    plan.splits = {k: {"rows": split["rows"], "labels": split["labels"]} for k, split in (splits or {}).items()}
    plan.kernels = [row._asdict() for row in kernels.explain()]
    return plan


def training_sampler(run: Run, hooks: Hooks, lengths: Sequence[int]) -> Sampler:
    """The sampler of the training split: a method's own, or length buckets, with unlabelled rows where asked for."""
    sampler: Sampler | None = hooks.build("build_sampler", run, "train")
    if sampler is None:
        sampler = bucketed(lengths, run.config.train.batch_size, run.seed)
    if "unlabelled" in run.splits:
        count, found = len(run.splits["unlabelled"]), [name for name in UNLABELLED if name in run.splits]
        sampler = with_unlabelled(sampler, count, run.config.train.batch_size, run.seed, found)
    return sampler


def stack_views_for(config: Config) -> bool:
    """Whether several views of one batch may run as one stacked forward: a function of the configuration alone.

    Stacking has the same FLOPs with half the launches and larger matrix products, but twice the activations.
    """
    return config.train.batch_size * config.train.max_length <= _STACK_TOKENS


def _toy_size(config: Config, methods: Sequence[Method]) -> tuple[int, int]:
    """Classes and rows per class that any sampler of the stack can be served from."""
    numbers = [{k: v for k, v in m.parameters.items() if isinstance(v, int)} for m in methods]
    classes = max([8, *(n.get("ways", 0) for n in numbers)])
    per_class = max([8, *(n.get("shots", 0) + n.get("queries", 0) for n in numbers)])
    wanted = config.train.batch_size * config.train.accumulate
    return classes, max(per_class, -(-wanted // classes))


def _phase_starts(methods: Sequence[Method], total_steps: int) -> list[int]:
    scheduled = [m for m in methods if hasattr(m.plugin, "active")]
    phased = [m.plugin for m in methods if hasattr(m.plugin, "phase")]
    starts, before = [], None
    for step in range(max(total_steps, 1)):
        now = (*(m.active(step) for m in scheduled), *(plugin.phase(step) for plugin in phased))
        if now != before:
            starts.append(step)
            before = now
        if not scheduled and not phased:
            break
    return starts


def _period(methods: Sequence[Method]) -> int:
    """After how many steps the passes of all methods repeat."""
    return math.lcm(*(getattr(m.plugin, "period", 1) for m in methods))


def _phase(start: int, methods: Sequence[Method], steps: Sequence[Sequence[Event]], rows: int) -> Phase:
    """The phase whose period makes these steps."""
    events, turns = [event for step in steps for event in step], [summarise(step) for step in steps]
    relative = sum(cost_of(step, rows) for step in steps) / len(steps) / _PLAIN
    active = [m.name for m in methods if m.active(start)]
    syncs = max(map(_sync_points, turns))
    return Phase(start, active, passes_text(events), summarise(events), round(relative, 3), syncs, turns)


def _sync_points(counts: Mapping[str, int]) -> int:
    """How often several processes would have to agree on a gradient: once a step, and once more per weight move."""
    return max(counts.get("B", 0), counts.get("W", 0) + 1)


def passes_text(events: Sequence[Event]) -> str:
    """Passes in order, a repeated tail written once: `(F32 b32) x3 F32 B S`."""
    words = [str(event) for event in events]
    out: list[str] = []
    index = 0
    while index < len(words):
        best = (1, 1)
        for size in range(1, min(24, len(words) - index) + 1):
            unit = words[index : index + size]
            times = 1
            while words[index + times * size : index + (times + 1) * size] == unit:
                times += 1
            if times > 2 and times * size > best[0] * best[1]:
                best = (size, times)
        size, times = best
        text = " ".join(words[index : index + size])
        out.append(text if times == 1 else f"({text}) x{times}")
        index += size * times
    return " ".join(out)


def _layers(hooks: Hooks) -> dict[str, list[str]]:
    found = {}
    for seam in reversed(SEAMS):
        names = [method.name for method, _ in hooks.implementations(f"wrap_{seam}")]
        if names:
            found[seam] = names[::-1]
    return found


def _member(method: Method) -> dict[str, Any]:
    return {
        "name": method.name,
        "order": method.order,
        "parameters": method.described,
        "cost": method.traits.cost,
        "distribution": method.distribution,
        "version": method.version,
    }
