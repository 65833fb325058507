"""The three schedules against their closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from hybridengine_plugins.optim.constant import Constant
from hybridengine_plugins.optim.cosine import Cosine
from hybridengine_plugins.optim.linear import Linear
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hybridengine.testing import make_batch, set_up, tiny_bert

RUN = set_up([], tiny_bert(num_labels=3), make_batch()).run


def rates(schedule, total, peak=1.0):
    """The rate that each of `total` updates uses."""
    RUN.total_steps = total
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = schedule.build_scheduler(RUN, optimizer)
    seen = []
    for _ in range(total):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


@settings(max_examples=30, deadline=None)
@given(total=st.integers(1, 60), warm=st.integers(0, 70), floor=st.sampled_from([0.0, 0.1, 1.0]))
def test_values(total, warm, floor):
    w = min(warm, total)
    up = [(t + 1) / w for t in range(w)]
    down = range(total - w)
    line = up + [floor + (1 - floor) * (1 - k / (total - w)) for k in down]
    wave = up + [floor + (1 - floor) * math.cos(math.pi * k / (total - w) / 2) ** 2 for k in down]
    flat = up + [1.0 for _ in down]
    assert rates(Linear(warmup=warm, floor=floor), total) == pytest.approx(line, abs=1e-12)
    assert rates(Cosine(warmup=warm, floor=floor), total) == pytest.approx(wave, abs=1e-12)
    assert rates(Constant(warmup=warm), total) == pytest.approx(flat, abs=1e-12)


@pytest.mark.parametrize("schedule", [Linear, Cosine, Constant])
def test_a_share_is_of_all_steps_and_a_whole_number_is_steps(schedule):
    assert rates(schedule(warmup=0.25), 20) == rates(schedule(warmup=5), 20)
    assert rates(schedule(warmup=1), 20)[0] == 1.0
    assert min(rates(schedule(), 100)) > 0  # no update is wasted
    with pytest.raises(ValueError, match="share below 1"):
        schedule(warmup=1.0)


@pytest.mark.parametrize("schedule", [Linear, Cosine, Constant])
def test_groups_keep_their_proportion_and_state_resumes(schedule):
    RUN.total_steps = 10

    def build():
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
