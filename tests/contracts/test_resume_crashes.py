"""kill -9 at every file operation of a run, and at random times, loses nothing.

The processes that die are forked from one that has imported everything and run nothing.
"""

from __future__ import annotations

import multiprocessing
import random
import shutil
import time
from pathlib import Path
from typing import Any

import crash_points
import pytest
from tiny_runs import leftovers, run_bits, run_config, text_rows, train_stopping_after

from hybridengine.engine import Engine

_PRELOAD = ["hybridengine.engine", "hybridengine.testing", "transformers.models.bert.modeling_bert", "torch"]

_HARD = ("save_file", "rename", "unlink", "replace")  # the default suite dies at the first of each, the slow one at all


def config_of(output: Path) -> dict[str, Any]:
    """Dropout, averaged weights in `best/`, and one checkpoint kept, so that every save also deletes the old one."""
    methods = ["rdrop", {"ema": {"decay": 0.9}}]
    evaluate = {"metric": "loss"}  # gets better at every step, so that best/ is replaced
    train = {"max_steps": 3, "batch_size": 12, "lr": 1e-3, "save_every": 1, "evaluate_every": 1, "keep": 1}
    return run_config(methods, output, evaluate=evaluate, data={"validation": text_rows(12)}, **train)


class Lab:
    """A run that was stopped after its first step, the uninterrupted one, and processes to be killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(_PRELOAD)
        Engine(config_of(folder / "whole")).train()
        self.expected = run_bits(folder / "whole")
        assert not train_stopping_after(config_of(folder / "begun"), 1)

    def begun(self, name: str) -> Path:
        """A copy of the begun run."""
        return Path(shutil.copytree(self.folder / "begun", self.folder / name))

    def crash(self, output: Path, nth: int) -> list[str]:
        """Go on with a run in a process that dies at its `nth` file operation; returns those made before."""
        record = self.folder / f"operations-{output.name}"
        process = self.context.Process(target=crash_points.train_dying_at, args=(config_of(output), nth, record))
        process.start()
        process.join()
        assert process.exitcode == (-9 if nth else 0), f"operation {nth}: exit code {process.exitcode}"
        return record.read_text(encoding="utf-8").splitlines() if record.exists() else []

    def problem(self, output: Path) -> str | None:
        """What resuming a killed run loses, or None."""
        Engine(config_of(output)).train()
        found = run_bits(output)
        differing = [key for key in found if found[key] != self.expected[key]]
        left = leftovers(output)
        return f"differs in {differing}, leaves {left}" if differing or left else None


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("crashes"))


def assert_nothing_is_lost(lab: Lab, name: str, *, every: bool) -> None:
    operations = lab.crash(lab.begun(f"{name}-all"), 0)
    assert sum(line.startswith("rename") for line in operations) >= 4  # both remaining checkpoints, and best/
    kinds = [line.split()[0] for line in operations]
    chosen = [1 + kinds.index(kind) for kind in _HARD]
    if every:  # a kill finds the same files before and after a flush, so one of each run of flushes is enough
        chosen = [i + 1 for i, kind in enumerate(kinds) if kind != "fsync" or kinds[i - 1] != "fsync"]
    lost = []
    for nth in chosen:
        output = lab.begun(f"{name}-{nth}")
        lab.crash(output, nth)
        if problem := lab.problem(output):
            lost.append(f"killed at operation {nth} ({operations[nth - 1]}): {problem}")
        shutil.rmtree(output)
    assert not lost, "\n".join(lost)


def test_a_process_killed_in_a_write_a_rename_or_a_removal_loses_nothing(lab: Lab) -> None:
    assert_nothing_is_lost(lab, "some", every=False)


@pytest.mark.slow
def test_a_process_killed_at_any_file_operation_loses_nothing(lab: Lab) -> None:
    assert_nothing_is_lost(lab, "every", every=True)


@pytest.mark.slow
def test_a_process_killed_at_any_time_loses_nothing(lab: Lab) -> None:
    started = time.perf_counter()
    lab.crash(lab.begun("timed"), 0)
    whole = time.perf_counter() - started
    moments = random.Random(0)
    killed = 0
    for turn in range(12):
        output = lab.begun(f"random-{turn}")
        process = lab.context.Process(target=crash_points.train, args=(config_of(output),))
        process.start()
        process.join(moments.uniform(0, whole))
        process.kill()
        process.join()
        killed += process.exitcode == -9
        assert (problem := lab.problem(output)) is None, f"turn {turn}: {problem}"
        shutil.rmtree(output)
    assert killed > 3
