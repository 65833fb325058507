"""LP-FT: the head alone, then everything, as a plain loop makes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain import EXACT, LR, Plain, apart, bert, key

from hybridengine.plugin import Method
from hybridengine.stack import check_stack
from hybridengine.testing import Bench, make_batch, set_up
from hybridengine_plugins.adapters.gradual_unfreeze import GradualUnfreeze
from hybridengine_plugins.adapters.lora import LoRA
from hybridengine_plugins.adapters.lp_ft import LPFT

BATCH = make_batch()


def _bench(steps: int, *more: object) -> Bench:
    return set_up([LPFT(steps=steps), *more], bert(), BATCH, lr=LR)


def _above(name: str) -> bool:
    return "encoder" not in name and "embeddings" not in name


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_matches_a_plain_loop(steps: int) -> None:
    bench, plain = _bench(steps), Plain(bert())
    for step in range(3):
        bench.step([BATCH])
        gradient = plain.gradient(plain.loss(BATCH, key(step)))
        plain.descend({k: g for k, g in gradient.items() if step >= steps or _above(k)})
        assert apart(bench.parameters(), {k: p.detach() for k, p in plain.parameters.items()}) < EXACT


def test_what_rests_gets_neither_gradient_nor_optimizer_state() -> None:
    bench = _bench(1)
    bench.run.optimizer = torch.optim.AdamW(bench.run.may_optimise.values(), lr=0.1, weight_decay=0.5)
    before = bench.parameters()
    bench.step([BATCH])
    for name, p in bench.run.may_optimise.items():
        assert torch.equal(p, before[name]) != _above(name)
        assert (p in bench.run.optimizer.state) == _above(name)
    assert bench.effect("lp-ft", "resting") == sum(not _above(name) for name in before)


def test_an_error_inside_the_step_leaves_nothing_frozen() -> None:
    bench = _bench(1)
    with pytest.raises(KeyError):
        bench.step([type(BATCH)(inputs=BATCH.inputs, targets=BATCH.targets, counts={"tokens": 1})])
    assert all(p.requires_grad for p in bench.run.may_optimise.values())


def test_over_lora_the_adapters_wait() -> None:
    bench = set_up([LPFT(steps=1), LoRA(r=2)], bert().float(), BATCH, lr=LR, prepare=_head_is_new)
    before = bench.parameters()
    bench.step([BATCH])
    moved = {k for k, p in bench.parameters().items() if not torch.equal(p, before[k])}
    assert moved
    assert not any("lora" in name for name in moved)
    bench.step([BATCH])
    assert any("lora" in k and not torch.equal(p, before[k]) for k, p in bench.parameters().items())


def _head_is_new(run: Any) -> None:
    run.missing_parameters = ["classifier.weight", "classifier.bias"]


def test_not_beside_gradual_unfreezing() -> None:
    (problem,) = check_stack([Method("lp-ft", LPFT()), Method("gradual-unfreeze", GradualUnfreeze())], set())
    assert "remove one of the two" in problem
