"""Timing: the competitors alternate block by block in one process, so that foreign load hits all of them alike.

A round is clean if other processes took little of the machine meanwhile. Where enough rounds are clean the others are
left out: with a foreign process on one core, every parallel computation waits at its barrier for that core, and short
ones wait longer than they run.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

__all__ = [
    "DEFAULT",
    "FULL",
    "QUICK",
    "Effort",
    "Round",
    "Timing",
    "alternate",
    "foreign_share",
    "kept",
    "processor_seconds",
]

Call = Callable[[], object]
Snapshot = tuple[float, float, float]

_FOREIGN = 0.1
_FEWEST_CLEAN = 3


@dataclass(frozen=True)
class Effort:
    """How long a case is measured.

    Args:
        block: seconds that one competitor runs before the next one does.
        rounds: the most rounds; each round is one block of every competitor.
        fewest: rounds that are made however long they take.
        seconds: after these no new round begins.
        compile_seconds: what `torch.compile` may take in all cases together.
        slowest: seconds a call above which a competitor is not timed.
        total: seconds after which no new case begins.
    """

    block: float
    rounds: int
    fewest: int
    seconds: float
    compile_seconds: float
    slowest: float
    total: float


QUICK = Effort(block=0.02, rounds=7, fewest=3, seconds=1.0, compile_seconds=30.0, slowest=1.5, total=34.0)
DEFAULT = Effort(block=0.05, rounds=9, fewest=3, seconds=2.0, compile_seconds=50.0, slowest=4.0, total=140.0)
FULL = Effort(block=0.1, rounds=9, fewest=3, seconds=20.0, compile_seconds=math.inf, slowest=math.inf, total=math.inf)


@dataclass(frozen=True)
class Round:
    """Seconds a call of each competitor, and the share of one processor that other processes took meanwhile."""

    seconds: Mapping[str, float]
    foreign: float | None


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median over the rounds, with quartiles."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """Summarise one competitor's rounds."""
        if len(seconds) == 1:
            return cls(seconds[0], seconds[0], seconds[0], 1)
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, low, high, len(seconds))


def alternate(
    calls: Mapping[str, Call],
    effort: Effort,
    synchronize: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    clear: Callable[[], None] = lambda: None,
) -> list[Round]:
    """Return the rounds. Each competitor was called before, so that it is warm.

    Every round begins with another competitor, so that none always follows the same one.

    Args:
        calls: the competitors.
        effort: how long.
        synchronize: waits for the device.
        clock: seconds; another one in tests.
        clear: drops what the last call left. A block begins without the results of others and ends without its own, so
            that everyone pays for giving its own memory back: for plain torch that is a tenth of the time.
    """

    def block(call: Call, repeats: int) -> float:
        clear()
        synchronize()
        start = clock()
        for _ in range(repeats):
            call()
        clear()
        synchronize()
        return (clock() - start) / repeats

    begun = clock()
    repeats = {name: max(1, int(effort.block / max(block(call, 1), 1e-9))) for name, call in calls.items()}
    names, rounds = list(calls), list[Round]()
    for turn in range(effort.rounds):
        if turn >= effort.fewest and clock() - begun > effort.seconds:
            break
        first = turn % len(names)
        before = processor_seconds()
        seconds = {name: block(calls[name], repeats[name]) for name in names[first:] + names[:first]}
        rounds.append(Round(seconds, foreign_share(before, processor_seconds())))
    return rounds


def kept(rounds: list[Round]) -> list[Round]:
    """The clean rounds, if there are some, else all."""
    clean = [one for one in rounds if one.foreign is None or one.foreign < _FOREIGN]
    return clean if len(clean) >= _FEWEST_CLEAN else rounds


def foreign_share(before: Snapshot, after: Snapshot) -> float | None:
    """The share of one CPU that other processes took between two `processor_seconds`, or None where it is not told."""
    wall, busy, own = (late - early for early, late in zip(before, after, strict=True))
    return max(0.0, busy - own) / wall if wall > 0 and busy > 0 else None


def processor_seconds() -> Snapshot:
    """Seconds so far: of the clock, of all processors at work, and of those at work for this process."""
    times = os.times()
    return time.perf_counter(), _busy(), times.user + times.system


def _busy() -> float:
    try:
        with open("/proc/stat", encoding="ascii") as file:
            fields = [int(word) for word in file.readline().split()[1:9]]
    except OSError:
        return 0.0
    idle, waiting = fields[3], fields[4]
    return (sum(fields) - idle - waiting) / os.sysconf("SC_CLK_TCK")
