"""Damaged checkpoints, full disks, foreign and finished folders: named, and nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import StopAfter, leftovers, run_bits, run_config, text_rows, train_stopping_after

from hybridengine.engine import Engine
from hybridengine.errors import ConfigError, OutputError, Stopped
from hybridengine.train import checkpoint, trackers


def config_of(output: Path) -> dict[str, Any]:
    evaluate = {"metric": "loss"}  # gets better at every step, so that best/ is replaced
    train = {"max_steps": 3, "batch_size": 12, "lr": 1e-3, "save_every": 1, "evaluate_every": 1}
    return run_config([{"ema": {"decay": 0.9}}], output, evaluate=evaluate, data={"validation": text_rows(12)}, **train)


class Begun:
    """A run stopped after two of its three steps, and what it would have come to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        Engine(config_of(folder / "whole")).train()
        self.expected = run_bits(folder / "whole")
        assert not train_stopping_after(config_of(folder / "begun"), 2)

    def copy(self, name: str) -> Path:
        return Path(shutil.copytree(self.folder / "begun", self.folder / name, dirs_exist_ok=True))


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Begun:
    return Begun(tmp_path_factory.mktemp("folders"))


# ---- damaged checkpoints ---------------------------------------------------------------------------------------------


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGES: dict[str, Callable[[Path], None]] = {"flipped": flip_a_bit, "cut": cut, "missing": Path.unlink}
FILES = (
    "parameters.safetensors", "buffers.safetensors", "optimizer.safetensors", "optimizer.json",
    "states.safetensors", "states.json", "trainer.json", "manifest.json",
)  # fmt: skip


def assert_damage_is_survived(begun: Begun, name: str, damage: str) -> None:
    output = begun.copy(f"{damage}-{name}")
    newest = output / "checkpoints" / "step-00000002"
    DAMAGES[damage](newest / name)
    summary = Engine(config_of(output)).train()
    (note,) = [note for note in summary["notes"] if "damaged" in note]
    assert "step-00000002" in note
    if name != "manifest.json" or damage == "missing":  # damage to the manifest may show as another file's digest
        assert name in note
    assert "resumed from step-00000001" in summary["notes"]
    assert run_bits(output) == begun.expected
    shutil.rmtree(output)


@pytest.mark.parametrize(
    ("name", "damage"),
    [("parameters.safetensors", "flipped"), ("optimizer.safetensors", "cut"), ("manifest.json", "missing")],
)
def test_a_damaged_checkpoint_is_named_and_an_earlier_one_used(begun: Begun, name: str, damage: str) -> None:
    assert_damage_is_survived(begun, name, damage)


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_any_damage_to_any_file_is_named_and_an_earlier_checkpoint_used(begun: Begun, name: str, damage: str) -> None:
    assert_damage_is_survived(begun, name, damage)


def test_when_every_checkpoint_is_damaged_training_starts_again(begun: Begun) -> None:
    output = begun.copy("all-damaged")
    for folder in (output / "checkpoints").iterdir():
        flip_a_bit(folder / "parameters.safetensors")
    assert sum("damaged" in note for note in Engine(config_of(output)).train()["notes"]) == 2
    assert run_bits(output) == begun.expected


def test_a_damaged_checkpoint_that_was_asked_for_by_path_is_refused(begun: Begun) -> None:
    output = begun.copy("by-path")
    path = output / "checkpoints" / "step-00000002"
    cut(path / "states.json")
    with pytest.raises(OutputError, match=r"states\.json has changed.*resume from another one"):
        Engine({**config_of(output), "resume": str(path)}).train()


def test_a_checkpoint_named_by_path_is_resumed(begun: Begun) -> None:
    output = begun.copy("from-first")
    summary = Engine({**config_of(output), "resume": str(output / "checkpoints" / "step-00000001")}).train()
    assert "resumed from step-00000001" in summary["notes"]
    assert run_bits(output) == begun.expected


def test_a_run_that_starts_from_another_ones_checkpoint_keeps_its_own_best(begun: Begun) -> None:
    """A learning rate of almost nothing: no later evaluation beats what the other run reached."""
    path = begun.folder / "begun" / "checkpoints" / "step-00000002"
    for name, steps in (("from-other", 3), ("at-its-end", 2)):
        config = {**config_of(begun.folder / name), "resume": str(path)}
        config["train"] = {**config["train"], "max_steps": steps}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("hybridengine.train.loop.better", lambda *_: False)
            summary = Engine(config).train()
        assert summary["status"] == "finished" and summary["steps"] == steps
        assert json.loads((begun.folder / name / "best" / "hybridengine.json").read_text())["step"] == steps


def test_interrupted_it_goes_on_from_its_own_checkpoint(begun: Begun) -> None:
    path = begun.folder / "begun" / "checkpoints" / "step-00000001"
    config = {**config_of(begun.folder / "own"), "resume": str(path)}
    assert not train_stopping_after(config, 1)
    before = (begun.folder / "own" / "metrics.jsonl").read_text(encoding="utf-8")
    summary = Engine(config).train()
    assert "resumed from step-00000002" in summary["notes"]
    assert (begun.folder / "own" / "metrics.jsonl").read_text(encoding="utf-8").startswith(before)


# ---- a full disk -----------------------------------------------------------------------------------------------------


class FullDisk:
    """From the `nth` watched file operation on, the disk is full."""

    def __init__(self, nth: int) -> None:
        self.nth = nth
        self.count = 0

    def watched(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if 0 < self.nth <= self.count:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **kwargs)

        return call


@contextmanager
def full_disk(nth: int) -> Iterator[FullDisk]:
    """Every write, staging folder and flush counts; what only deletes or renames works on a full disk too."""
    disk = FullDisk(nth)
    opened, add = Path.open, disk.watched(Path.open)

    def open_(path: Path, mode: str = "r", **options: Any) -> Any:
        return (add if mode == "a" else opened)(path, mode, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "mkdir", disk.watched(os.mkdir))
        patch.setattr(os, "fsync", disk.watched(os.fsync))
        patch.setattr(Path, "write_text", disk.watched(Path.write_text))
        patch.setattr(Path, "open", open_)
        patch.setattr(checkpoint, "save_file", disk.watched(checkpoint.save_file))
        yield disk


def assert_a_full_disk_is_survived(begun: Begun, nth: int) -> None:
    output = begun.copy(f"full-{nth}")
    config = config_of(output)
    with full_disk(nth), pytest.raises(OutputError, match=r"the disk or quota is full") as caught:
        Engine(config).train()
    assert str(output) in str(caught.value)
    assert Engine(config).train()["status"] == "finished"
    assert leftovers(output) == []
    assert run_bits(output) == begun.expected, f"full at write {nth}"
    shutil.rmtree(output)


def writes_of_a_run(begun: Begun) -> int:
    output = begun.copy("never-full")
    with full_disk(0) as disk:
        Engine(config_of(output)).train()
    shutil.rmtree(output)
    return disk.count


def test_a_disk_that_fills_up_while_training_stops_the_run_and_loses_nothing(begun: Begun) -> None:
    count = writes_of_a_run(begun)
    assert count > 30
    for nth in (1, count // 3, 2 * count // 3, count):
        assert_a_full_disk_is_survived(begun, nth)


@pytest.mark.slow
def test_a_disk_that_fills_up_at_any_write_stops_the_run_and_loses_nothing(begun: Begun) -> None:
    for nth in range(1, writes_of_a_run(begun) + 1):
        assert_a_full_disk_is_survived(begun, nth)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The kernel itself refuses to let a file grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [300, 2_000, 20_000, 100_000])
def test_a_real_file_size_limit_is_told_and_loses_nothing(begun: Begun, size: int) -> None:
    """From the smallest files (config, metrics lines) to the largest (weights), whoever writes them."""
    output = begun.copy(f"limit-{size}")
    with largest_file(size), pytest.raises(OutputError, match="the disk or quota is full") as caught:
        Engine(config_of(output)).train()
    assert str(output) in str(caught.value)
    Engine(config_of(output)).train()
    assert leftovers(output) == []
    assert run_bits(output) == begun.expected


# ---- whose folder is it ----------------------------------------------------------------------------------------------


def test_another_config_is_refused_by_the_names_of_its_keys(begun: Begun) -> None:
    output = begun.copy("changed")
    config = config_of(output)
    changed = {**config, "train": {**config["train"], "lr": 2e-3}, "methods": ["sam"]}
    before = sorted(p.name for p in output.iterdir())
    with pytest.raises(OutputError, match=r"another config; changed: methods, train\.lr\.") as caught:
        Engine(changed).train()
    assert str(output) in str(caught.value) and "Choose another `output`" in str(caught.value)
    assert sorted(p.name for p in output.iterdir()) == before


@pytest.mark.parametrize("name", ["begun", "whole"])
def test_other_rows_under_the_same_path_are_refused_by_split(tmp_path: Path, name: str) -> None:
    files = {split: tmp_path / f"{split}.jsonl" for split in ("train", "validation")}

    def write(split: str, rows: list[dict[str, Any]]) -> None:
        files[split].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    write("train", text_rows(24))
    write("validation", text_rows(12))
    config = config_of(tmp_path / "run")
    config["data"] = {split: str(path) for split, path in files.items()}
    assert train_stopping_after(config, 99 if name == "whole" else 1) is (name == "whole")
    Engine(config).validate()
    changed = text_rows(12)
    changed[3] = {**changed[3], "label": changed[4]["label"]}
    write("validation", changed)
    for act in (Engine(config).train, Engine(config).validate):
        with pytest.raises(OutputError, match=r"other data; the rows of these splits .*: validation\. Choose another"):
            act()
    write("validation", text_rows(12))
    assert Engine(config).train()["status"] == "finished"


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="no run of hybridengine"):
        Engine(config_of(tmp_path)).train()
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="is a file"):
        Engine(config_of(tmp_path / "out")).train()


def test_a_finished_run_returns_its_summary_again(begun: Begun) -> None:
    output = Path(shutil.copytree(begun.folder / "whole", begun.folder / "finished"))
    stored = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    before = {p: p.stat().st_mtime_ns for p in (output / "checkpoints").rglob("*")}
    again = Engine(config_of(output)).train()
    assert {k: v for k, v in again.items() if k != "report"} == stored
    assert Path(again["report"]) == output / "report.html"
    assert {p: p.stat().st_mtime_ns for p in (output / "checkpoints").rglob("*")} == before


def test_resume_never_refuses_a_used_folder(begun: Begun) -> None:
    output = begun.copy("never")
    with pytest.raises(OutputError, match="`resume` is never"):
        Engine({**config_of(output), "resume": "never"}).train()
    fresh = begun.folder / "fresh"
    Engine({**config_of(fresh), "resume": "never"}).train()
    assert run_bits(fresh) == begun.expected


def test_a_missing_checkpoint_path_is_refused(begun: Begun) -> None:
    with pytest.raises(OutputError, match="no checkpoint folder"):
        Engine({**config_of(begun.folder / "new"), "resume": str(begun.folder / "nowhere")}).train()


# ---- killed after the last step --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["best", "evaluation"])
def test_an_early_stopped_run_that_dies_before_its_summary_makes_no_further_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A learning rate of almost nothing: validation never gets better, so the run stops at its second evaluation."""

    def config(output: Path) -> dict[str, Any]:
        methods = [{"early-stopping": {"patience": 1, "metric": "accuracy"}}]
        return run_config(methods, output, max_steps=9, lr=1e-12, evaluate_every=1, save_every=1)

    whole = Engine(config(tmp_path / "whole")).train()
    assert whole["steps"] == 2 and "early stopping" in whole["stop_reason"]
    output = tmp_path / "dying"

    def dies(*args: object, **kwargs: object) -> None:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of luck"):
        if name == "best":
            patch.setattr("hybridengine.engine.load_best", dies)
        else:
            patch.setattr("hybridengine.evaluate.evaluator.bootstrap_interval", dies)
        Engine(config(output)).train()
    assert Engine(config(output)).train()["steps"] == 2
    assert run_bits(output) == run_bits(tmp_path / "whole")


def test_the_summary_counts_the_kernels_of_its_own_training(tmp_path: Path) -> None:
    first, second = (Engine(config_of(tmp_path / name)).train()["kernels"] for name in ("one", "two"))
    assert first == second != {}


def test_a_logger_that_cannot_start_fails_the_run_by_name_and_leaves_room_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object) -> None:
        raise ConnectionError("no server")

    monkeypatch.setitem(trackers._KINDS, "tensorboard", refuses)
    monkeypatch.setattr("hybridengine.engine.check_trackers", lambda names: None)
    config = config_of(tmp_path / "run")
    with pytest.raises(ConfigError, match="tensorboard cannot start"):
        Engine({**config, "log": {"to": ["tensorboard"]}}).train()
    assert Engine(config).train()["status"] == "finished"


def test_a_stop_is_told_in_the_summary_and_needs_no_second_thought(tmp_path: Path) -> None:
    with pytest.raises(Stopped, match="stopped at step 1 of 3"):
        Engine(config_of(tmp_path / "run"), cancel=StopAfter(1)).train()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["status"] == "stopped" and summary["steps"] == 1
