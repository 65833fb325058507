"""The GPU kernels on a GPU, held to the cases that the emulation and the interpreter are held to."""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

import cross_entropy_edges as edges
import pytest
import torch
from cross_entropy_cases import CASES, DTYPES, Case, check
from torch import Tensor

from hybridengine.kernels import cuda_library, triton_runtime
from hybridengine.kernels.cross_entropy import cuda

TO_NEAREST = 0.5  # units in the last place
EVERY = int(os.environ.get("HE_EVERY", "1"))  # of the cases, for sanitizers


class OnDevice:
    """An implementation that takes CPU tensors: they travel with their layout, and back."""

    def __init__(self, implementation: ModuleType, device: str) -> None:
        self.implementation = implementation
        self.device = device

    def forward(self, *arguments: Any) -> None:
        self._run(self.implementation.forward, arguments)

    def backward(self, *arguments: Any) -> None:
        self._run(self.implementation.backward, arguments)

    def _run(self, function: Any, arguments: tuple[Any, ...]) -> None:
        # By storage: logits and a gradient in their place stay one.
        here: dict[int, Tensor] = {}
        there: dict[int, Tensor] = {}

        def moved(argument: Any) -> Any:
            if not isinstance(argument, Tensor):
                return argument
            key = argument.untyped_storage().data_ptr()
            if key not in there:
                here[key] = torch.empty(0, dtype=argument.dtype).set_(argument.untyped_storage())
                there[key] = here[key].clone().to(self.device)
            return there[key].as_strided(argument.shape, argument.stride(), argument.storage_offset())

        function(*map(moved, arguments))
        for key, memory in there.items():
            here[key].copy_(memory)


@pytest.fixture(params=["cuda", "triton"])
def implementation(request: pytest.FixtureRequest) -> ModuleType:
    runtime = cuda_library if request.param == "cuda" else triton_runtime
    if reason := runtime.why_missing():
        pytest.skip(reason)
    if request.param == "cuda":
        return cuda
    from hybridengine.kernels.cross_entropy import triton_kernel

    return triton_kernel


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES[::EVERY], ids=str)
def test_agrees_with_float64(implementation: ModuleType, case: Case) -> None:
    check(OnDevice(implementation, "cuda"), case, TO_NEAREST)


@pytest.mark.gpu
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_edges(implementation: ModuleType, dtype: torch.dtype, smoothing: float) -> None:
    on_device = OnDevice(implementation, "cuda")
    for scale in (1.0, 0.7):
        edges.check_edges(on_device, dtype, smoothing, scale)
    edges.check_shares_of_nothing(on_device)
    edges.check_bad_labels(on_device)
    edges.check_large_logits(on_device)


@pytest.mark.gpu
def test_rows_beyond_two_to_the_32(implementation: ModuleType) -> None:
    if torch.cuda.mem_get_info()[0] < 3 * edges.FAR_ELEMENTS:
        pytest.skip("the GPU has no room")
    edges.check_far_rows(implementation, torch.empty(edges.FAR_ELEMENTS, dtype=torch.bfloat16, device="cuda"))


@pytest.mark.gpu
def test_nothing_waits_and_nothing_is_allocated(implementation: ModuleType) -> None:
    logits = torch.randn(64, 5000, device="cuda")
    target, loss, lse = torch.arange(64, device="cuda"), torch.empty(64, device="cuda"), torch.empty(64, device="cuda")
    arguments = (
        logits,
        target,
        None,
        5000.0,
        -100,
        0.1,
        1.0,
        0.0,
        0.0,
        torch.ones(2, device="cuda"),
        loss,
        lse,
        logits,
    )
    implementation.forward(*arguments, None)  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    try:
        torch.cuda.set_sync_debug_mode("error")
        implementation.forward(*arguments, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_tensors_travel_with_their_layout() -> None:
    """The wrapper itself, on the CPU."""
    double = ModuleType("double")
    double.forward = lambda matrix, same: same.mul_(2.0)  # type: ignore[attr-defined]
    memory = torch.arange(20.0)
    matrix = memory[2:].as_strided((3, 4), (6, 1))
    before = memory.clone()
    OnDevice(double, "cpu").forward(matrix, matrix)
    before[2:].as_strided((3, 4), (6, 1)).mul_(2.0)
    assert torch.equal(memory, before)
