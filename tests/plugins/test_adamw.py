"""AdamW against the published formula, and its treatment of groups."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hybridengine.plugin import ParamGroup
from hybridengine.testing import make_batch, set_up, tiny_bert
from hybridengine_plugins.optim.adamw import AdamW


def _run(**train):
    return set_up([], tiny_bert(num_labels=3), make_batch(), lr=0.0, **train).run


def _reference(value, gradients, lr, betas, eps, decay):
    """Loshchilov and Hutter, algorithm 2, in the order of their paper."""
    m = v = torch.zeros_like(value)
    for t, g in enumerate(gradients, start=1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
        value = value - lr * (m_hat / (v_hat.sqrt() + eps) + decay * value)
    return value


@pytest.mark.parametrize("fused", [None, False])
def test_updates_follow_the_formula(fused):
    run = _run()
    run.config.train.lr = 0.02
    matrix = nn.Parameter(torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    bias = nn.Parameter(torch.ones(4, dtype=torch.float64))
    starts = {"w": matrix.detach().clone(), "b": bias.detach().clone()}
    optimizer = AdamW(betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, fused=fused).build_optimizer(
        run, [ParamGroup({"w": matrix, "b": bias})]
    )
    gradients = [torch.full((3, 4), 0.5 * k - 0.7, dtype=torch.float64) for k in range(4)]
    for g in gradients:
        matrix.grad, bias.grad = g.clone(), g[0].clone()
        optimizer.step()
    expected = _reference(starts["w"], gradients, 0.02, (0.8, 0.95), 1e-6, 0.1)
    torch.testing.assert_close(matrix.detach(), expected, rtol=1e-12, atol=1e-12)
    expected = _reference(starts["b"], [g[0] for g in gradients], 0.02, (0.8, 0.95), 1e-6, 0.0)
    torch.testing.assert_close(bias.detach(), expected, rtol=1e-12, atol=1e-12)


def test_fused_where_the_device_has_it():
    run = _run()
    optimizer = AdamW().build_optimizer(run, [ParamGroup(dict(run.may_optimise))])
    assert all(group["fused"] for group in optimizer.param_groups)


def test_groups_override_rate_and_decay():
    run = _run()
    matrix, other = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    groups = [ParamGroup({"a": matrix}, lr=7e-3, weight_decay=0.5), ParamGroup({"b": other}, lr=1e-3)]
    a, b = AdamW(weight_decay=0.2).build_optimizer(run, groups).param_groups
    assert (a["lr"], a["weight_decay"]) == (7e-3, 0.5)
    assert (b["lr"], b["weight_decay"]) == (1e-3, 0.2)


def test_every_parameter_is_in_one_group():
    run = _run()
    optimizer = AdamW().build_optimizer(run, [ParamGroup(dict(run.may_optimise))])
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in run.may_optimise.values())


def test_refuses_betas_outside_their_range():
    with pytest.raises(ValueError, match="betas"):
        AdamW(betas=(0.9, 1.0))
