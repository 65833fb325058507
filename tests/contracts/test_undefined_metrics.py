"""A main metric that is None, NaN or infinite ends no run, is never the best, and leaves every line valid JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tiny_runs import run_config

from hybridengine.engine import Engine
from hybridengine.plugin import Traits, hook


@dataclass(eq=False)
class Undefined:
    """Gives the evaluations after each step these values of the main metric."""

    traits: ClassVar[Traits] = Traits()
    values: list[float | str | None]  # as text where a parameter may not hold it

    @hook
    def transform_metrics(self, run: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        value = self.values[min(run.step, len(self.values)) - 1]
        return {**metrics, metrics["main"]: None if value is None else float(value)}


def train(output: Path, values: list[float | str | None], *methods: Any) -> dict[str, Any]:
    config = run_config(list(methods), output, max_steps=len(values), evaluate_every=1)
    return Engine(config, methods=[Undefined(values)]).train()


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


@pytest.mark.parametrize("none", [None, "nan", "inf", "-inf"])
def test_an_undefined_value_is_never_the_best(none: str | None, tmp_path: Path) -> None:
    summary = train(tmp_path / "run", [none, 0.5, none])
    assert summary["best"] == {"step": 2, "metric": "accuracy", "value": 0.5}
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    values = [json.loads(line, parse_constant=refuse) for line in lines]
    found = [line["metrics"].get("accuracy") for line in values if line["kind"] == "validation"]
    assert found == [None, 0.5, None]


def test_where_no_value_is_defined_the_first_evaluated_model_is_kept(tmp_path: Path) -> None:
    summary = train(tmp_path / "run", [None, "nan"])
    assert summary["status"] == "finished"
    assert summary["best"] == {"step": 1, "metric": "accuracy", "value": None}
    assert json.loads((tmp_path / "run" / "best" / "hybridengine.json").read_text())["step"] == 1


def test_early_stopping_counts_an_undefined_value_as_no_better(tmp_path: Path) -> None:
    summary = train(tmp_path / "run", [0.5, None, "nan", 0.9], {"early-stopping": {"patience": 2}})
    assert summary["steps"] == 3 and "not better in 2 evaluations" in summary["stop_reason"]


def test_auroc_of_one_class_ends_no_run(tmp_path: Path) -> None:
    config = run_config([], tmp_path / "run", evaluate={"metric": "auroc"})
    config["data"]["validation"] = [row for row in config["data"]["validation"] if row["label"] == "good"]
    summary = Engine(config).train()
    assert summary["metrics"]["validation"]["auroc"] is None and summary["best"]["value"] is None
