"""The specification of counter-based dropout, in plain torch.

An element is dropped where its 16-bit random number is below t = round(p 2^16), and multiplied by 2^16 / (2^16 - t)
otherwise: the expectation is exact, the probability is within 2^-17 of p. Element i of the flattened input takes its
number from Threefry-2x32 with 20 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") under the
key (seed mod 2^32, seed div 2^32) and the counter (q mod 2^32, q div 2^32), q = 16 (i div 64) + i mod 16. By
(i mod 64) div 16 = 0, 1, 2, 3 it is the low half of the first word, the low half of the second, the high half of the
first, or the high half of the second.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridengine.kernels.dispatch import record
from hybridengine.kernels.native import accumulator_dtype

__all__ = ["run", "scale", "threefry", "threshold"]

_ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
_MASK = 0xFFFFFFFF


def threshold(p: float) -> int:
    """The smallest random number that keeps its element; at least one in 2^16 is kept."""
    return min(round(p * 2**16), 2**16 - 1)


def run(x: Tensor, p: float, seed: int) -> Tensor:
    """Return `x` with dropout."""
    record("dropout", "reference")
    index = torch.arange(x.numel(), device=x.device)
    counter, part = index // 64 * 16 + index % 16, index % 64 // 16
    first, second = threefry((seed & _MASK, seed >> 32 & _MASK), (counter & _MASK, counter >> 32 & _MASK))
    numbers = torch.where(part % 2 == 0, first, second) >> 16 * (part // 2) & 0xFFFF
    keep = (numbers >= threshold(p)).view(x.shape)
    return torch.where(keep, x.to(accumulator_dtype(x.dtype)) * scale(p), 0).to(x.dtype)


def scale(p: float) -> float:
    """What a kept element is multiplied by."""
    return 2**16 / (2**16 - threshold(p))


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
