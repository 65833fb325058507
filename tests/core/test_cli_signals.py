"""Signals ask training to stop; a second one is harmless, a third one ends the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from hybridengine.cli.signals import StopRequest


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_sets_the_flag_and_its_exit_code(number: signal.Signals, code: int) -> None:
    with StopRequest() as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop() and stop.exit_code == code


def test_the_first_signal_decides_and_the_second_is_ignored(capfd: pytest.CaptureFixture[str]) -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.exit_code == 143
    err = capfd.readouterr().err
    assert "SIGTERM: stopping after this step" in err and "SIGINT: still stopping" in err


def test_the_handlers_of_before_come_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopRequest():
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] != before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_the_third_signal_ends_the_process() -> None:
    code = """
import os, signal
from hybridengine.cli.signals import StopRequest
with StopRequest():
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGTERM)
    print("survived")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGTERM and "survived" not in done.stdout
