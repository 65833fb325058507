"""Gradual unfreezing: the schedule by hand, exact resume, and nothing left behind."""

from __future__ import annotations

import pytest
import torch

from hybridengine.testing import make_batch, set_up, tiny_bert
from hybridengine_plugins.adapters.gradual_unfreeze import GradualUnfreeze
from hybridengine_plugins.adapters.lora import LoRA

BATCH = make_batch()


def _bench(start=0, steps=2, **options):
    bench = set_up([GradualUnfreeze(steps=steps)], tiny_bert(num_labels=3), BATCH, lr=0.1, **options)
    bench.run.step = start
    return bench


def _parts(names):
    return {
        "head" if "encoder" not in n and "embeddings" not in n else n.split(".")[3 if "layer." in n else 1]
        for n in names
    }


def test_one_level_joins_every_few_steps():
    bench = _bench(steps=2)
    expected = [{"head"}] * 2 + [{"head", "1"}] * 2 + [{"head", "1", "0"}] * 2 + [{"head", "1", "0", "embeddings"}] * 3
    for parts in expected:
        before = bench.parameters()
        bench.step([BATCH])
        assert _parts(k for k, p in bench.parameters().items() if not torch.equal(p, before[k])) == parts
        assert all(p.requires_grad for p in bench.run.may_optimise.values())  # nothing is left behind


def test_the_waiting_parameters_get_neither_gradient_nor_optimizer_state():
    bench = _bench(steps=5)
    bench.run.optimizer = torch.optim.AdamW(bench.run.may_optimise.values(), lr=0.1, weight_decay=0.5)
    before = bench.parameters()
    bench.step([BATCH])
    for name, p in bench.run.may_optimise.items():
        waits = _parts([name]) != {"head"}
        assert (p.grad is None) == waits
        assert (p not in bench.run.optimizer.state) == waits
        assert torch.equal(p, before[name]) == waits or float(p.grad.abs().max()) == 0


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_resume_is_exact(cut):
    whole = _bench()
    for _ in range(8):
        whole.step([BATCH])
    first = _bench()
    for _ in range(cut):
        first.step([BATCH])
    second = _bench(start=cut)
    second.run.model.load_state_dict(first.run.model.state_dict())
    for _ in range(8 - cut):
        second.step([BATCH])
    for name, value in whole.parameters().items():
        assert torch.equal(value, second.parameters()[name]), name


def test_an_error_inside_the_step_restores_too():
    bench = _bench()
    with pytest.raises(KeyError):
        bench.step([make_batch().__class__(inputs=BATCH.inputs, targets=BATCH.targets, counts={"tokens": 1})])
    assert all(p.requires_grad for p in bench.run.may_optimise.values())


def test_levels_without_trainable_parameters_take_no_turn():
    bench = set_up([GradualUnfreeze(steps=1), LoRA(r=2, heads=[])], tiny_bert("AutoModelForMaskedLM"), BATCH, lr=0.1)
    bench.run.task.loss = lambda ctx, batch, view: _mask_loss(ctx, batch, view)
    seen = []
    for _ in range(3):
        before = bench.parameters()
        bench.step([BATCH])
        seen.append({k.split("layer.")[1][0] for k, p in bench.parameters().items() if not torch.equal(p, before[k])})
    assert seen == [{"1"}, {"0", "1"}, {"0", "1"}]


def _mask_loss(ctx, batch, view):
    from hybridengine.seams import Out

    out = ctx.outputs(batch, [view])[0]
    return Out({"loss": (out.scores.square().sum(), "rows")}, out.logits, None, view)
