"""`pooled`: means and first tokens of rows padded on either side."""

from __future__ import annotations

import pytest
import torch

from hybridengine.seams import pooled

STATES = torch.arange(12, dtype=torch.float64).view(2, 3, 2)
MASKS = {"right": [[1, 1, 0], [1, 1, 1]], "left": [[0, 1, 1], [1, 1, 1]]}


@pytest.mark.parametrize("side", MASKS)
def test_padding_counts_nowhere(side: str) -> None:
    mask = torch.tensor(MASKS[side])
    rows = [states[keep.bool()] for states, keep in zip(STATES, mask, strict=True)]
    assert torch.equal(pooled(STATES, mask, "mean"), torch.stack([row.mean(0) for row in rows]))
    assert torch.equal(pooled(STATES, mask, "first"), torch.stack([row[0] for row in rows]))


def test_half_precision_is_pooled_in_float32() -> None:
    assert pooled(STATES.bfloat16(), torch.ones(2, 3, dtype=torch.long), "mean").dtype == torch.float32
