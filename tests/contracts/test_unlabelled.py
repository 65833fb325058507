"""Unlabelled rows in whole runs: refused where something is missing, rewritten, paired up, reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import run_config

from hybridengine import Engine
from hybridengine.errors import StackError


@pytest.mark.parametrize(
    ("methods", "unlabelled", "reason"),
    [
        (["uda"], True, "uda needs texts that another method rewrites"),
        (["uda", "eda"], False, "'uda' needs 'unlabelled'.*data.unlabelled"),
        (["supcon", "eda", {"uda": {"annealing": "log"}}], True, "annealing drops labels, which supcon would pair"),
    ],
)
def test_stacks_without_what_it_needs_are_refused(
    methods: list[Any], unlabelled: bool, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(StackError, match=reason):
        Engine(run_config(methods, tmp_path / "run", unlabelled=unlabelled)).validate()


def test_unlabelled_rows_stand_beside_episodes(tmp_path: Path) -> None:
    """Episodes give their own rows other labels; unlabelled rows, which have none, stay as they are."""
    episodes = {"episodes": {"ways": 2, "shots": 1, "queries": 2, "per_epoch": 4, "evaluation_episodes": 2}}
    summary = Engine(run_config(["vat", "fomaml", episodes], tmp_path / "run", unlabelled=True)).train()
    assert summary["status"] == "finished" and summary["methods"]["vat"]["kl"]["mean"] > 0


def test_a_run_reports_what_it_was_trained_on(tmp_path: Path) -> None:
    methods = [{"eda": {"copies": 0}}, {"uda": {"annealing": "linear"}}]
    engine = Engine(run_config(methods, tmp_path / "run", unlabelled=True, accumulate=2))
    summary = engine.train()
    assert summary["methods"]["uda"]["kl"]["mean"] > 0
    passes = engine.plan().phases[0].counts  # in both micro-batches
    assert passes["f"] == 2 * 2  # how sure the model is of labels, and of unlabelled rows
    assert passes["F"] == 2 * 2  # labelled and rewritten rows
    card = json.loads((tmp_path / "run" / "data_card.json").read_text(encoding="utf-8"))
    assert card["splits"]["augmented"]["rows"] == card["splits"]["unlabelled"]["rows"] == 12
    assert "digest" not in card["splits"]["augmented"] and card["splits"]["augmented"]["tokens"]["max"] > 0
    assert "augmented" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    batch = engine._assembler.batch("train", engine._sampler(0)[0], 0)
    part, rewritten = batch.parts["unlabelled"], batch.parts["augmented"]
    assert batch.counts["unlabelled_rows"] == part.size == rewritten.size
    stride = engine._run.splits["augmented"].ids([0])[0] - engine._run.splits["unlabelled"].ids([0])[0]
    assert rewritten.rows == tuple(row + stride for row in part.rows), "the same rows, at the same places"
