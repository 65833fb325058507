"""Progress of a training run: a bar with ETA on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from hybridengine.cli import console

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from hybridengine.train.progress import Event

__all__ = ["TrainingProgress"]

_EVERY = 5.0  # seconds between plain lines


class TrainingProgress:
    """Listens to the events of an engine; used as a context so that the bar always ends."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._last_line = 0.0
        self._loss: Any = None
        self._loss_step = 0

    def __enter__(self) -> TrainingProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_bar()

    def __call__(self, event: Event) -> None:
        if event.kind == "start":
            self._start(event)
        elif event.kind == "step":
            # The loss is read from the device now and then only; between, the last one is told with its step.
            if "loss" in event.values:
                self._loss, self._loss_step = event.values["loss"], event.step
            since = self._loss_step if self._loss_step != event.step else None
            self._step(event, {**event.values, "loss": self._loss, "loss_step": since})
        elif event.kind == "plan":
            self._say(f"each step: {event.message}")
        elif event.kind == "done":
            self._end_bar()
            self._say(event.message)
        else:
            self._say(event.message)

    def _say(self, message: str) -> None:
        if message:
            console.line(message)

    def _step(self, event: Event, values: dict[str, Any]) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=event.step, total=event.total, description=_numbers(values))
            return
        now = time.monotonic()
        # The first step is told at once: whoever waits sees that it runs, and an early ETA.
        if event.step == 1 or event.step == event.total or now - self._last_line >= _EVERY:
            self._last_line = now
            self._say(f"step {event.step}/{event.total}  {_numbers(values, eta=event.step < event.total)}".rstrip())

    def _start(self, event: Event) -> None:
        from hybridengine.data import card_lines

        if card := event.values.get("card"):
            for text in card_lines(card):
                self._say(text)
        self._say(event.message)
        if console.is_terminal():
            self._start_bar(event)

    def _start_bar(self, event: Event) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(bar_width=30), MofNCompleteColumn(), TextColumn("ETA"), TimeRemainingColumn())
        self._bar = Progress(*columns, TextColumn("{task.description}", markup=False), console=console.rich_console())
        self._task = self._bar.add_task("", total=event.total or None, completed=event.step)
        self._bar.start()

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _numbers(values: dict[str, Any], eta: bool = False) -> str:
    from hybridengine.report.words import compact, duration

    words = []
    if isinstance(loss := values.get("loss"), int | float):
        step = values.get("loss_step")
        words.append(f"loss {compact(loss)}" + (f" at step {step}" if step else ""))
    if isinstance(speed := values.get("samples_per_second"), int | float):
        words.append(f"{speed:,.1f} samples/s")
    if eta and isinstance(left := values.get("eta"), int | float):
        words.append(f"ETA {duration(left)}")
    return "  ".join(words)
