"""From exceptions to one clear message and an exit code: 0 done, 1 failed, 2 bad input, 130 and 143 stopped."""

from __future__ import annotations

import errno
import traceback

import typer

from hybridengine.cli import console
from hybridengine.errors import HybridEngineError, Stopped

__all__ = ["report"]

_BLAME = "raised by plugin"
_NO_SPACE = "No space left on device"
_NO_MEMORY = ("can't allocate memory", "CUDA out of memory", "not enough memory")


def report(error: BaseException, debug: bool = False) -> int:
    """Print what went wrong to stderr and return the exit code."""
    if debug:
        traceback.print_exception(error)
    if isinstance(error, Stopped):
        console.note(error)
        return error.exit_code
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        console.note("stopped: interrupted")
        return 130
    if callable(message := getattr(error, "format_message", None)):
        return _usage(error, message())
    if isinstance(error, HybridEngineError):
        console.error("\n".join([str(error), *_notes(error)]))
        return error.exit_code
    console.error(_described(error) + ("" if debug else _hint(error)))
    return 1


def _usage(error: BaseException, message: str) -> int:
    """An error of the command line itself, which typer found."""
    if "\n" in message:  # a group without a command: typer's message is the help text
        console.note(message)
        return 2
    context = getattr(error, "ctx", None)
    console.error(message)
    if context is not None:
        console.note(context.get_usage())
        console.note(f"help: {context.command_path} --help")
    return 2


def _described(error: BaseException) -> str:
    kind = f"{type(error).__name__}: {_first_line(error)}".removesuffix(": ")
    blamed = [note for note in _notes(error) if note.startswith(_BLAME)]
    if _out_of_memory(error):
        return (
            "out of memory; lower train.batch_size (and raise train.accumulate by the same factor), lower"
            " train.max_length, or set train.checkpointing: true"
        )
    if _out_of_space(error):
        name = getattr(error, "filename", None)
        where = f" while writing {name}" if name else ""
        return (
            f"the disk is full{where}; free some space and run the command again: it goes on from the last checkpoint"
        )
    if blamed:
        return f"{kind} ({blamed[0]})"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror or error}"
    return f"internal error: {kind}"


def _hint(error: BaseException) -> str:
    known = _out_of_memory(error) or _out_of_space(error) or (isinstance(error, OSError) and error.filename)
    return "" if known else "; run again with --debug to see where"


def _out_of_memory(error: BaseException) -> bool:
    # By name, so that this module does not import torch.
    named = any(cls.__name__ == "OutOfMemoryError" for cls in type(error).__mro__)
    told = isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)
    return isinstance(error, MemoryError) or named or told


def _out_of_space(error: BaseException) -> bool:
    # safetensors reports a full disk as an error of its own type, with the system's text.
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or _NO_SPACE in str(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", []))
