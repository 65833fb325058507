"""Some rows of a head: the scores of a few label words, as prompt learning needs them."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from hybridengine.kernels.embedding import embedding

__all__ = ["label_row_head"]


def label_row_head(x: Tensor, weight: Tensor, rows: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """Return `(x @ weight.T + bias)[..., rows]` without the other classes' logits.

    A thousandth of the arithmetic for thirty words of a vocabulary of 30,000, and the head's gradient is written for
    those rows alone where the kernel `embedding` runs. Differentiable any number of times.

    Args:
        x: [..., H].
        weight: [V, H], the whole head.
        rows: [R] int64, classes in any order, repeated or not.
        bias: [V].

    Returns:
        [..., R].

    Raises:
        IndexError: for a row that the head does not have.
        ValueError: for a wrong shape.
    """
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[1:] or rows.dim() != 1:
        raise ValueError(
            f"expected x [..., H], weight [V, H] and rows [R], got {tuple(x.shape)}, {tuple(weight.shape)} and "
            f"{tuple(rows.shape)}"
        )
    return functional.linear(x, embedding(weight, rows), None if bias is None else bias[rows])
