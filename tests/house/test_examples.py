"""Every example config is commented, fits together and plans; the slow test also trains two steps of each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from hybridengine import Engine, load
from hybridengine.config import load_config
from hybridengine.data import read_rows
from hybridengine.errors import ModelError
from hybridengine.plugin import Catalogue
from hybridengine.testing import tiny_checkpoint

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.yaml"))
MASKED = ("demonstrations", "soft-template", "found-words", "pet", "related-words", "soft-words", "template-few-shot")
ARCHITECTURES = {"summarization": "t5", **dict.fromkeys(MASKED, "masked")}
NEEDS = {"distill": "full", "pet-distill": "pet"}  # examples that start from another one's run


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        "encoder": tiny_checkpoint(folder / "encoder"),
        "masked": tiny_checkpoint(folder / "masked", "bert", "AutoModelForMaskedLM"),
        "t5": tiny_checkpoint(folder / "t5", "t5"),
    }


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in, as the root of the repository: the examples beside an empty `runs/`."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def overrides(name: str, checkpoints: dict[str, Path]) -> list[str]:
    return [f"model.name={checkpoints[ARCHITECTURES.get(name, 'encoder')]}", "train.device=cpu"]


def train(name: str, checkpoints: dict[str, Path]) -> dict[str, Any]:
    short = ["train.max_steps=2", "log.every=1", "evaluate.resamples=50"]
    return Engine(f"examples/{name}.yaml", [*overrides(name, checkpoints), *short]).train()


def test_there_are_at_least_eight() -> None:
    assert len(EXAMPLES) >= 8


@pytest.mark.parametrize("name", EXAMPLES)
def test_is_commented_and_tells_how_to_run_it(name: str) -> None:
    text = (ROOT / "examples" / f"{name}.yaml").read_text(encoding="utf-8")
    assert f"hybridengine train examples/{name}.yaml" in text
    assert yaml.safe_load(text)["output"] == f"runs/examples/{name}"


@pytest.mark.parametrize("name", EXAMPLES)
def test_validates_and_plans_without_writing(name: str, checkpoints: dict[str, Path], workplace: Path) -> None:
    engine = Engine(f"examples/{name}.yaml", overrides(name, checkpoints))
    if name in NEEDS:
        with pytest.raises(ModelError, match="does not exist"):
            engine.validate()
    else:
        assert engine.validate()
    plan = engine.plan()
    assert all("S" in phase.passes for phase in plan.phases)
    named = {entry for entry, _ in engine.config.method_entries}
    assert named <= {member["name"] for member in plan.members}
    assert not (workplace / "runs").exists()


def test_all_shipped_tasks_but_language_modelling_and_most_methods_are_shown() -> None:
    shown = set()
    for name in EXAMPLES:
        config = load_config(ROOT / "examples" / f"{name}.yaml")[0]
        for part in [config, *(load_config({**config.model_dump(), **stage})[0] for stage in config.stages)]:
            shown |= {part.task_entry[0], *(entry for entry, _ in part.method_entries)}
    kinds: dict[str, set[str]] = {"task": set(), "method": set()}
    for listing in Catalogue().all():
        if listing.distribution == "hybridengine":
            kinds.setdefault(listing.load().traits.kind, set()).add(listing.name)
    assert kinds["task"] - shown == {"language-modeling"}
    assert len(kinds["method"] & shown) >= 2 * len(kinds["method"]) // 3


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "data").glob("*.jsonl")), ids=lambda path: path.stem)
def test_data_files_hold_distinct_rows_and_are_listed(path: Path) -> None:
    rows = [json.dumps(row, sort_keys=True) for _, row in read_rows(path)]
    assert len(rows) == len(set(rows)) >= 24
    readme = (ROOT / "examples" / "data" / "README.md").read_text(encoding="utf-8")
    line = next(line for line in readme.splitlines() if line.startswith("|") and f"`{path.name}`" in line)
    assert str(len(rows)) in line


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_trains_two_steps(name: str, checkpoints: dict[str, Path], workplace: Path) -> None:
    if name in NEEDS:
        train(NEEDS[name], checkpoints)
    summary = train(name, checkpoints)
    assert summary["status"] == "finished" and summary["steps"] == 2
    folder = Path(summary["output"])
    assert (folder / "summary.json").is_file()
    best = folder / f"stage-{len(summary['stages'])}" if "stages" in summary else folder
    assert (best / "report.html").is_file()
    row = {"tokens": ["Maria", "lives"]} if name == "token-classification" else "a good book"
    if not name.endswith("-episodes"):  # its classes are those of an episode
        assert len(load(best).predict([row])) == 1
