"""The cosine schedule: up in the warm-up, then half a cosine down to the floor."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rates import check_groups_and_resume, check_warmup, rates

from hybridengine_plugins.optim.cosine import Cosine


@settings(max_examples=30, deadline=None)
@given(total=st.integers(1, 60), warm=st.integers(0, 70), floor=st.sampled_from([0.0, 0.1, 1.0]))
def test_values(total, warm, floor):
    w = min(warm, total)
    expected = [(t + 1) / w for t in range(w)]
    expected += [floor + (1 - floor) * math.cos(math.pi * k / (total - w) / 2) ** 2 for k in range(total - w)]
    assert rates(Cosine(warmup=warm, floor=floor), total) == pytest.approx(expected, abs=1e-12)


def test_warmup():
    check_warmup(Cosine)


def test_groups_and_resume():
    check_groups_and_resume(Cosine)
