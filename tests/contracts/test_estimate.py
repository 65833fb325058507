"""The memory estimate: it prices what the methods keep, says when it cannot know, and leaves no trace in the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_runs import run_config

from hybridengine.cli.outline import show_plan
from hybridengine.engine import Engine
from hybridengine.plugin import Traits


def memory_of(methods: list[Any], output: Path) -> dict[str, Any]:
    return Engine(run_config(methods, output)).plan().memory


def test_state_is_the_sum_of_what_the_methods_keep(tmp_path: Path) -> None:
    plain = memory_of([], tmp_path)
    assert plain["exact"] and plain["state"] == {"adamw": 2}
    assert plain["state_bytes"] == 2 * 4 * plain["trainable"]
    assert memory_of(["ema"], tmp_path)["state_bytes"] == 3 * 4 * plain["trainable"]
    both = memory_of(["ema", "sam"], tmp_path)
    assert both["state"] == {"adamw": 2, "ema": 1, "sam": 1}
    assert both["state_bytes"] == 4 * 4 * plain["trainable"]


def test_lora_asks_which_heads_are_new_and_the_real_run_hears_nothing_of_the_trial(tmp_path: Path) -> None:
    engine = Engine(run_config(["lora"], tmp_path))
    memory = engine.plan().memory
    assert not memory["exact"] and memory["why"] == "more where the checkpoint lacks a head"
    assert not [note for note in engine._run.notes if note.startswith("lora")]
    engine.adapt()
    assert len([note for note in engine._run.notes if note.startswith("lora")]) == 1
    named = memory_of([{"lora": {"heads": ["classifier"]}}], tmp_path)
    assert named["exact"] and named["trainable"] < named["parameters"]


def test_plan_shows_state_and_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_plan(Engine(run_config(["ema"], tmp_path)).plan())
    shown = " ".join(capsys.readouterr().out.split())
    assert "state, in copies of the trained parameters: ema 1, adamw 2" in shown
    assert "and activations: weights" in shown


def test_a_negative_state_is_refused() -> None:
    with pytest.raises(TypeError, match="0 or more"):
        Traits(state=-1)
