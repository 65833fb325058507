"""Which implementation of an operation runs, why, and how often it did.

An operation has implementations in a fixed order of preference (`ORDER`). Each answers two questions: `why_not`, what
makes it unable to run these arguments, and `why_slower`, what makes it a bad choice although it could. The first
without an objection runs. An implementation that the caller or `HYBRIDENGINE_IMPL` names is asked only whether it can,
and refuses with every reason if it cannot: nothing else is run in its stead.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from hybridengine.errors import KernelUnavailable, did_you_mean

__all__ = [
    "ORDER",
    "Implementation",
    "Operation",
    "Row",
    "explain",
    "is_overridden",
    "read_environment",
    "record",
    "reset_used",
    "used",
]

ORDER = ("cuda", "triton", "cpu", "reference")
ENVIRONMENT = "HYBRIDENGINE_IMPL"


def _no_objection(*_: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to run an operation. The three questions return None for "no objection".

    Args:
        name: one of `ORDER`.
        run: takes the operation's arguments.
        why_missing: what is absent from this installation or machine, whatever the arguments.
        why_not: what in these arguments it cannot handle.
        why_slower: why an earlier choice would cost time with these arguments.
    """

    name: str
    run: Callable[..., Any]
    why_missing: Callable[[], str | None] = _no_objection
    why_not: Callable[..., str | None] = _no_objection
    why_slower: Callable[..., str | None] = _no_objection


class Row(NamedTuple):
    """One line of `explain`."""

    op: str
    impl: str
    available: bool
    reason: str
    chosen: bool


_operations: dict[str, Operation] = {}
_overrides: dict[str, str] = {}
_used: dict[str, dict[str, int]] = {}


class Operation:
    """A named operation and its implementations, most preferred first."""

    def __init__(self, name: str, *implementations: Implementation) -> None:
        self.name = name
        self.implementations = {one.name: one for one in sorted(implementations, key=lambda one: ORDER.index(one.name))}
        _operations[name] = self

    def choose(self, impl: str | None, *args: Any) -> Implementation:
        """Return the implementation that runs `args`.

        Raises:
            KernelUnavailable: if the one asked for cannot; the message lists every reason.
        """
        if impl is not None or _overrides:  # nothing more is asked of a call without wishes: small losses feel it
            requested = impl or _overrides.get(self.name)
            if requested is not None:
                return self._named(requested, "impl" if impl else ENVIRONMENT, args)
        for candidate in self.implementations.values():
            if candidate.why_slower(*args) or candidate.why_missing() or candidate.why_not(*args):
                continue
            return candidate
        raise KernelUnavailable(f"no implementation of {self.name} can run: {self.reasons(*args)}")

    def is_native(self, *args: Any) -> bool:
        """Whether `args` would run by another implementation than the reference."""
        return _overrides.get(self.name) != "reference" and self.choose(None, *args).name != "reference"

    def _named(self, name: str, origin: str, args: tuple[Any, ...]) -> Implementation:
        chosen = self.implementations.get(name)
        if chosen is None:
            raise KernelUnavailable(
                f"{self.name} has no implementation {name!r} ({origin}).{did_you_mean(name, self.implementations)}"
            )
        reasons = [reason for reason in (chosen.why_missing(), chosen.why_not(*args)) if reason]
        if reasons:
            raise KernelUnavailable(f"{self.name} cannot run as {name!r} ({origin}): {'; '.join(reasons)}")
        return chosen

    def reasons(self, *args: Any) -> dict[str, str]:
        """Return, for each implementation that would not be chosen on its own for `args`, why."""
        found = {
            name: [one.why_missing(), one.why_not(*args), one.why_slower(*args)]
            for name, one in self.implementations.items()
        }
        return {name: "; ".join(r for r in reasons if r) for name, reasons in found.items() if any(reasons)}


def read_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Read `HYBRIDENGINE_IMPL` (`op=impl,op=impl`) again and return what it asks for; done once at import.

    Raises:
        KernelUnavailable: for an entry that is not `op=impl` or an unknown implementation.
    """
    entries = (os.environ if environment is None else environment).get(ENVIRONMENT, "").split(",")
    found: dict[str, str] = {}
    for entry in filter(None, map(str.strip, entries)):
        op, _, impl = entry.partition("=")
        if impl not in ORDER:
            raise KernelUnavailable(
                f"{ENVIRONMENT}: {entry!r} is not op=implementation.{did_you_mean(impl or entry, ORDER)}"
            )
        found[op] = impl
    _overrides.clear()
    _overrides.update(found)
    return found


def is_overridden(op: str) -> bool:
    """Whether `HYBRIDENGINE_IMPL` names an implementation of `op`."""
    return op in _overrides


def record(op: str, impl: str) -> None:
    """Count one run of `op` by `impl`. A graph being compiled is not a run."""
    if torch.compiler.is_compiling():
        return
    counts = _used.setdefault(op, {})
    counts[impl] = counts.get(impl, 0) + 1


def used(since: Mapping[str, Mapping[str, int]] | None = None) -> dict[str, dict[str, int]]:
    """Return how often each implementation ran in this process: `{op: {impl: count}}`.

    Compiled graphs count only the native runs: what was traced into the graph as plain torch leaves no trace.

    Args:
        since: an earlier result, whose runs are left out.
    """
    before = since or {}
    more = {op: {i: n - before.get(op, {}).get(i, 0) for i, n in counts.items()} for op, counts in _used.items()}
    ran = {op: {i: n for i, n in counts.items() if n > 0} for op, counts in more.items()}
    return {op: counts for op, counts in ran.items() if counts}


def reset_used() -> None:
    """Start counting anew."""
    _used.clear()


def explain() -> list[Row]:
    """Return one row for each implementation of each operation: is it available here, why not, is it the default."""
    if unknown := sorted(_overrides.keys() - _operations.keys()):
        raise KernelUnavailable(f"{ENVIRONMENT}: no operation {unknown[0]!r}.{did_you_mean(unknown[0], _operations)}")
    rows = []
    for op in _operations.values():
        missing = {name: one.why_missing() for name, one in op.implementations.items()}
        default = _overrides.get(op.name) or next(name for name, reason in missing.items() if reason is None)
        rows += [Row(op.name, name, not why, why or "", name == default) for name, why in missing.items()]
    return rows


read_environment()
