"""Runs in stages: method objects reach every stage, and plan and evaluation mean the stages, not the common part."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tiny_runs import StopAfter, run_config, text_rows
from typer.testing import CliRunner

from hybridengine.cli.main import app
from hybridengine.engine import Engine
from hybridengine.errors import ConfigError, OutputError, Stopped
from hybridengine.plugin import Run, Traits, hook


@dataclass(eq=False)
class Counting:
    """Remembers in itself how often it was told of a step."""

    name: ClassVar[str] = "counting"
    traits: ClassVar[Traits] = Traits()

    @hook
    def on_step_end(self, run: Run, metrics: Mapping[str, float]) -> None:
        self.told = getattr(self, "told", 0) + 1
        assert self.told <= run.config.train.max_steps, "the object of another stage"


def config_of(output: Path, *stages: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**run_config([], output, max_steps=2), "stages": list(stages), **changes}


def test_method_objects_join_every_stage_and_a_fresh_copy_each(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", {"methods": [{"lora": {"r": 2}}]}, {"train": {"lr": 1e-3}})
    method = Counting()
    summary = Engine(config, methods=[method]).train()
    assert [sorted({"counting", "lora"} & stage["methods"].keys()) for stage in summary["stages"]] == [
        ["counting", "lora"],
        ["counting"],
    ]
    assert (tmp_path / "run" / "stage-1" / "merged" / "model.safetensors").is_file()  # built again with the object
    assert not hasattr(method, "told")
    again = Engine(config, methods=[Counting()]).train()
    assert again["metrics"] == summary["metrics"]


def test_evaluation_repeats_the_last_stage_and_overrides_come_first(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in text_rows(24)), encoding="utf-8")
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in text_rows(8)), encoding="utf-8")
    second = {"data": {"train": str(rows), "validation": None, "carve": {"validation": 0.25, "test": 0.25}}}
    config = config_of(tmp_path / "run", {}, second)
    engine = Engine(config)
    summary = engine.train()
    measured = engine.evaluate()
    assert measured.keys() == summary["metrics"].keys() == {"validation", "test"}
    for split, metrics in measured.items():
        assert metrics["rows"] == summary["metrics"][split]["rows"]
        assert metrics["accuracy"] == summary["metrics"][split]["accuracy"]
    assert Engine(config, [f"data.test={other}"]).evaluate()["test"]["rows"] == 8


def test_every_stage_is_planned(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", {"methods": [{"ema": {}}]}, {"methods": ["rdrop"], "train": {"max_steps": 7}})
    plans = Engine(config).plans()
    assert [plan.total_steps for plan in plans] == [2, 7]
    assert ["ema" in {m["name"] for m in plan.members} for plan in plans] == [True, False]
    assert Engine(config).plan().total_steps == 7
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")
    told = json.loads(CliRunner().invoke(app, ["plan", str(path), "--json"]).stdout)
    assert [stage["total_steps"] for stage in told["stages"]] == [2, 7]
    shown = CliRunner().invoke(app, ["plan", str(path)]).stdout
    assert "stage 1 of 2" in shown and "stage 2 of 2" in shown and shown.index("ema") < shown.index("rdrop")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_path_for_all_stages_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"resume: the checkpoint .* belongs to one run, but `stages` makes 2"):
        Engine(config_of(tmp_path / "run", {}, {}, resume=str(tmp_path)))


def test_stages_that_were_stopped_go_on_and_finished_ones_notice_other_rows(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in text_rows(24)), encoding="utf-8")
    config = config_of(tmp_path / "run", {}, {"data": {"train": str(rows)}})
    with pytest.raises(Stopped):
        Engine(config, cancel=StopAfter(1)).train()
    assert Engine(config).train()["steps"] == 2
    rows.write_text("".join(json.dumps(row) + "\n" for row in text_rows(28)), encoding="utf-8")
    with pytest.raises(OutputError, match=r"stage-2 holds a run on other data.*: train"):
        Engine(config).train()
