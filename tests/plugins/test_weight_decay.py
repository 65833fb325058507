"""Weight decay reaches matrices alone, whatever the optimizer."""

from __future__ import annotations

import torch

from hybridengine.plugin import ParamGroup
from hybridengine.testing import make_batch, set_up, tiny_bert
from hybridengine_plugins.optim.adamw import AdamW
from hybridengine_plugins.optim.weight_decay import WeightDecay


def test_only_matrices_shrink_without_gradients():
    run = set_up([], tiny_bert(num_labels=3), make_batch()).run
    run.config.train.lr = 0.1
    groups = WeightDecay(value=0.5).transform_param_groups(run, [ParamGroup(dict(run.may_optimise))])
    optimizer = AdamW(weight_decay=0.9).build_optimizer(run, groups)
    before = {name: p.detach().clone() for name, p in run.may_optimise.items()}
    for p in run.may_optimise.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in run.may_optimise.items():
        factor = 0.95 if p.dim() >= 2 else 1.0  # 1 - lr * value
        torch.testing.assert_close(p.detach(), factor * before[name], msg=name)
    assert any(p.dim() < 2 for p in run.may_optimise.values())


def test_every_parameter_stays_in_exactly_one_group():
    run = set_up([], tiny_bert(num_labels=3), make_batch()).run
    groups = WeightDecay().transform_param_groups(run, [ParamGroup(dict(run.may_optimise), lr=1.0)])
    assert sorted(name for group in groups for name in group.parameters) == sorted(run.may_optimise)
    assert all(group.options["lr"] == 1.0 for group in groups)
