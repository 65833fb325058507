"""Every exception becomes one clear message and the right exit code."""

from __future__ import annotations

import errno

import pytest

from hybridengine.cli import console, failures
from hybridengine.errors import (
    ConfigError,
    DataError,
    KernelUnavailable,
    ModelError,
    NoEffectError,
    NonFiniteError,
    OutputError,
    PluginError,
    SeamError,
    StackError,
    Stopped,
)


class OutOfMemoryError(RuntimeError):
    """Named as torch names it."""


def blamed() -> ValueError:
    error = ValueError("bad epsilon")
    error.add_note("raised by plugin 'mine' (acme 1.2) in hook wrap_loss")
    return error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), 2),
        (StackError("x"), 2),
        (DataError("x"), 2),
        (ModelError("x"), 2),
        (OutputError("x"), 2),
        (KernelUnavailable("x"), 2),
        (PluginError("x"), 1),
        (SeamError("x"), 1),
        (NonFiniteError("x"), 1),
        (NoEffectError("x"), 1),
        (Stopped("x"), 130),
        (Stopped("x", 143), 143),
        (KeyboardInterrupt(), 130),
        (blamed(), 1),
        (MemoryError(), 1),
        (OSError(errno.ENOSPC, "No space left on device", "f"), 1),
        (ZeroDivisionError("x"), 1),
    ],
)
def test_exit_codes(error: BaseException, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert failures.report(error) == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "Traceback" not in err


def told(error: BaseException, capsys: pytest.CaptureFixture[str], debug: bool = False) -> str:
    failures.report(error, debug)
    return capsys.readouterr().err


def test_every_problem_of_a_config_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert told(ConfigError(["a:1: one", "a:2: two"]), capsys) == "error: a:1: one\nerror: a:2: two\n"


def test_a_plugin_is_blamed_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    text = told(blamed(), capsys)
    assert "ValueError: bad epsilon (raised by plugin 'mine' (acme 1.2) in hook wrap_loss)" in text
    assert "internal" not in text


def test_an_unexpected_error_is_one_line_that_names_debug(capsys: pytest.CaptureFixture[str]) -> None:
    assert told(RuntimeError("first\nsecond"), capsys) == (
        "error: internal error: RuntimeError: first; run again with --debug to see where\n"
    )
    assert told(RuntimeError(), capsys).startswith("error: internal error: RuntimeError; run again")


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise ZeroDivisionError("division")
    except ZeroDivisionError as error:
        text = told(error, capsys, debug=True)
    assert "Traceback" in text and "test_cli_failures.py" in text and "--debug" not in text.splitlines()[-1]


@pytest.mark.parametrize(
    "error",
    [MemoryError(), OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")],
)
def test_out_of_memory_says_what_to_lower(error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    assert "train.batch_size" in told(error, capsys)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "x", "runs/a"),
        OSError(errno.EDQUOT, "x"),
        RuntimeError("No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_says_how_to_go_on(error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    text = told(error, capsys)
    assert "disk is full" in text and "last checkpoint" in text
    assert ("runs/a" in text) == (getattr(error, "filename", None) is not None)


def test_a_system_error_names_its_file(capsys: pytest.CaptureFixture[str]) -> None:
    error = PermissionError(errno.EACCES, "Permission denied", "a.txt")
    assert told(error, capsys) == "error: a.txt: Permission denied\n"


def test_control_characters_never_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "label \x1b[2J\x07\x9b31m\r end"
    failures.report(DataError(hostile))
    console.line(hostile)
    console.table(("a",), [(hostile,)])
    out, err = capsys.readouterr()
    for text in (out, err):
        assert not any((ord(c) < 32 and c != "\n") or 127 <= ord(c) < 160 for c in text)
        assert "label" in text and "end" in text


def test_a_table_is_aligned_plain_text_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console.table(("name", "value"), [("a", 1), ("longer", None)], indent="  ")
    assert capsys.readouterr().out == "  name    value\n  a       1\n  longer\n"
