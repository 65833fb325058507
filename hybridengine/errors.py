"""Every error a user can meet. Each says what was wrong, what was expected, and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence

__all__ = [
    "ConfigError",
    "DataError",
    "HybridEngineError",
    "KernelUnavailable",
    "ModelError",
    "NoEffectError",
    "NonFiniteError",
    "OutputError",
    "PluginError",
    "SeamError",
    "StackError",
    "Stopped",
    "check_all",
    "did_you_mean",
]


class HybridEngineError(Exception):
    """Base of all errors meant for the user. `exit_code` is what the command line returns for it."""

    exit_code = 2


def check_all(*checks: Callable[[], object]) -> None:
    """Make every check, and raise what they found as one error of the first one's type."""
    found: list[HybridEngineError] = []
    for check in checks:
        try:
            check()
        except HybridEngineError as error:
            found.append(error)
    if found:
        found[0].args = ("\n".join(dict.fromkeys(map(str, found))),)
        raise found[0]


class ConfigError(HybridEngineError):
    """The configuration is wrong. Carries every problem found, not only the first."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class StackError(ConfigError):
    """The named methods cannot be stacked as asked; each problem names both sides, the reason and a way out."""


class DataError(HybridEngineError):
    """A data file or row cannot be used; the message carries file and row."""


class ModelError(HybridEngineError):
    """The model or tokenizer cannot be loaded or lacks something that a method or task needs."""


class OutputError(HybridEngineError):
    """The output folder cannot be used or written."""


class PluginError(HybridEngineError):
    """A plugin is broken: it names plugin, distribution, version and hook."""

    exit_code = 1


class SeamError(HybridEngineError):
    """A method broke a rule of a seam, e.g. a delta that no forward pass consumed."""

    exit_code = 1


class NonFiniteError(HybridEngineError):
    """Loss or gradient is NaN or infinite. Raised before the update; weights are unchanged."""

    exit_code = 1


class NoEffectError(HybridEngineError):
    """A method that should act had no measurable effect for several steps."""

    exit_code = 1


class KernelUnavailable(HybridEngineError):
    """An implementation was asked for by name and cannot run; the message lists every reason."""


class Stopped(HybridEngineError):
    """Training stopped on request (signal or callback) after writing a checkpoint."""

    def __init__(self, message: str, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the nearest known name, else the list of valid names."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f" Did you mean {near[0]!r}?"
    return f" Valid names: {', '.join(known)}." if known else ""
