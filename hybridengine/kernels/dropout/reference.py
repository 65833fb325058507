"""The specification of counter-based dropout, in plain torch.

Element i of the flattened input lies in block b = i // 32. It is dropped where its random word is below p 2^32, and
multiplied by 1 / (1 - p) otherwise. The words come from Threefry-2x32 with 20 rounds (Salmon et al. 2011, "Parallel
random numbers: as easy as 1, 2, 3") under the key (seed mod 2^32, seed div 2^32) and the counter
(q mod 2^32, q div 2^32), q = 16 b + i % 16: the first word where i % 32 < 16, the second elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridengine.kernels.dispatch import record
from hybridengine.kernels.native import accumulator_dtype

__all__ = ["run", "threefry", "threshold"]

_ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
_MASK = 0xFFFFFFFF


def threshold(p: float) -> int:
    """The smallest random word that keeps its element."""
    return min(round(p * 2**32), _MASK)


def run(x: Tensor, p: float, seed: int) -> Tensor:
    """Return `x` with dropout."""
    record("dropout", "reference")
    index = torch.arange(x.numel(), device=x.device)
    counter = index // 32 * 16 + index % 16
    first, second = threefry((seed & _MASK, seed >> 32 & _MASK), (counter & _MASK, counter >> 32 & _MASK))
    keep = (torch.where(index % 32 < 16, first, second) >= threshold(p)).view(x.shape)
    return torch.where(keep, x.to(accumulator_dtype(x.dtype)) * (1 / (1 - p)), 0).to(x.dtype)


def threefry(key: tuple[int, int], counter: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Two random words for each counter; 32-bit words in int64 tensors."""
    keys = (*key, 0x1BD11BDA ^ key[0] ^ key[1])
    x0, x1 = counter[0] + keys[0] & _MASK, counter[1] + keys[1] & _MASK
    for turn in range(20):
        x0 = x0 + x1 & _MASK
        bits = _ROTATIONS[turn % 8]
        x1 = ((x1 << bits | x1 >> 32 - bits) & _MASK) ^ x0
        if turn % 4 == 3:
            injection = turn // 4 + 1
            x0 = x0 + keys[injection % 3] & _MASK
            x1 = x1 + keys[(injection + 1) % 3] + injection & _MASK
    return x0, x1
