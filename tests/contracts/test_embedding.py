"""The engine as a library: silent, and nothing of the process is changed by a run."""

from __future__ import annotations

import logging
import os
import random
import signal
import warnings
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from tiny_runs import StopAfter, run_config

import hybridengine
from hybridengine.engine import Engine
from hybridengine.errors import StackError, Stopped

STACK: list[Any] = ["rdrop", "vat", {"freelb": {"init": 0.5}}, "sam", {"ema": {"decay": 0.9}}, {"lora": {"r": 2}}]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM, signal.SIGUSR1)


def process_state() -> dict[str, Any]:
    """What a host program would notice if it changed."""
    numbers = numpy.random.get_state()
    return {
        "threads": torch.get_num_threads(),
        "interop threads": torch.get_num_interop_threads(),
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cudnn.deterministic,
            torch.backends.cudnn.benchmark,
            torch.get_float32_matmul_precision(),
        ),
        "torch rng": torch.get_rng_state().tolist(),
        "python rng": random.getstate(),
        "numpy rng": (numbers[0], numbers[1].tolist(), *numbers[2:]),  # type: ignore[index, union-attr]
        "signals": [signal.getsignal(number) for number in SIGNALS],
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "logging": (logging.root.level, list(logging.root.handlers)),
        "warnings": list(warnings.filters),
    }


def assert_unchanged(before: dict[str, Any]) -> None:
    after = process_state()
    assert [name for name in before if before[name] != after[name]] == []


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_run_prints_nothing_and_changes_nothing_of_the_process(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    engine = Engine(run_config(STACK, tmp_path / "run", accumulate=2, save_every=1, max_steps=2))
    torch.manual_seed(7), random.seed(7), numpy.random.seed(7)
    capfd.readouterr()
    before = process_state()
    assert engine.train()["status"] == "finished"
    assert_unchanged(before)
    hybridengine.load(tmp_path / "run").predict(["good movie"])
    assert_unchanged(before)
    assert capfd.readouterr() == ("", "")


def test_a_stopped_and_a_refused_run_change_nothing_either(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stopping = Engine(run_config(["sam", "fgm"], tmp_path / "run", max_steps=3), cancel=StopAfter(1))
    refused = Engine(run_config(["pgd", "fgm"], tmp_path / "refused"))
    capfd.readouterr()
    before = process_state()
    with pytest.raises(Stopped):
        stopping.train()
    with pytest.raises(StackError):
        refused.train()
    assert_unchanged(before)
    assert capfd.readouterr() == ("", "")


def test_progress_is_told_to_the_listener_in_order(tmp_path: Path) -> None:
    kinds: list[str] = []
    Engine(run_config([], tmp_path / "run"), progress=lambda event: kinds.append(event.kind)).train()
    wanted = ["plan", "start", "step", "evaluate", "save", "done"]
    assert sorted(set(kinds) - {"note"}, key=kinds.index) == wanted
    assert kinds.count("step") == 4


def test_the_global_random_state_of_the_host_has_no_say(tmp_path: Path) -> None:
    """Two runs under different global seeds are the same run."""
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed), random.seed(seed), numpy.random.seed(seed)
        found.append(Engine(run_config(["rdrop", "eda"], tmp_path / str(seed))).train()["metrics"])
    assert found[0] == found[1]
