"""Labels that are no class, noticed on a GPU: an error for the host that does not make it wait.

A kernel cannot refuse a label without a synchronisation. It treats the row as ignored and notes the first such label in
a flag on its device. The flag is copied to the host behind the kernel; whichever call finds the copy arrived raises.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybridengine.kernels.cross_entropy.layout import new_flag, raise_if_set

__all__ = ["LabelFlag", "flag_of"]


class LabelFlag:
    """The flag of one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._on_device = new_flag(device)
        self._copies: list[tuple[Tensor, Any, int]] = []
        self._free: list[tuple[Tensor, Any]] = []  # pinned memory and events that are used again

    def tensor(self) -> Tensor:
        """The flag for a kernel about to be launched; raises what earlier ones noted, if it has arrived."""
        while self._copies and self._copies[0][1].query():
            copy, event, ignore_index = self._copies.pop(0)
            self._free.append((copy, event))
            self._raise(copy, ignore_index)
        return self._on_device

    def launched(self, ignore_index: int) -> None:
        """Send the flag to the host behind the kernel that was just launched; at once where the host has it already."""
        if self.device.type == "cpu":
            self._raise(self._on_device, ignore_index)
            return
        copy, event = self._free.pop() if self._free else self._new()
        copy.copy_(self._on_device, non_blocking=True)
        event.record(torch.cuda.current_stream(self.device))
        self._copies.append((copy, event, ignore_index))

    @staticmethod
    def _new() -> tuple[Tensor, Any]:
        make: Any = torch.cuda.Event
        return torch.empty(3, dtype=torch.int64, pin_memory=True), make()

    def _raise(self, flag: Tensor, ignore_index: int) -> None:
        try:
            raise_if_set(flag, ignore_index)
        except IndexError:
            self._on_device.zero_()
            self._copies.clear()
            raise


_flags: dict[torch.device, LabelFlag] = {}


def flag_of(device: torch.device) -> LabelFlag:
    """Return the flag of `device`."""
    flag = _flags.get(device)
    if flag is None:
        flag = _flags[device] = LabelFlag(device)
    return flag
