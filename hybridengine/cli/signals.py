"""Ctrl-C and SIGTERM ask training to stop after the current step; asking again does no harm."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any

from hybridengine.cli import console

__all__ = ["StopRequest"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """A context in which the two signals only set a flag. Calling it answers whether a stop was asked for.

    The first signal asks; the second is ignored with a message, so that it cannot cut a checkpoint in half; the third
    ends the process at once, as if it had never been caught.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._count = 0
        self._before: dict[int, Any] = {}

    def __call__(self) -> bool:
        return self.received is not None

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + (self.received or signal.SIGINT)

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        name = signal.Signals(number).name
        if self._count == 1:
            self.received = number
            _tell(f"{name}: stopping after this step, a checkpoint is written")
        elif self._count == 2:
            _tell(f"{name}: still stopping; once more ends at once and keeps only the last checkpoint")
        else:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def _tell(text: str) -> None:
    # A handler can interrupt a write to the same buffered stream, which Python forbids; the bare file is safe.
    os.write(2, f"\n{console.clean(text)}\n".encode())
