"""A model whose losses are quadratics, so that inner loops have closed forms."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from hybridengine.seams import Batch, Context, Out, View

SIZE = 4


class Quadratic(nn.Module):
    """Its logits are its only parameter, once per row."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(start.clone())

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.theta.expand(input_ids.shape[0], -1))


class QuadraticTask:
    """L(theta) = sum over rows of (theta - c)' A (theta - c) / 2, with a centre c per row."""

    metric = "accuracy"
    greater_is_better = True
    head = ()

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def loss(self, ctx: Context, batch: Batch, view: View) -> Out:
        out = ctx.outputs(batch, [view])[0]
        gap = out.scores - batch.targets
        return Out({"loss": (((gap @ self.matrix) * gap).sum() / 2, "rows")}, out.logits, None, view)


def matrix(seed: int = 0) -> Tensor:
    """A symmetric positive matrix with eigenvalues of order 1."""
    root = torch.randn(SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return root @ root.T / SIZE + 0.5 * torch.eye(SIZE, dtype=torch.float64)


def centres(rows: int, seed: int, first_row: int = 0) -> Batch:
    """A batch of rows with random centres."""
    targets = torch.randn(rows, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    ids = torch.zeros(rows, 1, dtype=torch.long)
    counts = {"rows": rows, "all_rows": rows, "episodes": 1}
    return Batch({"input_ids": ids}, targets, tuple(range(first_row, first_row + rows)), counts=counts)


def episode(seed: int) -> Batch:
    """Query rows of their own, with support rows as a part; unequal numbers, so that weights matter."""
    from dataclasses import replace

    query = centres(5, 100 + seed)
    return replace(query, parts={"support": centres(3, 200 + seed), "query": query})
