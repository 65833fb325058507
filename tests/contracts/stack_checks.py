"""What every stack of shipped methods must do: train with all promises of its members, or be refused with a way out."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import hypothesis
from stack_draws import PARAMETERS, Ground, Probe, partners, traits_of, without_words
from tiny_runs import run_config

import hybridengine
from hybridengine.engine import Engine
from hybridengine.errors import HybridEngineError

STEPS = 3
_WAYS_OUT = ("remove ", "Remove ", "use ", "add ", "set ", "give ", "choose ", "lower ", "name it", "Valid names")


def typical(name: str, ground: Ground) -> dict[str, Any]:
    """A method with the first of its drawn parameters."""
    return {name: hypothesis.find(PARAMETERS[name](ground), lambda value: True)}


def complete(names: Iterable[str], ground: Ground) -> list[dict[str, Any]]:
    """These methods with typical parameters, and what they need beside them."""
    wanted = list(names)
    return without_words([typical(name, ground) for name in [*wanted, *partners(wanted)]])


def refusal(engine: Engine, methods: list[dict[str, Any]]) -> str | None:
    """The refusal of a stack, checked to name a member and a way out; None where it may train."""
    try:
        engine.validate()
    except HybridEngineError as error:
        lines = str(error).splitlines()
        names = [next(iter(method)) for method in methods]
        for line in lines:
            assert any(name in line for name in names), f"{line!r} names none of {names}"
            assert any(way in line for way in _WAYS_OUT), f"{line!r} shows no way out"
        assert not engine.folder.exists(), "a refusal wrote something"
        return str(error)
    return None


def planned(engine: Engine, step: int) -> dict[str, int]:
    """The passes that the plan promises for a step."""
    return [phase for phase in engine.plan().phases if phase.start <= step][-1].counts_at(step)


def config_of(ground: Ground, methods: list[dict[str, Any]], output: Path, **train: Any) -> dict[str, Any]:
    task: Any = {"summarization": {"max_new_tokens": 4}} if ground.task == "summarization" else ground.task
    options = {"max_steps": STEPS, "evaluate_every": 2, **train}
    unlabelled = any("unlabelled" in traits_of(next(iter(method))).requires for method in methods)
    return run_config(methods, output, model=ground.model(), task=task, unlabelled=unlabelled, **options)


def check(ground: Ground, methods: list[dict[str, Any]], output: Path, **train: Any) -> str | None:
    """Train a stack and check what every run promises; returns the refusal, if it was refused."""
    probe = Probe()
    engine = Engine(config_of(ground, methods, output, **train), methods=[probe])
    if (refused := refusal(engine, methods)) is not None:
        return refused
    summary = engine.train()
    steps = train.get("max_steps", STEPS)
    assert summary["status"] == "finished" and summary["steps"] == steps
    assert probe.problems == []
    assert probe.moved, "no weight of the model moved"
    assert probe.passes == [planned(engine, step) for step in range(steps)]
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(math.isfinite(line["loss"]) for line in lines if line["kind"] == "train")
    for method in methods:
        name = next(iter(method))
        if effect := traits_of(name).effect:
            assert summary["methods"][name][effect]["mean"] > 0, f"{name} reports no {effect}"
    row = {"tokens": ["mary", "visited"]} if ground.task == "token-classification" else "the movie was good"
    assert len(hybridengine.load(output, methods=[Probe()]).predict([row, row])) == 2
    return None
