"""SGD against the published formula, and its treatment of groups."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hybridengine.plugin import ParamGroup
from hybridengine.testing import make_batch, set_up, tiny_bert
from hybridengine_plugins.optim.sgd import SGD


def _reference(
    value: Tensor, gradients: list[Tensor], lr: float, momentum: float, decay: float, nesterov: bool
) -> Tensor:
    """Sutskever et al. 2013 as torch has it: the rate outside of the velocity, which starts at the first gradient."""
    velocity = torch.zeros_like(value)
    for g in gradients:
        g = g + decay * value
        velocity = momentum * velocity + g
        value = value - lr * (g + momentum * velocity if nesterov else velocity)
    return value


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.8, True)])
def test_updates_follow_the_formula(momentum: float, nesterov: bool) -> None:
    run = set_up([], tiny_bert(num_labels=3), make_batch()).run
    run.config.train.lr = 0.02
    matrix = nn.Parameter(torch.arange(12, dtype=torch.float64).reshape(3, 4))
    bias = nn.Parameter(torch.ones(4, dtype=torch.float64))
    starts = matrix.detach().clone(), bias.detach().clone()
    method = SGD(momentum=momentum, nesterov=nesterov, weight_decay=0.1)
    optimizer = method.build_optimizer(run, [ParamGroup({"w": matrix, "b": bias})])
    gradients = [torch.full((3, 4), 0.5 * k - 0.7, dtype=torch.float64) for k in range(4)]
    for g in gradients:
        matrix.grad, bias.grad = g.clone(), g[0].clone()
        optimizer.step()
    wanted = _reference(starts[0], gradients, 0.02, momentum, 0.1, nesterov)
    torch.testing.assert_close(matrix.detach(), wanted, rtol=1e-12, atol=1e-12)
    wanted = _reference(starts[1], [g[0] for g in gradients], 0.02, momentum, 0.0, nesterov)
    torch.testing.assert_close(bias.detach(), wanted, rtol=1e-12, atol=1e-12)


def test_groups_override_rate_and_decay() -> None:
    run = set_up([], tiny_bert(num_labels=3), make_batch()).run
    matrix, other = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    groups = [ParamGroup({"a": matrix}, lr=7e-3), ParamGroup({"b": other}, weight_decay=0.5)]
    a, b = SGD(weight_decay=0.2).build_optimizer(run, groups).param_groups
    assert (a["lr"], a["weight_decay"]) == (7e-3, 0.2)
    assert (b["lr"], b["weight_decay"]) == (run.config.train.lr, 0.5)


def test_nesterov_needs_momentum() -> None:
    with pytest.raises(ValueError, match="momentum above 0"):
        SGD(momentum=0.0, nesterov=True)
