"""A preset is the methods that it lists: added to the config's own, recorded by name, and trainable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from stack_checks import config_of
from stack_draws import GROUNDS

from hybridengine.config import PRESETS, Config, load_config, split_entry
from hybridengine.engine import Engine
from hybridengine.errors import ConfigError

GROUND = GROUNDS[0]


def config(methods: list[Any], output: Path, preset: str) -> dict[str, Any]:
    return {**config_of(GROUND, methods, output), "preset": preset}


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_trains_and_its_methods_are_recorded(name: str, tmp_path: Path) -> None:
    engine = Engine(config([], tmp_path / "run", name))
    expected = [split_entry(entry) for entry in PRESETS[name]]
    assert engine.config.method_entries == expected
    assert engine.train()["status"] == "finished"
    recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))
    assert recorded["preset"] is None and [split_entry(m)[0] for m in recorded["methods"]] == [n for n, _ in expected]
    assert Engine(str(tmp_path / "run" / "config.yaml")).config.methods == engine.config.methods


def test_own_methods_win_and_others_join() -> None:
    methods = ["sam", {"rdrop": {"alpha": 2.0}}]
    found, _ = load_config({"task": "t", "model": {"name": "m"}, "data": {}, "methods": methods, "preset": "robust"})
    assert found.method_entries == [("sam", {}), ("rdrop", {"alpha": 2.0}), ("fgm", {}), ("ema", {}), ("linear", {})]


def test_a_wrong_preset_is_told_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps({"task": "t", "model": {"name": "m"}, "data": {}})[:-1] + ',\n"preset": "robst"}')
    with pytest.raises(ConfigError, match=r"c.yaml:2: preset: must be 'cheap', .*'robust', got 'robst'"):
        load_config(path)


def test_a_config_that_is_wrong_elsewhere_is_told_so() -> None:
    with pytest.raises(ConfigError, match="methods: must be a list"):
        load_config({"task": "t", "model": {"name": "m"}, "data": {}, "methods": 3, "preset": "cheap"})


def test_the_field_and_the_presets_name_the_same() -> None:
    literal = get_args(Config.model_fields["preset"].annotation)[0]
    assert sorted(get_args(literal)) == sorted(PRESETS)
