"""Progress lines: the first step, one every few seconds, the last; a bar on a terminal."""

from __future__ import annotations

import pytest

from hybridengine.cli import console, progress
from hybridengine.cli.progress import TrainingProgress
from hybridengine.train.progress import Event


def feed(steps: int, seconds_per_step: float, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with TrainingProgress() as listen:
        listen(Event("plan", message="F8 B S"))
        listen(Event("start", 0, steps, "10 of 20 parameters are trained", {}))
        for step in range(1, steps + 1):
            clock[0] += seconds_per_step
            loss = {"loss": 0.5} if step == 2 else {}
            listen(Event("step", step, steps, "", {"eta": 90.0, "samples_per_second": 1234.5, **loss}))
        listen(Event("evaluate", steps, steps, "validation accuracy 0.9000"))
        listen(Event("done", steps, steps, "finished"))


def test_plain_lines_are_few_and_carry_the_last_loss(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    feed(100, 0.1, monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "each step: F8 B S",
        "10 of 20 parameters are trained",
        "step 1/100  1,234.5 samples/s  ETA 1 min 30 s",
    ]
    # 9.9 s pass after the first line: one more when 5 s are over, and the last step.
    steps = [line for line in lines if line.startswith("step ")]
    assert len(steps) == 3 and steps[1].startswith("step 5") and "loss 0.5 at step 2" in steps[1]
    assert steps[2] == "step 100/100  loss 0.5 at step 2  1,234.5 samples/s"
    assert lines[-2:] == ["validation accuracy 0.9000", "finished"]


def test_a_terminal_gets_a_bar_and_the_same_messages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    monkeypatch.setattr(console, "is_terminal", lambda: True)
    monkeypatch.setattr(console, "rich_console", lambda: Console(force_terminal=True, width=100, highlight=False))
    feed(4, 1.0, monkeypatch)
    out = capsys.readouterr().out
    assert "4/4" in out and "ETA" in out and "step 1/4" not in out
    for message in ("each step: F8 B S", "10 of 20 parameters", "validation accuracy 0.9000", "finished"):
        assert message in out
    assert out.count("\x1b[?25l") == out.count("\x1b[?25h") == 1  # the cursor was hidden, and shown again
