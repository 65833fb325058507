"""The learning rates that a schedule gives, and the checks that all schedules share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hybridengine.testing import make_batch, set_up, tiny_bert

RUN = set_up([], tiny_bert(num_labels=3), make_batch()).run


def rates(schedule: Any, total: int) -> list[float]:
    """The rate that each of `total` updates uses, at peak rate 1."""
    RUN.total_steps = total
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = schedule.build_scheduler(RUN, optimizer)
    seen = []
    for _ in range(total):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def check_warmup(schedule: Any) -> None:
    """A share is of all steps, a whole number is steps, and no update is wasted at rate 0."""
    assert rates(schedule(warmup=0.25), 20) == rates(schedule(warmup=5), 20)
    assert rates(schedule(warmup=0), 20)[0] == rates(schedule(warmup=1), 20)[0] == 1.0
    assert min(rates(schedule(), 100)) > 0
    with pytest.raises(ValueError, match="share below 1"):
        schedule(warmup=1.0)


def check_groups_and_resume(schedule: Any) -> None:
    """Groups keep their proportion, and a restored schedule goes on with the same rates."""
    RUN.total_steps = 10

    def build() -> tuple[Any, Any]:
        groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.1, 0.01)]
        optimizer = torch.optim.SGD(groups)
        return optimizer, schedule(warmup=3).build_scheduler(RUN, optimizer)

    optimizer, scheduler = build()
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    again, resumed = build()
    again.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    for _ in range(5):
        for o, s in ((optimizer, scheduler), (again, resumed)):
            o.step()
            s.step()
        first, second = (group["lr"] for group in optimizer.param_groups)
        assert first == pytest.approx(10 * second)
        assert [group["lr"] for group in again.param_groups] == [first, second]
