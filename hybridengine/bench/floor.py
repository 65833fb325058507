"""The floor of a case: no implementation can be faster than moving its bytes and doing its products takes.

    floor = bytes that must move / copy bandwidth + FLOPs of the products / rate of a large product

Both rates are measured in the same run. The bandwidth counts what a copy reads and what it writes. Data that stays in
the cache, or that is changed in place, can beat a copy: a share above 100% is no error.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

__all__ = ["Rates", "floor_seconds"]

_COPIED = {"cpu": 128 << 20, "cuda": 1 << 30}
_SIDE = {"cpu": 1024, "cuda": 8192}


def floor_seconds(moved: float, flops: float, bandwidth: float, rate: float) -> float:
    """Return the least seconds for bytes and FLOPs at these rates a second."""
    return moved / bandwidth + (flops / rate if flops else 0.0)


@dataclass
class Rates:
    """What the device reaches, each measured when first asked for."""

    device: torch.device
    bandwidth: float = 0.0
    products: dict[torch.dtype, float] = field(default_factory=dict)

    def floor(self, moved: float, flops: float, dtype: torch.dtype) -> float:
        """Return the floor of a case in seconds."""
        if not self.bandwidth:
            self.bandwidth = self._copy()
        if flops and dtype not in self.products:
            self.products[dtype] = self._product(dtype)
        return floor_seconds(moved, flops, self.bandwidth, self.products.get(dtype, 1.0))

    def _copy(self) -> float:
        size = _COPIED[self.device.type]
        source = torch.ones(size // 4, device=self.device)
        target = torch.empty_like(source)
        return 2 * size / self._best(lambda: target.copy_(source))

    def _product(self, dtype: torch.dtype) -> float:
        side = _SIDE[self.device.type]
        left, right = (torch.randn(side, side, device=self.device).to(dtype) for _ in range(2))
        result = torch.empty_like(left)
        return 2 * side**3 / self._best(lambda: torch.mm(left, right, out=result))

    def _best(self, call: Callable[[], object], seconds: float = 0.5) -> float:
        """The fastest of some calls: a floor is what is possible, not what is usual."""
        times: list[float] = []
        call()
        begun = time.perf_counter()
        while len(times) < 5 or (time.perf_counter() - begun < seconds and len(times) < 50):
            self._wait()
            start = time.perf_counter()
            call()
            self._wait()
            times.append(time.perf_counter() - start)
        return min(times)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
