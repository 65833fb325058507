"""One case: who can run, the time of each, its memory, its error and its share of the floor."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hybridengine.bench import accuracy, competitors, memory
from hybridengine.bench.accuracy import Exact
from hybridengine.bench.case import OURS, Case, Function, family
from hybridengine.bench.computation import Computation, copied, size
from hybridengine.bench.floor import Rates
from hybridengine.bench.timing import Effort, Timing, alternate, kept

__all__ = ["Bench", "left_out", "measure"]

_SHARE_OF_FREE = 0.7


@dataclass
class Bench:
    """What the cases of one run share. `compile_seconds` is what `torch.compile` has left, and shrinks.

    Args:
        device: where everything runs.
        effort: how long a case takes.
        rates: of this device.
        against: families that compete with ours.
        compile_seconds: what `torch.compile` may still take.
        most_memory: bytes; a case that needs more is left out.
    """

    device: torch.device
    effort: Effort
    rates: Rates
    against: tuple[str, ...]
    compile_seconds: float
    most_memory: float

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure(case: Case, bench: Bench) -> dict[str, Any]:
    """Return the case's row: its facts, and for each competitor its figures or why there are none."""
    free = min(bench.most_memory, _SHARE_OF_FREE * memory.available(bench.device))
    if case.memory > free:
        needed = f"it needs about {case.memory / 1e9:.1f} GB beside its inputs, and {free / 1e9:.1f} GB may be used"
        return left_out(case, needed)
    row: dict[str, Any] = {"case": case.label, "mode": case.mode, **case.facts, "variants": {}}
    exact = Exact(case, bench.device)
    row["checked_rows"] = exact.rows
    inputs = case.make(case.rows, bench.device)
    ready: dict[str, Computation] = {}
    for name in _names(case, bench):
        try:
            function = _function(name, case, bench)
            # What changes its inputs gets its own; the others read the same ones.
            own = copied(inputs) if name in case.mutating else inputs
            call = Computation(function, own, case.wanted, case.mode)
            row["variants"][name] = _first_calls(name, call, function, exact, bench)
            ready[name] = call
        except _NotRun as reason:
            row["variants"][name] = {"not_run": str(reason)}
    del exact
    _add_times(row, ready, bench)
    moved = size(inputs) + row["variants"][OURS]["result_bytes"] if case.moved is None else case.moved
    _add_floor(row, bench.rates.floor(moved, case.flops, case.dtype))
    if "compile" in ready:
        torch._dynamo.reset()  # its limit of recompilations counts the cases of a function together
    return row


def left_out(case: Case, reason: str) -> dict[str, Any]:
    """The row of a case that is not measured."""
    return {"case": case.label, "mode": case.mode, **case.facts, "not_run": reason, "variants": {}}


class _NotRun(Exception):
    """Why a competitor has no figures."""


def _names(case: Case, bench: Bench) -> Iterator[str]:
    """Ours first, then the chosen competitors; `torch.compile` stands after what it compiles."""
    for name in case.functions:
        if name == OURS or family(name) in bench.against:
            yield name
        if name == "torch" and "compile" in bench.against:
            yield "compile"


def _function(name: str, case: Case, bench: Bench) -> Function:
    if reason := competitors.why_not(family(name), bench.device):
        raise _NotRun(reason)
    if name != "compile":
        return case.functions[name]
    if case.mode == "second order":
        raise _NotRun("torch.compile has no double backward")
    if bench.compile_seconds <= 0:
        raise _NotRun("the time for compiling is used up; --full has no limit")
    return competitors.compiled(case)


def _first_calls(name: str, call: Computation, function: Function, exact: Exact, bench: Bench) -> dict[str, Any]:
    """Warm up, compare, and measure the memory.

    What a competitor raises is why it did not run; what ours raises is an error.
    """
    begun = time.perf_counter()
    try:
        results = call()
        bench.synchronize()
        errors = exact.errors(name, function, results)
        result_bytes = sum(one.numel() * one.element_size() for one in results.values())
        del results
        _refuse_slow(name, call, bench)
        peak = memory.peak(call, call.clear, bench.device)
    except _NotRun:
        raise
    except Exception as error:
        if name == OURS:
            raise
        text = (str(error).strip().splitlines() or [""])[0]
        raise _NotRun(f"{type(error).__name__}: {text}"[:200]) from error
    finally:
        call.clear()
        if name == "compile":
            bench.compile_seconds -= time.perf_counter() - begun
    figures = {"peak_bytes": peak, "result_bytes": result_bytes}
    figures["extra_bytes"] = None if peak is None else max(0, peak - result_bytes)
    if errors is None:
        return figures
    worst = accuracy.worst(errors)
    return figures | {"errors": errors, "error": worst, "wrong": not worst <= accuracy.WRONG}


def _refuse_slow(name: str, call: Computation, bench: Bench) -> None:
    """A second call, now warm; a competitor that takes very long would take all of the run's time."""
    begun = time.perf_counter()
    call()
    bench.synchronize()
    seconds = time.perf_counter() - begun
    if seconds > bench.effort.slowest and name not in (OURS, "torch"):
        raise _NotRun(f"one call takes {seconds:.1f} s, too long for this run; --full has no limit")


def _add_times(row: dict[str, Any], ready: Mapping[str, Computation], bench: Bench) -> None:
    """Medians with quartiles, and how many times faster ours is: ratios of the medians."""

    def clear() -> None:
        for call in ready.values():
            call.clear()

    rounds = alternate(ready, bench.effort, bench.synchronize, clear=clear)
    used = kept(rounds)
    shares = [one.foreign for one in used if one.foreign is not None]
    row |= {"rounds": len(rounds), "foreign_cpu_share": sum(shares) / len(shares) if shares else None}
    times = {name: Timing.of([one.seconds[name] for one in used]) for name in ready}
    for name, one in times.items():
        row["variants"][name] |= {
            "median_ms": one.median * 1e3,
            "q1_ms": one.low * 1e3,
            "q3_ms": one.high * 1e3,
            "rounds": one.rounds,
            "times_ours": one.median / times[OURS].median,
        }


def _add_floor(row: dict[str, Any], floor: float) -> None:
    row["floor_ms"] = floor * 1e3
    for figures in row["variants"].values():
        if "median_ms" in figures:
            figures["share_of_floor"] = row["floor_ms"] / figures["median_ms"]
