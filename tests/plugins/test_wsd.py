"""The warmup-stable-decay schedule: up, flat, and down at the end."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rates import check_groups_and_resume, check_warmup, rates

from hybridengine_plugins.optim.wsd import WSD


@settings(max_examples=30, deadline=None)
@given(
    total=st.integers(1, 60),
    warm=st.integers(0, 70),
    decay=st.integers(0, 70),
    floor=st.sampled_from([0.0, 0.1, 1.0]),
    shape=st.sampled_from(["linear", "sqrt"]),
)
def test_values(total: int, warm: int, decay: int, floor: float, shape: str) -> None:
    w = min(warm, total)
    d = min(decay, total - w)
    fall = [k / d if shape == "linear" else math.sqrt(k / d) for k in range(d)]
    expected = [(t + 1) / w for t in range(w)] + [1.0] * (total - w - d) + [1 - (1 - floor) * x for x in fall]
    found = rates(WSD(warmup=warm, decay=decay, floor=floor, shape=shape), total)  # type: ignore[arg-type]
    assert found == pytest.approx(expected, abs=1e-12)


def test_warmup() -> None:
    check_warmup(WSD)


def test_a_share_is_of_all_steps() -> None:
    assert rates(WSD(decay=0.25), 20) == rates(WSD(decay=5), 20)
    with pytest.raises(ValueError, match="decay must be a share below 1"):
        WSD(decay=1.0)


def test_groups_and_resume() -> None:
    check_groups_and_resume(WSD)
