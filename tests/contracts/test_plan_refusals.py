"""What cannot be stacked is refused before anything runs: both sides named, the reason, a way out, all at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_runs import checkpoint, run_config

from hybridengine.engine import Engine
from hybridengine.errors import ConfigError, HybridEngineError, StackError

EPISODES = {"episodes": {"ways": 2, "shots": 1, "queries": 2}}
Refused = tuple[list[Any], dict[str, Any], tuple[str, ...]]
REFUSED: dict[str, Refused] = {
    "two embedding attacks": (
        ["fgm", "pgd"],
        {},
        ("'fgm'", "'pgd'", "both take the place 'embedding_attack'", "remove 'fgm' or 'pgd'"),
    ),
    "full with lora": (["full", "lora"], {}, ("'full'", "'lora'", "'backbone'", "remove 'full' or 'lora'")),
    "maml without episodes": (["maml"], {}, ("'maml'", "'episodes'", "must come in episodes", "add `episodes:")),
    "reptile without episodes": (["reptile"], {}, ("'reptile'", "'episodes'", "add `episodes:")),
    "prototypes where the head trains first": (
        ["prototypical", EPISODES, "lp-ft"],
        {},
        ("'prototypical'", "'lp-ft'", "classifies nothing", "remove one of the two"),
    ),
    "prototypes and steps at test time": (
        ["prototypical", {"episodes": {"ways": 2, "adapt_parameters": ["classifier*"]}}],
        {},
        ("prototypical", "no gradient steps", "remove `adapt_parameters`"),
    ),
    "reptile over an inner attack": (
        ["reptile", EPISODES, "fgm"],
        {},
        ("'reptile'", "'fgm'", "silently do nothing", "remove 'fgm' or 'reptile'"),
    ),
    "replays at two places": (
        ["freeat", "awp"],
        {},
        ("freeat", "awp", "sum of both gradients", "remove one of the two"),
    ),
    "replays of rows that nobody evaluates": (
        ["freeat", "reptile", EPISODES],
        {},
        ("freeat", "reptile", "delta would stay 0", "remove one of the two"),
    ),
    "rdrop on a model without dropout": (
        ["rdrop"],
        {"model": "llama"},
        ("'rdrop'", "'dropout'", "two passes are identical", "lora: {dropout"),
    ),
    "maml with checkpointing": (
        ["maml", EPISODES],
        {"checkpointing": True},
        ("'maml'", "'functional'", "recomputed", "set `train.checkpointing: false`"),
    ),
    "one method twice": (["fgm", {"fgm": {"epsilon": 2}}], {}, ("'fgm'", "named twice", "keep one entry")),
    "two leaf losses": (
        ["label-smoothing", "class-weights"],
        {},
        ("'label-smoothing'", "'class-weights'", "'leaf_loss'", "remove"),
    ),
    "two schedules": (["linear", "cosine"], {}, ("'linear'", "'cosine'", "'scheduler'", "remove")),
    "two meta-learners": (["maml", "reptile", EPISODES], {}, ("'maml'", "'reptile'", "'meta'", "remove")),
    "a template with episodes": (
        [{"template": {"verbalizer": {"poor": "bad", "fine": "fine", "good": "good", "great": "great"}}}, EPISODES],
        {},
        ("'template'", "'episodes'", "renumber", "use one of the two"),
    ),
}


def config_of(methods: list[Any], output: Path, model: str | None = None, **train: Any) -> dict[str, Any]:
    return run_config(methods, output, model=checkpoint(model) if model else None, **train)


@pytest.mark.parametrize("look", ["plan", "validate", "train"])
@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_an_impossible_stack_is_refused(case: Refused, look: str, tmp_path: Path) -> None:
    methods, options, expected = case
    with pytest.raises(ConfigError) as caught:
        getattr(Engine(config_of(methods, tmp_path / "run", **options)), look)()
    (line,) = [line for line in str(caught.value).splitlines() if expected[0] in line and expected[-1] in line][:1]
    for part in expected:
        assert part in line
    assert list(tmp_path.iterdir()) == [], "a refusal wrote something"


def test_every_problem_of_a_stack_is_told_at_once(tmp_path: Path) -> None:
    methods = ["fgm", "pgd", "full", "lora", "rdrop", "maml", "linear", "cosine"]
    with pytest.raises(StackError) as caught:
        Engine(config_of(methods, tmp_path / "run", model="llama", checkpointing=True)).plan()
    told = caught.value.problems
    for part in ("embedding_attack", "backbone", "'dropout'", "'episodes'", "'functional'", "scheduler"):
        assert sum(part in problem for problem in told) == 1, part
    assert list(tmp_path.iterdir()) == []


def test_every_problem_of_a_config_is_told_at_once(tmp_path: Path) -> None:
    config = config_of(["fmg", {"pgd": {"epsilonn": 1}}, {"sam": {"rho": -1}}, "ema", "ema"], tmp_path / "run")
    config["train"].update(lr=-1, bach_size=2)
    with pytest.raises(ConfigError) as caught:
        Engine(config)
    told = caught.value.problems
    for part in ("'fmg'", "epsilonn", "rho", "named twice", "lr", "bach_size"):
        assert any(part in problem for problem in told), part
    assert "Did you mean 'fgm'" in str(caught.value) and "Did you mean 'batch_size'" in str(caught.value)


@pytest.mark.parametrize("methods", [["nothing"], ["fgm", "pgd"], []], ids=["unknown", "illegal", "legal"])
def test_looking_writes_nothing(methods: list[Any], tmp_path: Path) -> None:
    for look in ("validate", "plan"):
        try:
            getattr(Engine(config_of(methods, tmp_path / "run")), look)()
        except HybridEngineError:
            assert methods
        assert list(tmp_path.iterdir()) == []


def test_lora_dropout_is_the_way_out_that_is_told(tmp_path: Path) -> None:
    methods = ["rdrop", {"lora": {"r": 2, "dropout": 0.1}}]
    assert Engine(config_of(methods, tmp_path / "run", model="llama")).plan().phases


def test_a_schedule_that_starts_after_the_run_is_told(tmp_path: Path) -> None:
    engine = Engine(config_of(["rdrop", {"swa": {"start": 10**6}}], tmp_path / "run"))
    (note,) = engine.plan().notes
    assert note.startswith("swa never acts")
    assert note in engine.validate()
    assert not Engine(config_of([{"swa": {"start": 0}}], tmp_path / "run")).plan().notes
