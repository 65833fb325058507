"""Hide some words of a text, for a model to fill in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["hide_tokens"]


def hide_tokens(
    tokenizer: Any,
    ids: Tensor,
    ordinary: Tensor,
    draws: Tensor,
    *,
    share: float = 0.15,
    masked: float = 0.8,
    replaced: float = 0.1,
) -> tuple[Tensor, Tensor]:
    """Choose ordinary tokens, each with probability `share` and at least one a row, and hide most of them.

    Args:
        ids: `[B, L]`.
        ordinary: `[B, L]`, which tokens may be chosen.
        draws: `[B, L, 3]` uniform numbers: whether a token is chosen, what becomes of it, and which token that is.
        share: probability of being chosen.
        masked: share of the chosen tokens that become the mask token.
        replaced: share of them that become a random ordinary token; the rest stay.

    Returns:
        The changed ids, and which tokens were chosen.
    """
    ordinary = ordinary & (ids >= 0)  # a soft token is no word, though an attack may move it
    rank = draws[..., 0].masked_fill(~ordinary, 2.0)
    # The lowest draw is among the chosen whenever any is; it alone is chosen in rows that would have none.
    chosen = ordinary & ((rank < share) | (rank == rank.min(1, keepdim=True).values))
    special = torch.tensor(tokenizer.all_special_ids, device=ids.device)
    other = (draws[..., 2] * len(tokenizer)).long().clamp_max(len(tokenizer) - 1)
    other = torch.where(torch.isin(other, special), tokenizer.mask_token_id, other)
    as_mask = chosen & (draws[..., 1] < masked)
    as_other = chosen & ~as_mask & (draws[..., 1] < masked + replaced)
    return torch.where(as_mask, tokenizer.mask_token_id, torch.where(as_other, other, ids)), chosen
