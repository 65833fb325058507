"""Draw tokens from logits by given numbers, so that a draw is a function of its key alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

__all__ = ["by_length", "sample_top_k"]


def sample_top_k(logits: Tensor, uniform: Tensor, k: int, *, temperature: float = 1.0) -> Tensor:
    """Draw a token from the k likeliest of each row, by inversion.

    The chance of a token is softmax(logits / temperature) among the k; entries of -inf are never drawn.

    Args:
        logits: `[B, V]`, each row with a finite entry.
        uniform: `[B]`, numbers in [0, 1).

    Returns:
        Token ids `[B]`.
    """
    best, ids = logits.double().topk(min(k, logits.shape[-1]), dim=-1)
    reached = (best / temperature).softmax(-1).cumsum(-1)
    threshold = uniform.to(reached)[:, None] * reached[:, -1:]  # rounding may leave a sum below 1
    last = best.isfinite().sum(-1, keepdim=True) - 1
    return ids.gather(-1, (reached <= threshold).sum(-1, keepdim=True).minimum(last))[:, 0]


def by_length(texts: Sequence[str], size: int) -> Iterator[list[int]]:
    """Positions of the texts in batches of similar length, so that little is padded."""
    order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))
    return (order[start : start + size] for start in range(0, len(order), size))
