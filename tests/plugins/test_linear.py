"""The linear schedule: up in the warm-up, then straight down to the floor."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rates import check_groups_and_resume, check_warmup, rates

from hybridengine_plugins.optim.linear import Linear


@settings(max_examples=30, deadline=None)
@given(total=st.integers(1, 60), warm=st.integers(0, 70), floor=st.sampled_from([0.0, 0.1, 1.0]))
def test_values(total, warm, floor):
    w = min(warm, total)
    expected = [(t + 1) / w for t in range(w)]
    expected += [floor + (1 - floor) * (1 - k / (total - w)) for k in range(total - w)]
    assert rates(Linear(warmup=warm, floor=floor), total) == pytest.approx(expected, abs=1e-12)


def test_warmup():
    check_warmup(Linear)


def test_groups_and_resume():
    check_groups_and_resume(Linear)
