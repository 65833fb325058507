"""Any stack of shipped methods trains with all invariants of its members, or is refused with names and a way out."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from matrix import PAGE, PAIR_GROUNDS, RESULT, covering_stacks
from stack_checks import check, complete
from stack_draws import GROUNDS, PARAMETERS, Ground, stacks, traits_of
from support_page import page

from hybridengine.plugin import Catalogue

_DRAWS = {
    "database": None,
    "derandomize": True,
    "deadline": None,
    "phases": [Phase.generate],
    "suppress_health_check": list(HealthCheck),
}
METHODS = sorted(name for name in Catalogue().names() if traits_of(name).kind == "method")


def test_every_shipped_method_is_drawn() -> None:
    shipped = {x.name for x in Catalogue().all() if x.distribution == "hybridengine"}
    assert set(PARAMETERS) == {name for name in METHODS if name in shipped}


def test_the_support_matrix_names_every_pair_and_its_page_is_what_it_says() -> None:
    """Run or not run yet. Else: `python tests/contracts/matrix.py pairs`, then `... write`."""
    results = json.loads(RESULT.read_text(encoding="utf-8"))
    assert results["methods"] == sorted(PARAMETERS), "the matrix lacks methods, or has some that are gone"
    assert results["pairs"]["total"] + sum(map(len, results["missing"].values())) == results["expected_pairs"]
    assert results["pairs"]["failed"] == results["stacks"]["failed"] == 0
    assert PAGE.read_text(encoding="utf-8") == page(results)


def drawn(stack: tuple[Ground, list[dict[str, Any]], dict[str, Any]], refused: list[bool]) -> None:
    ground, methods, train = stack
    folder = Path(tempfile.mkdtemp(prefix="hybridengine-stack-"))
    try:
        refused.append(check(ground, methods, folder / "run", **train) is not None)
    except Exception as error:
        error.add_note(f"{ground}: {methods}, {train}")
        raise
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("ground", GROUNDS, ids=str)
def test_the_bare_ground_trains(ground: Ground, tmp_path: Path) -> None:
    assert check(ground, [], tmp_path / "run") is None


def test_random_stacks_train_or_are_refused() -> None:
    refused: list[bool] = []

    @settings(max_examples=30, **_DRAWS)
    @given(stacks())
    def run(stack: tuple[Ground, list[dict[str, Any]], dict[str, Any]]) -> None:
        drawn(stack, refused)

    run()
    assert 0 < sum(refused) < len(refused)


# Stacks in which together every pair that trains stands once; the whole is `python tests/contracts/matrix.py`.
COVERING = covering_stacks()
QUICK = 12


@pytest.mark.parametrize(
    "index",
    [i if i % (len(COVERING) // QUICK) == 0 else pytest.param(i, marks=pytest.mark.slow) for i in range(len(COVERING))],
)
def test_every_pair_trains_within_a_larger_stack(index: int, tmp_path: Path) -> None:
    ground = PAIR_GROUNDS["encoder"]
    check(ground, complete(COVERING[index], ground), tmp_path / "run", max_steps=2)
