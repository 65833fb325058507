"""The constant schedule: up in the warm-up, then flat."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rates import check_groups_and_resume, check_warmup, rates

from hybridengine_plugins.optim.constant import Constant


@settings(max_examples=30, deadline=None)
@given(total=st.integers(1, 60), warm=st.integers(0, 70))
def test_values(total, warm):
    w = min(warm, total)
    expected = [(t + 1) / w for t in range(w)]
    expected += [1.0 for _ in range(total - w)]
    assert rates(Constant(warmup=warm), total) == pytest.approx(expected, abs=1e-12)


def test_warmup():
    check_warmup(Constant)


def test_groups_and_resume():
    check_groups_and_resume(Constant)
