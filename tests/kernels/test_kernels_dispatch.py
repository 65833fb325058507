"""Choosing an implementation, refusing by name, overriding from outside, counting."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from hybridengine import kernels
from hybridengine.errors import KernelUnavailable
from hybridengine.kernels import dispatch, native
from hybridengine.kernels.dispatch import Implementation, Operation

needs_native = pytest.mark.skipif(native.why_missing() is not None, reason=native.why_missing() or "")


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    kernels.reset_used()
    yield
    monkeypatch.undo()
    dispatch.read_environment()


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Operation:
    monkeypatch.setattr(dispatch, "_operations", {})
    return Operation(
        "toy",
        Implementation("reference", lambda x: ("reference", x)),
        Implementation("cpu", lambda x: ("cpu", x), why_slower=lambda x: "small" if x < 10 else None),
        Implementation("triton", lambda x: ("triton", x), why_not=lambda x: None if x > 99 else "not over 99"),
        Implementation("cuda", lambda x: ("cuda", x), why_missing=lambda: "no nvcc", why_not=lambda x: "no device"),
    )


@pytest.mark.parametrize(("value", "chosen"), [(1, "reference"), (10, "cpu"), (100, "triton")])
def test_the_first_without_objection_runs(toy: Operation, value: int, chosen: str) -> None:
    assert toy.choose(None, value).run(value) == (chosen, value)


def test_a_name_overrules_preference_but_not_impossibility(toy: Operation) -> None:
    assert toy.choose("cpu", 1).name == "cpu"
    with pytest.raises(KernelUnavailable, match="no nvcc; no device"):
        toy.choose("cuda", 100)
    with pytest.raises(KernelUnavailable, match="Did you mean 'triton'"):
        toy.choose("tritn", 100)


def test_reasons_and_rows(toy: Operation) -> None:
    assert toy.reasons(1) == {"cuda": "no nvcc; no device", "triton": "not over 99", "cpu": "small"}
    rows = {row.impl: row for row in kernels.explain()}
    assert list(rows) == ["cuda", "triton", "cpu", "reference"]
    assert not rows["cuda"].available and rows["cuda"].reason == "no nvcc"
    assert rows["triton"].chosen and not rows["cpu"].chosen


def test_environment_overrides(toy: Operation) -> None:
    assert dispatch.read_environment({dispatch.ENVIRONMENT: " toy=cuda , perturb=reference"})["perturb"] == "reference"
    with pytest.raises(KernelUnavailable, match=r"HYBRIDENGINE_IMPL\): no nvcc"):
        toy.choose(None, 100)
    assert toy.choose("cpu", 1).name == "cpu", "the argument is nearer than the environment"
    with pytest.raises(KernelUnavailable, match="no operation 'perturb'"):
        kernels.explain()
    for wrong in ("toy", "toy=", "toy=gpu"):
        with pytest.raises(KernelUnavailable, match="HYBRIDENGINE_IMPL"):
            dispatch.read_environment({dispatch.ENVIRONMENT: wrong})


@needs_native
def test_an_explicit_cpu_says_why_it_cannot() -> None:
    logits, target = torch.randn(2, 5), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(KernelUnavailable, match="float16"):
        kernels.cross_entropy(logits.half(), target, impl="cpu")
    with pytest.raises(KernelUnavailable, match="class weights is wanted"):
        kernels.cross_entropy(logits, target, weight=torch.ones(5, requires_grad=True), impl="cpu")
    with pytest.raises(KernelUnavailable, match="float32"):
        kernels.perturb_step(
            torch.zeros(1, 1, 1).half(), torch.zeros(1, 1, 1).half(), torch.ones(1, 1), step_size=1.0, impl="cpu"
        )


@needs_native
def test_runs_are_counted_by_implementation() -> None:
    small, large = torch.randn(8, 5, requires_grad=True), torch.randn(40, 5000, requires_grad=True)
    target = torch.zeros(8, dtype=torch.int64)
    kernels.cross_entropy(small, target)
    loss = kernels.cross_entropy(large, target.repeat(5))
    loss.backward()
    assert kernels.used() == {"cross_entropy": {"reference": 1, "cpu": 1}}
    assert kernels.used(since=kernels.used()) == {}
    assert kernels.used(since={"cross_entropy": {"cpu": 1}}) == {"cross_entropy": {"reference": 1}}
    kernels.reset_used()
    assert kernels.used() == {}


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@needs_native
def test_the_environment_is_read_at_import() -> None:
    code = """
import torch
from hybridengine import kernels
from hybridengine.kernels import native
kernels.cross_entropy(torch.randn(40, 5000), torch.arange(40))
buffer = native.empty((4 << 20,), torch.float32)
print(kernels.used(), native.module().isa(), kernels.pool_report().live_bytes)
"""
    environment = {
        "HYBRIDENGINE_IMPL": "cross_entropy=reference",
        "HYBRIDENGINE_ISA": "baseline",
        "HYBRIDENGINE_POOL": "0",
    }
    assert run_python(code, **environment) == "{'cross_entropy': {'reference': 1}} baseline 0"


@needs_native
def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(KernelUnavailable, match="this CPU runs: baseline"):
        kernels.set_isa("mmx")


def test_without_the_library_everything_still_runs() -> None:
    code = """
import sys
sys.modules["hybridengine.kernels._native"] = None
import torch
from hybridengine import kernels
loss = kernels.cross_entropy(torch.randn(40, 5000, requires_grad=True), torch.arange(40)); loss.backward()
delta = torch.zeros(1, 2, 3)
kernels.perturb_step(delta, delta, torch.ones(1, 2), step_size=1.0)
assert not kernels.tune_allocator().changed
rows = [row for row in kernels.explain() if row.impl == "cpu"]
assert all(not row.available and row.reason for row in rows)
try:
    kernels.cross_entropy(torch.randn(2, 3), torch.zeros(2, dtype=torch.int64), impl="cpu")
except kernels.dispatch.KernelUnavailable as error:
    print(error)
"""
    assert "cross_entropy cannot run as 'cpu' (impl): the native library" in run_python(code)
