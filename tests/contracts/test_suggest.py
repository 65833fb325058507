"""`suggest`: what it proposes plans within the budget, trains, and follows from rows, labels, memory, own methods."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from stack_checks import config_of
from stack_draws import GROUNDS
from tiny_runs import text_rows

import hybridengine.suggest
from hybridengine.cli.main import app
from hybridengine.engine import Engine
from hybridengine.errors import ConfigError
from hybridengine.suggest import Suggestion, suggest


def names(suggestion: Suggestion) -> list[str]:
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in suggestion.methods]


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    return config_of(GROUNDS[0], [], tmp_path / "run", max_steps=20)


def test_few_rows_get_a_probe_and_regularisation_and_the_stack_trains(config: dict[str, Any], tmp_path: Path) -> None:
    suggestion = suggest(config)
    assert names(suggestion) == ["linear", "lp-ft", "rdrop", "llrd"]
    assert {"lp-ft": {"steps": 6}} in suggestion.methods  # 0.3 of 20
    assert not (tmp_path / "run").exists()
    assert Engine({**config, "methods": copy.deepcopy(suggestion.methods)}).train()["status"] == "finished"


@pytest.mark.parametrize(("budget", "kept"), [(1.0, {"linear"}), (2.0, {"linear", "rdrop"}), (4.0, {"rdrop", "fgm"})])
def test_the_budget_holds(config: dict[str, Any], budget: float, kept: set[str]) -> None:
    suggestion = suggest(config, budget=budget)
    assert kept <= set(names(suggestion))
    assert max(phase.relative_cost for phase in suggestion.plan.phases) <= budget
    refused = {next(iter(p.entry)) if isinstance(p.entry, dict) else p.entry: p.why for p in suggestion.left_out}
    assert all("plain ones, the budget is" in why for why in refused.values())
    assert set(refused) == {"rdrop", "fgm"} - set(names(suggestion))


def test_own_methods_stay_and_what_they_exclude_is_left_out_with_the_reason(config: dict[str, Any]) -> None:
    suggestion = suggest({**config, "methods": ["pgd", "cosine"]}, budget=100)
    assert names(suggestion)[:2] == ["pgd", "cosine"] and "linear" not in names(suggestion)
    assert ["embedding_attack" in p.why for p in suggestion.left_out if p.entry == "fgm"] == [True]


def test_little_memory_speaks_for_adapters(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hybridengine.suggest, "available", lambda device: 1000)
    assert names(suggest(config))[0] == "lora"
    assert "lora" not in names(suggest({**config, "methods": ["bitfit"]}))


def test_uneven_labels_get_weights_where_the_metric_counts_labels_alike(config: dict[str, Any], tmp_path: Path) -> None:
    rows = [row for i, row in enumerate(text_rows()) if row["label"] != "poor" or i < 12]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    uneven = {**config, "data": {**config["data"], "train": str(tmp_path / "train.jsonl")}}
    assert "class-weights" not in names(suggest(uneven))
    assert "class-weights" in names(suggest({**uneven, "evaluate": {"metric": "f1_macro"}}))
    assert "class-weights" not in names(suggest({**config, "evaluate": {"metric": "f1_macro"}}))


def test_stages_are_refused_with_the_way_out(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="remove `stages`"):
        suggest({**config, "stages": [{"output": "a"}]})


def test_on_the_command_line_it_is_yaml_that_can_be_used(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    assert app(["plan", str(path), "--suggest"], standalone_mode=False) in (None, 0)
    text = capsys.readouterr().out
    assert yaml.safe_load(text.partition("\n\n")[0]) == {"methods": suggest(config).methods}
    assert "left out     fgm: " in text and "2.00x a plain step" in text
    app(["plan", str(path), "--suggest", "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["methods"] == suggest(config).methods
