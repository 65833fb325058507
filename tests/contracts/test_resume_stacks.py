"""Killed at any step and resumed = uninterrupted, bit for bit, whatever the stack."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import LABELS, checkpoint, checkpoint_bits, run_bits, run_config, train_stopping_after

from hybridengine.engine import Engine

EPISODES = {"episodes": {"ways": 2, "shots": 1, "queries": 2, "per_epoch": 3, "evaluation_episodes": 2}}
CORE: dict[str, dict[str, Any]] = {
    "freelb": {"methods": [{"freelb": {"init": 0.5, "epsilon": 0.5}}]},
    "maml": {"methods": [{"maml": {"inner_steps": 2}}, EPISODES], "accumulate": 2},
    "ema": {"methods": [{"ema": {"decay": 0.9}}]},
    "sam": {"methods": ["sam"]},
    "rdrop": {"methods": ["rdrop"]},
    "eda": {"methods": [{"eda": {"alpha": 0.2}}]},
}
TEMPLATE = {"template": {"text": "{text} [MASK]", "verbalizer": {label: label for label in LABELS}}}
PET = {"pet": {"patterns": ["a {text} was [MASK]"], "mlm_weight": 0.1}}
MORE: dict[str, dict[str, Any]] = {
    "uda+eda": {"methods": [{"eda": {"copies": 0}}, {"uda": {"annealing": "linear"}}], "unlabelled": True},
    "self-training+eda, accumulated": {
        "methods": [{"eda": {"copies": 1}}, {"self-training": {"memory": 0.5, "start": 1}}],
        "accumulate": 2,
        "unlabelled": True,
    },
    "vat+fgm, accumulated": {"methods": ["vat", "fgm"], "accumulate": 2, "unlabelled": True},
    "gradual-unfreeze": {"methods": [{"gradual-unfreeze": {"steps": 2}}]},
    "adapter+ema": {"methods": [{"adapter": {"size": 4}}, {"ema": {"decay": 0.9}}]},
    "layer-drop+rdrop": {"methods": [{"layer-drop": {"p": 0.5}}, "rdrop"]},
    "lisa": {"methods": [{"lisa": {"layers": 1, "every": 1}}]},
    "lora+rdrop": {"methods": [{"lora": {"r": 2, "dropout": 0.1}}, "rdrop"]},
    "masked-language-modeling": {"methods": [], "task": "masked-language-modeling"},
    "sam+ema+freelb+rdrop": {"methods": ["sam", {"ema": {"decay": 0.9}}, "freelb", "rdrop"], "accumulate": 2},
    "early-stopping": {
        # A learning rate of almost nothing: validation never gets better, so the run stops at the third evaluation.
        "methods": [{"early-stopping": {"patience": 2}}],
        "lr": 1e-12,
        "evaluate_every": 1,
        "max_steps": 9,
    },
    "reptile": {"methods": ["reptile", EPISODES], "accumulate": 2},
    "anil": {"methods": [{"anil": {"inner_steps": 2}}, EPISODES], "accumulate": 2},
    "meta-sgd": {"methods": ["meta-sgd", EPISODES], "accumulate": 2},
    "maml-plus-plus": {
        "methods": [{"maml-plus-plus": {"inner_steps": 2, "multi_step": 3, "first_order_steps": 2}}, EPISODES]
    },
    "prototypical": {"methods": ["prototypical", EPISODES], "accumulate": 2},
    "tavat": {"methods": ["tavat"], "accumulate": 2},
    "smart": {"methods": [{"smart": {"decay": 0.9}}], "accumulate": 2},
    "look-sam": {"methods": [{"look-sam": {"every": 3}}], "accumulate": 2},
    "workers": {"methods": ["fgm"], "workers": 2, "accumulate": 2},
    "cosine+llrd+weight-decay": {"methods": ["cosine", "llrd", "weight-decay", "label-smoothing"]},
    "pet, accumulated": {"methods": [TEMPLATE, PET], "accumulate": 2, "unlabelled": True, "masked": True},
    "demonstrations+soft-verbalizer+calibration": {
        "methods": [TEMPLATE, {"demonstrations": {"share": 0.8, "contexts": 2}}, "soft-verbalizer", "calibration"],
        "masked": True,
    },
    "verbalizer+rdrop": {"methods": [{"template": {"text": "{text} [MASK]"}}, "verbalizer", "rdrop"], "masked": True},
    "pgd+class-weights": {"methods": ["pgd", "class-weights"]},
}


def config_of(stack: dict[str, Any], output: Path) -> dict[str, Any]:
    options = {"max_steps": 4, "save_every": 2, "evaluate_every": 2, "keep": 9, **stack}
    if options.pop("masked", False):
        dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
        options["model"] = checkpoint("bert", "AutoModelForMaskedLM", **dropout)
    return run_config(output=output, **options)


def assert_stopping_everywhere_changes_nothing(make: Callable[[Path], dict[str, Any]], tmp_path: Path) -> None:
    """One engine per step, each resuming the last one's checkpoint, against one engine for all steps."""
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    Engine(make(whole)).train()
    starts = 1
    while not train_stopping_after(make(pieces), 1):
        starts += 1
        assert starts < 20
    assert starts > 2, "the run never stopped on the way"
    for saved in (whole / "checkpoints").iterdir():
        assert checkpoint_bits(pieces / "checkpoints" / saved.name) == checkpoint_bits(saved), saved.name
    assert run_bits(pieces) == run_bits(whole)


@pytest.mark.parametrize("stack", CORE.values(), ids=CORE.keys())
def test_a_run_stopped_after_every_step_is_the_uninterrupted_run(stack: dict[str, Any], tmp_path: Path) -> None:
    assert_stopping_everywhere_changes_nothing(lambda output: config_of(stack, output), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("stack", MORE.values(), ids=MORE.keys())
def test_other_stacks_stopped_after_every_step(stack: dict[str, Any], tmp_path: Path) -> None:
    assert_stopping_everywhere_changes_nothing(lambda output: config_of(stack, output), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("stack", [*CORE.values(), *MORE.values()], ids=[*CORE, *MORE])
def test_a_run_stopped_once_at_any_step_is_the_uninterrupted_run(stack: dict[str, Any], tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    steps = Engine(config_of(stack, whole)).train()["steps"]
    for stop in range(1, steps):
        output = tmp_path / f"stopped-{stop}"
        assert not train_stopping_after(config_of(stack, output), stop)
        Engine(config_of(stack, output)).train()
        assert run_bits(output) == run_bits(whole), f"stopped at step {stop}"
