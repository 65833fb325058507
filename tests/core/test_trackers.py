"""Experiment loggers, whose libraries are stood in for: what fails is told, and training goes on."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from hybridengine.errors import ConfigError
from hybridengine.train.trackers import check_trackers, open_tracker

LINE = {"kind": "train", "step": 3, "loss": 0.5, "terms": {"kl": 0.1}, "effects": {"fgm": {"norm": 1.0}}}


class Library(ModuleType):
    """A logger's library that notes its calls and fails where it is told to."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.calls: list[tuple[str, Any]] = []
        self.failing: set[str] = set()

    def call(self, name: str, /, **given: Any) -> None:
        self.calls.append((name, given))
        if name in self.failing:
            raise ConnectionError(f"{name} of {self.__name__} is out of reach\nwith details")

    # ---- wandb -----------------------------------------------------------------------------------------------------

    def init(self, **given: Any) -> SimpleNamespace:
        self.call("init", **given)
        return SimpleNamespace(
            id="abc123",
            log=lambda values, step: self.call("log", values=values, step=step),
            finish=lambda: self.call("finish"),
        )

    # ---- mlflow ----------------------------------------------------------------------------------------------------

    def start_run(self, **given: Any) -> SimpleNamespace:
        self.call("start_run", **given)
        return SimpleNamespace(info=SimpleNamespace(run_id="def456"))

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        self.call("log", values=values, step=step)

    def end_run(self) -> None:
        self.call("finish")


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Library:
    library = Library("wandb")
    monkeypatch.setitem(sys.modules, "wandb", library)
    return library


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Library:
    library = Library("mlflow")
    monkeypatch.setitem(sys.modules, "mlflow", library)
    return library


def test_lines_reach_every_logger(wandb: Library, mlflow: Library, tmp_path: Path) -> None:
    check_trackers(["wandb", "mlflow"])
    tracker = open_tracker(["wandb", "mlflow"], tmp_path, {"task": "x"}, pytest.fail)
    tracker.log(LINE)
    tracker.close()
    values = {"train/loss": 0.5, "train/kl": 0.1, "train/fgm.norm": 1.0}
    assert wandb.calls[0] == ("init", {"dir": str(tmp_path), "config": {"task": "x"}, "name": tmp_path.name})
    assert wandb.calls[1:] == [("log", {"values": values, "step": 3}), ("finish", {})]
    assert mlflow.calls[0] == ("start_run", {"run_name": tmp_path.name})
    assert mlflow.calls[1] == ("log", {"values": {k.replace("/", "."): v for k, v in values.items()}, "step": 3})


def test_a_logger_that_cannot_start_is_named_and_the_others_are_closed(
    wandb: Library, mlflow: Library, tmp_path: Path
) -> None:
    wandb.failing, mlflow.failing = {"init"}, {"start_run"}
    with pytest.raises(ConfigError, match=r"^log\.to: wandb cannot start \(ConnectionError: .*\); run `wandb login`"):
        open_tracker(["wandb"], tmp_path, {}, pytest.fail)
    wandb.failing = set()
    with pytest.raises(ConfigError, match=r"log\.to: mlflow cannot start .*remove it from log\.to"):
        open_tracker(["wandb", "mlflow"], tmp_path, {}, pytest.fail)
    assert wandb.calls[-1] == ("finish", {})


def test_what_fails_while_training_is_told_once_and_the_others_go_on(
    wandb: Library, mlflow: Library, tmp_path: Path
) -> None:
    told: list[str] = []
    tracker = open_tracker(["wandb", "mlflow"], tmp_path, {}, told.append)
    wandb.failing = {"log", "finish"}
    tracker.log(LINE)
    tracker.log({**LINE, "step": 4})
    tracker.close()
    assert told == ["wandb lost lines (ConnectionError: log of wandb is out of reach); metrics.jsonl has them all"]
    assert [name for name, _ in mlflow.calls] == ["start_run", "log", "log", "finish"]


def test_a_resumed_run_goes_on_in_the_loggers_old_runs(wandb: Library, mlflow: Library, tmp_path: Path) -> None:
    for _ in range(2):
        open_tracker(["wandb", "mlflow"], tmp_path, {}, pytest.fail).close()
    again = [given for name, given in wandb.calls if name == "init"][1]
    assert (again["id"], again["resume"]) == ("abc123", "allow")
    assert [given for name, given in mlflow.calls if name == "start_run"][1] == {"run_id": "def456"}
