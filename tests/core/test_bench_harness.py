"""What times the kernels: order of the competitors, medians, floors, memory, errors, and who did not run and why."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hybridengine import kernels
from hybridengine.bench import catalogue, competitors, measure, memory
from hybridengine.bench.accuracy import Exact, checked_rows, relative_error, worst
from hybridengine.bench.case import OURS, TIERS, Case, family
from hybridengine.bench.computation import Computation, size
from hybridengine.bench.floor import Rates, floor_seconds
from hybridengine.bench.measure import Bench
from hybridengine.bench.timing import Effort, Round, Timing, alternate, foreign_share, kept

CPU = torch.device("cpu")
SHORT = Effort(block=0.0, rounds=2, fewest=2, seconds=0.0, compile_seconds=0.0, slowest=math.inf, total=math.inf)


def make(rows: int, device: torch.device) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(0)
    return {
        "x": torch.randn(rows, 5, generator=generator),
        "upstream": torch.randn(rows, 5, generator=generator),
    }


def cube(x: Tensor) -> Tensor:
    return x**3


def tiny(**changes: Any) -> Case:
    """A case with a function that everyone can check."""
    case = Case(
        label="fp32 4 x 5",
        facts={"rows": 4},
        dtype=torch.float32,
        mode="forward+backward",
        rows=4,
        width=5,
        make=make,
        wanted=("x",),
        functions={OURS: cube, "torch": lambda x: x * x * x},
        memory=1e3,
    )
    return dataclasses.replace(case, **changes)


def bench(**changes: Any) -> Bench:
    rates = Rates(CPU, bandwidth=1e9, products={torch.float32: 1e12})
    usual = Bench(CPU, SHORT, rates, tuple(competitors.FAMILIES), compile_seconds=0.0, most_memory=1e9)
    return dataclasses.replace(usual, **changes)


# ---- timing --------------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes only while something runs."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def run(self, name: str, seconds: float) -> Any:
        def call() -> None:
            self.order.append(name)
            self.now += seconds

        return call

    def __call__(self) -> float:
        return self.now


def test_competitors_alternate_and_every_round_begins_with_another() -> None:
    clock = Clock()
    calls = {name: clock.run(name, 1.0) for name in "abc"}
    effort = dataclasses.replace(SHORT, rounds=4, fewest=4)
    rounds = alternate(calls, effort, clock=clock)
    turns = ["".join(clock.order[start : start + 3]) for start in range(0, len(clock.order), 3)]
    assert turns == ["abc", "abc", "bca", "cab", "abc"]  # the first ones find out how often to repeat
    assert [one.seconds["b"] for one in rounds] == [1.0] * 4


def test_a_block_repeats_what_is_short_and_divides_by_the_repeats() -> None:
    clock = Clock()
    effort = dataclasses.replace(SHORT, block=1.0, rounds=1, fewest=1)
    (one,) = alternate({"short": clock.run("s", 0.25), "long": clock.run("l", 3.0)}, effort, clock=clock)
    assert one.seconds == {"short": 0.25, "long": 3.0}
    assert (clock.order.count("s"), clock.order.count("l")) == (1 + 4, 1 + 1)


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 3), (9.0, 4), (1e9, 8)])
def test_rounds_end_with_the_time_but_not_before_the_fewest(seconds: float, rounds: int) -> None:
    clock = Clock()
    effort = dataclasses.replace(SHORT, rounds=8, fewest=3, seconds=seconds)
    assert len(alternate({"a": clock.run("a", 2.0)}, effort, clock=clock)) == rounds


def test_medians_with_quartiles() -> None:
    assert Timing.of([4.0, 1.0, 3.0, 2.0, 100.0]) == Timing(3.0, 2.0, 4.0, 5)
    assert Timing.of([2.0]) == Timing(2.0, 2.0, 2.0, 1)


def test_busy_rounds_are_left_out_where_enough_are_clean() -> None:
    clean, busy = Round({"a": 1.0}, 0.02), Round({"a": 9.0}, 0.7)
    assert kept([clean, busy, clean, clean]) == [clean] * 3
    assert kept([clean, busy, clean]) == [clean, busy, clean]
    assert kept([Round({}, None)]) == [Round({}, None)]


def test_the_foreign_share_is_what_others_took_of_the_clock() -> None:
    assert foreign_share((0.0, 10.0, 1.0), (2.0, 14.0, 4.0)) == pytest.approx(0.5)
    assert foreign_share((0.0, 10.0, 1.0), (2.0, 12.0, 4.0)) == 0.0
    assert foreign_share((0.0, 0.0, 1.0), (2.0, 0.0, 4.0)) is None


# ---- floor, memory, errors -----------------------------------------------------------------------------------------


def test_the_floor_is_bytes_by_bandwidth_and_flops_by_rate() -> None:
    assert floor_seconds(2e9, 3e12, 1e9, 1e12) == pytest.approx(5.0)
    assert floor_seconds(2e9, 0.0, 1e9, 0.0) == pytest.approx(2.0)
    rates = Rates(CPU, bandwidth=4e9, products={torch.float32: 2e12})
    assert rates.floor(8e9, 2e12, torch.float32) == pytest.approx(3.0)


def test_rates_are_measured_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridengine.bench.floor._COPIED", {"cpu": 1 << 16})
    monkeypatch.setattr("hybridengine.bench.floor._SIDE", {"cpu": 16})
    rates = Rates(CPU)
    assert rates.floor(1e6, 0.0, torch.float32) > 0 and rates.products == {}
    assert rates.floor(1e6, 1e6, torch.float64) > rates.floor(1e6, 0.0, torch.float64)


@pytest.mark.skipif(memory.why_not(CPU) is not None, reason=memory.why_not(CPU) or "")
def test_the_peak_counts_what_is_allocated_and_freed_inside() -> None:
    def call() -> Tensor:
        return torch.ones(16 << 20).sum()  # 64 MiB that are gone when it ends

    for _ in range(3):  # the freed pages must not hide the next peak; the kernel counts in batches
        peak = memory.peak(call, lambda: None, CPU)
        assert peak is not None and 63 << 20 <= peak < 72 << 20


def test_where_memory_cannot_be_told_there_is_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "why_not", lambda device: "not here")
    assert memory.peak(lambda: None, lambda: None, CPU) is None
    row = measure.measure(tiny(), bench(against=("torch",)))
    assert row["variants"][OURS]["extra_bytes"] is None


def test_a_computation_gives_the_output_and_the_gradients() -> None:
    inputs = make(4, CPU)
    x, upstream = inputs["x"], inputs["upstream"]
    assert set(Computation(cube, inputs, ("x",), "forward")()) == {"output"}
    both = Computation(cube, inputs, ("x",), "forward+backward")()
    torch.testing.assert_close(both["gradient of x"], 3 * x.detach() ** 2 * upstream)
    second = Computation(cube, inputs, ("x",), "second order")
    for _ in range(2):  # nothing adds up from call to call
        found = second()
        expected = 2 * (3 * x.detach() ** 2 * upstream) * 6 * x.detach() * upstream
        torch.testing.assert_close(found["gradient of x"], expected)
    second.clear()
    assert x.grad is None and not x.requires_grad


def test_detached_gradients_are_refused_in_second_order() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.sum()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient.expand(4, 5)

    inputs = {"x": make(4, CPU)["x"]}
    with pytest.raises(RuntimeError):
        Computation(Once.apply, inputs, ("x",), "second order")()


def test_errors_are_relative_and_a_missing_gradient_is_infinite() -> None:
    assert relative_error(torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.8)
    assert relative_error(torch.tensor([0.5]), torch.tensor([0.0])) == 0.5
    exact = Exact(tiny(), CPU)
    assert exact.rows == 4
    results = Computation(cube, make(4, CPU), ("x",), "forward+backward")()
    errors = exact.errors("a", cube, results)
    assert errors is not None and max(errors.values()) < 1e-6
    del results["gradient of x"]
    errors = exact.errors("a", cube, results)
    assert errors is not None and worst(errors) == math.inf
    assert math.isnan(worst({"a": 1.0, "b": math.nan}))


def test_float64_checks_as_many_rows_as_it_can() -> None:
    large = tiny(rows=4096, width=1 << 20)
    assert checked_rows(large) == 4
    exact = Exact(large, CPU)
    errors = exact.errors("a", cube, {})  # runs again, on the rows that are checked
    assert errors is not None and max(errors.values()) < 1e-6
    assert exact.errors("compile", cube, {}) is None
    assert Exact(tiny(exact=None), CPU).errors("a", cube, {}) is None


# ---- one case ------------------------------------------------------------------------------------------------------


def test_a_row_has_every_figure() -> None:
    row = measure.measure(tiny(), bench(against=("torch",)))
    assert list(row["variants"]) == [OURS, "torch"]
    for figures in row["variants"].values():
        assert figures["q1_ms"] <= figures["median_ms"] <= figures["q3_ms"]
        assert figures["error"] < 1e-6 and figures["wrong"] is False
        assert figures["result_bytes"] == 2 * 4 * 5 * 4
        assert figures["share_of_floor"] == pytest.approx(row["floor_ms"] / figures["median_ms"])
    assert row["variants"][OURS]["times_ours"] == 1.0
    # Inputs and results move once: x, what comes in, the output, the gradient.
    assert row["floor_ms"] == pytest.approx(4 * 4 * 5 * 4 / 1e9 * 1e3)
    assert json.loads(json.dumps(row)) == row


def test_what_a_competitor_raises_is_why_it_did_not_run() -> None:
    def broken(x: Tensor) -> Tensor:
        raise TypeError("unexpected argument\nand more")

    functions = {OURS: cube, "torch": cube, "torch broken": broken}
    row = measure.measure(tiny(functions=functions), bench(against=("torch",)))
    assert row["variants"]["torch broken"] == {"not_run": "TypeError: unexpected argument"}
    with pytest.raises(TypeError):
        measure.measure(tiny(functions={OURS: broken, "torch": cube}), bench(against=("torch",)))


def test_a_wrong_result_is_marked() -> None:
    functions = {OURS: cube, "torch": cube, "torch wrong": lambda x: 2 * cube(x)}
    variants = measure.measure(tiny(functions=functions), bench(against=("torch",)))["variants"]
    assert variants["torch wrong"]["wrong"] is True and variants["torch wrong"]["error"] == pytest.approx(1.0)


def test_what_changes_its_inputs_gets_copies() -> None:
    def careless(x: Tensor) -> Tensor:
        result = x**3
        x.detach().zero_()
        return result

    case = tiny(functions={OURS: cube, "torch careless": careless, "torch": cube}, mode="forward", wanted=())
    found = measure.measure(
        dataclasses.replace(case, mutating=frozenset({"torch careless"})), bench(against=("torch",))
    )
    assert found["variants"]["torch"]["error"] < 1e-6 and found["variants"]["torch careless"]["error"] < 1e-6


def test_a_slow_competitor_is_not_timed() -> None:
    effort = dataclasses.replace(SHORT, slowest=-1.0)
    case = tiny(functions={OURS: cube, "torch": cube, "torch again": cube})
    variants = measure.measure(case, bench(effort=effort, against=("torch",)))["variants"]
    assert "one call takes" in variants["torch again"]["not_run"]
    assert "median_ms" in variants["torch"] and "median_ms" in variants[OURS]


def test_a_case_that_does_not_fit_is_left_out() -> None:
    row = measure.measure(tiny(memory=2e9), bench())
    assert row["variants"] == {} and "2.0 GB" in row["not_run"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [({}, "time for compiling is used up"), ({"mode": "second order"}, "no double backward")],
)
def test_compiling_has_its_limits(changes: dict[str, Any], told: str) -> None:
    assert told in measure.measure(tiny(**changes), bench())["variants"]["compile"]["not_run"]


# ---- competitors ---------------------------------------------------------------------------------------------------


def test_a_competitor_that_is_not_installed_or_finds_no_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(competitors, "version", missing)
    for name, distribution in competitors.DISTRIBUTIONS.items():
        assert competitors.why_not(name, CPU) == f"{distribution} is not installed"
    monkeypatch.setattr(competitors, "version", lambda name: "1.0")
    assert {competitors.why_not(name, CPU) for name in competitors.DISTRIBUTIONS} == {"it needs a GPU"}
    assert competitors.why_not("torch", CPU) is None


def test_libraries_are_imported_when_called_alone() -> None:
    with pytest.raises(ModuleNotFoundError):
        competitors.imported("no_such_library", "function")()
    assert competitors.imported("math", "hypot")(3, 4) == 5


@pytest.mark.parametrize(
    ("function", "leading", "named"),
    [
        ("liger_cross_entropy", ["input", "target"], {"ignore_index": -100, "reduction": "mean"}),
        (
            "liger_fused_linear_cross_entropy",
            ["input", "weight", "target"],
            {"bias": None, "ignore_index": -100, "reduction": "mean"},
        ),
    ],
)
def test_liger_is_called_as_it_wants_to_be(function: str, leading: list[str], named: dict[str, Any]) -> None:
    module = pytest.importorskip("liger_kernel.transformers.functional")
    parameters = inspect.signature(getattr(module, function)).parameters
    assert list(parameters)[: len(leading)] == leading
    assert {name: parameters[name].default for name in named} == named


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="this torch has none")
@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize("biased", [False, True])
def test_torch_in_chunks_computes_the_same(rows: int | None, biased: bool) -> None:
    x, weight, target = torch.randn(7, 4), torch.randn(9, 4), torch.randint(0, 9, (7,))
    bias = torch.randn(9) if biased else None
    expected = functional.cross_entropy(functional.linear(x, weight, bias), target)
    found = competitors.linear_cross_entropy_in_chunks(rows)(x, weight, target, bias)
    torch.testing.assert_close(found, expected)


# ---- operations ----------------------------------------------------------------------------------------------------


def quick_cases() -> list[Any]:
    cases = [(name, case) for name in catalogue.names() for case in catalogue.load(name).cases("cpu")]
    return [pytest.param(name, case, id=f"{name} {case.label}") for name, case in cases if case.tier == "quick"]


@pytest.mark.parametrize("name", catalogue.names())
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_operation_has_cases_that_can_be_told_apart(name: str, device: str) -> None:
    cases = catalogue.load(name).cases(device)
    for tier in TIERS:
        labels = [case.label for case in cases if TIERS.index(case.tier) <= TIERS.index(tier)]
        assert labels, tier
    usual = [case.label for case in cases if case.tier != "full"]
    assert len(usual) == len(set(usual))
    for case in cases:
        assert next(iter(case.functions)) == OURS and "torch" in case.functions
        assert {family(one) for one in case.functions} - {OURS} <= set(competitors.FAMILIES)
        json.dumps(case.facts)


@pytest.mark.parametrize(("name", "case"), quick_cases())
def test_every_competitor_that_runs_here_computes_the_same(name: str, case: Case) -> None:
    small = dataclasses.replace(case, rows=8)
    exact, inputs = Exact(small, CPU), small.make(8, CPU)
    assert size(inputs) > 0
    for variant, function in small.functions.items():
        absent = variant == OURS and not hasattr(kernels, catalogue.load(name).KERNEL)
        if absent or competitors.why_not(family(variant), CPU):
            continue
        results = Computation(function, inputs, small.wanted, small.mode)()
        errors = exact.errors(variant, function, results)
        # bfloat16 keeps 8 bits, and torch's loss is rounded to it: some roundings of 2^-9.
        assert errors is None or worst(errors) < (1e-5 if case.dtype == torch.float32 else 2e-2)
