"""Adafactor against the paper's algorithm, and its treatment of groups."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from hybridengine.plugin import ParamGroup
from hybridengine.testing import make_batch, set_up, tiny_bert
from hybridengine_plugins.optim.adafactor import Adafactor


def _reference(value: Tensor, gradients: list[Tensor], lr: float, clip: float, decay: float) -> Tensor:
    """Shazeer and Stern 2018, algorithms 4 and 5; beta of step 1 is 0."""
    rows, columns, whole = torch.zeros(value.shape[0], 1), torch.zeros(1, value.shape[-1]), torch.zeros_like(value)
    for t, g in enumerate(gradients, start=1):
        beta, rate = 1 - t**-0.8, min(lr, 1 / math.sqrt(t)) * max(1e-3, float(value.square().mean().sqrt()))
        value = value - lr * decay * value
        if value.dim() == 2:
            rows = beta * rows + (1 - beta) * g.square().mean(1, keepdim=True)
            columns = beta * columns + (1 - beta) * g.square().mean(0, keepdim=True)
            second = rows * columns / rows.mean()
        else:
            second = whole = beta * whole + (1 - beta) * g.square()
        update = g / second.sqrt()
        value = value - rate * update / max(1.0, float(update.square().mean().sqrt()) / clip)
    return value


@pytest.mark.parametrize("clip", [1.0, 1.2])
def test_updates_follow_the_formula(clip: float) -> None:
    run = set_up([], tiny_bert(num_labels=3), make_batch()).run
    run.config.train.lr = 0.02
    matrix = nn.Parameter(torch.arange(1, 13, dtype=torch.float64).reshape(3, 4) / 7)
    bias = nn.Parameter(torch.ones(4, dtype=torch.float64))
    starts = matrix.detach().clone(), bias.detach().clone()
    optimizer = Adafactor(clip=clip, weight_decay=0.1).build_optimizer(run, [ParamGroup({"w": matrix, "b": bias})])
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(3, 4, dtype=torch.float64, generator=generator) for _ in range(4)]
    for g in gradients:
        matrix.grad, bias.grad = g.clone(), g[0].clone()
        optimizer.step()
    # torch decays by the group's rate and floors by fp64's eps; nothing here comes near that floor.
    wanted = _reference(starts[0], gradients, 0.02, clip, 0.1)
    torch.testing.assert_close(matrix.detach(), wanted, rtol=1e-9, atol=1e-9)
    wanted = _reference(starts[1], [g[0] for g in gradients], 0.02, clip, 0.0)
    torch.testing.assert_close(bias.detach(), wanted, rtol=1e-9, atol=1e-9)


def test_it_keeps_vectors_for_matrices() -> None:
    run = set_up([], tiny_bert(num_labels=3), make_batch()).run
    matrix = nn.Parameter(torch.ones(30, 40))
    optimizer = Adafactor().build_optimizer(run, [ParamGroup({"w": matrix})])
    matrix.grad = torch.ones(30, 40)
    optimizer.step()
    assert sum(v.numel() for v in optimizer.state[matrix].values() if isinstance(v, Tensor)) <= 30 + 40 + 1


def test_groups_override_the_rate() -> None:
    run = set_up([], tiny_bert(num_labels=3), make_batch()).run
    groups = [ParamGroup({"a": nn.Parameter(torch.ones(2, 2))}, lr=7e-3)]
    assert Adafactor().build_optimizer(run, groups).param_groups[0]["lr"] == 7e-3
