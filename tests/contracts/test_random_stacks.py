"""Any stack of shipped methods trains with all invariants of its members, or is refused with names and a way out."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from stack_draws import GROUNDS, PARAMETERS, Ground, Probe, stacks
from tiny_runs import StopAfter, run_config

import hybridengine
from hybridengine.engine import Engine
from hybridengine.errors import HybridEngineError, Stopped
from hybridengine.plugin import Catalogue, Traits

STEPS = 3
_DRAWS = {
    "database": None,
    "derandomize": True,
    "deadline": None,
    "phases": [Phase.generate],
    "suppress_health_check": list(HealthCheck),
}
_WAYS_OUT = ("remove ", "Remove ", "use ", "add ", "set ", "give ", "choose ", "lower ", "name it", "Valid names")


def traits_of(name: str) -> Traits:
    found = getattr(Catalogue().find(name).load(), "traits", Traits())
    assert isinstance(found, Traits)
    return found


METHODS = sorted(name for name in Catalogue().names() if traits_of(name).kind == "method")


def test_every_shipped_method_is_drawn() -> None:
    shipped = {x.name for x in Catalogue().all() if x.distribution == "hybridengine"}
    assert set(PARAMETERS) == {name for name in METHODS if name in shipped}


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
    return [phase for phase in engine.plan().phases if phase.start <= step][-1].counts


def config_of(ground: Ground, methods: list[dict[str, Any]], output: Path, **train: Any) -> dict[str, Any]:
    task: Any = {"summarization": {"max_new_tokens": 4}} if ground.task == "summarization" else ground.task
    options = {"max_steps": STEPS, "evaluate_every": 2, **train}
    return run_config(methods, output, model=ground.model(), task=task, **options)


def check(ground: Ground, methods: list[dict[str, Any]], output: Path, **train: Any) -> str | None:
    """Train a stack and check what every run promises; returns the refusal, if it was refused."""
    probe = Probe()
    engine = Engine(config_of(ground, methods, output, **train), methods=[probe])
    if (refused := refusal(engine, methods)) is not None:
        return refused
    summary = engine.train()
    assert summary["status"] == "finished" and summary["steps"] == STEPS
    assert probe.problems == []
    assert probe.moved, "no weight of the model moved"
    assert probe.passes == [planned(engine, step) for step in range(STEPS)]
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(math.isfinite(line["loss"]) for line in lines if line["kind"] == "train")
    for method in methods:
        name = next(iter(method))
        if effect := traits_of(name).effect:
            assert summary["methods"][name][effect]["mean"] > 0, f"{name} reports no {effect}"
    row = {"tokens": ["mary", "visited"]} if ground.task == "token-classification" else "the movie was good"
    assert len(hybridengine.load(output, methods=[Probe()]).predict([row, row])) == 2
    return None


def drawn(stack: tuple[Ground, list[dict[str, Any]], dict[str, Any]], refused: list[bool]) -> None:
    ground, methods, train = stack
    folder = Path(tempfile.mkdtemp(prefix="hybridengine-stack-"))
    try:
        refused.append(check(ground, methods, folder / "run", **train) is not None)
    except Exception as error:
        error.add_note(f"{ground}: {methods}, {train}")
        raise
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("ground", GROUNDS, ids=str)
def test_the_bare_ground_trains(ground: Ground, tmp_path: Path) -> None:
    assert check(ground, [], tmp_path / "run") is None


def test_random_stacks_train_or_are_refused() -> None:
    refused: list[bool] = []

    @settings(max_examples=30, **_DRAWS)
    @given(stacks())
    def run(stack: tuple[Ground, list[dict[str, Any]], dict[str, Any]]) -> None:
        drawn(stack, refused)

    run()
    assert 0 < sum(refused) < len(refused)


@pytest.mark.slow
def test_many_random_stacks_train_or_are_refused() -> None:
    refused: list[bool] = []

    @settings(max_examples=220, **_DRAWS)
    @given(stacks())
    def run(stack: tuple[Ground, list[dict[str, Any]], dict[str, Any]]) -> None:
        drawn(stack, refused)

    run()
    assert len(refused) >= 200 and 40 < sum(refused) < len(refused) - 40


def typical(name: str, ground: Ground) -> dict[str, Any]:
    """A method with the first of its drawn parameters."""
    import hypothesis

    return {name: hypothesis.find(PARAMETERS[name](ground), lambda value: True)}


@pytest.mark.slow
@pytest.mark.parametrize("first", sorted(PARAMETERS))
def test_every_pair_is_refused_or_makes_the_planned_passes(first: str, tmp_path: Path) -> None:
    ground = GROUNDS[0]
    for second in sorted(PARAMETERS)[sorted(PARAMETERS).index(first) + 1 :]:
        methods = [typical(first, ground), typical(second, ground)]
        if {"maml", "reptile"} & {first, second} and "episodes" not in (first, second):
            methods.append(typical("episodes", ground))
        output = tmp_path / second
        probe = Probe()
        engine = Engine(config_of(ground, methods, output), methods=[probe], cancel=StopAfter(2))
        if refusal(engine, methods) is None:
            with pytest.raises(Stopped):
                engine.train()
            assert probe.problems == [], second
            assert probe.passes == [planned(engine, step) for step in range(2)], second
