"""The CUDA kernels of cross-entropy, compiled for the CPU: against float64, and with mistakes planted into them."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator
from pathlib import Path

import cross_entropy_edges as edges
import pytest
import torch
from cross_entropy_cases import CASES, DTYPES, Case, check, make_problem
from emulated_cuda import Emulation, build, build_mutant

from hybridengine.kernels import cuda_library
from hybridengine.kernels.cross_entropy import cuda

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")

TO_NEAREST = 0.5  # units in the last place


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Emulation:
    return Emulation(build(tmp_path_factory.mktemp("emulation") / "cuda.so"))


@pytest.fixture
def emulation(built: Emulation, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulation]:
    monkeypatch.setattr(cuda_library, "library", lambda: built)
    yield built
    built.set_order(0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_float64(emulation: Emulation, case: Case) -> None:
    check(cuda, case, TO_NEAREST)


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.7])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_an_ordinary_answer_are_those_of_torch(
    emulation: Emulation, dtype: torch.dtype, smoothing: float, scale: float
) -> None:
    edges.check_edges(cuda, dtype, smoothing, scale)


def test_classes_without_weight_add_nothing(emulation: Emulation) -> None:
    edges.check_shares_of_nothing(cuda)


def test_bad_labels_are_noted(emulation: Emulation) -> None:
    edges.check_bad_labels(cuda)


def test_large_logits_lose_nothing(emulation: Emulation) -> None:
    edges.check_large_logits(cuda)


def test_rows_beyond_two_to_the_31(emulation: Emulation) -> None:
    edges.check_far_rows(cuda)


@pytest.mark.parametrize("case", CASES[::9], ids=str)
def test_the_order_of_threads_changes_no_bit(emulation: Emulation, case: Case) -> None:
    results = []
    for order in (0, 1, 7, 123):
        emulation.set_order(order)
        problem = make_problem(case)
        loss, lse = torch.empty(4), torch.empty(4)
        cuda.forward(*problem.arguments, loss, lse, problem.logits, None)
        results.append([loss, lse, problem.logits.clone()])
    for other in results[1:]:
        for one, same in zip(results[0], other, strict=True):
            assert torch.equal(one.nan_to_num(), same.nan_to_num())


def test_nothing_to_do(emulation: Emulation) -> None:
    empty = torch.empty(0, 5)
    arguments = (empty, torch.empty(0, dtype=torch.int64), None, 5.0, -100, 0.0, 1.0, 0.0, 0.0, torch.ones(2))
    cuda.forward(*arguments, torch.empty(0), torch.empty(0), empty, None)
    cuda.backward(*arguments, torch.empty(0), torch.ones(()), None, empty)


def test_a_struct_of_another_size_is_refused(emulation: Emulation) -> None:
    class Other(ctypes.Structure):
        _fields_ = [("element", ctypes.c_int)]

    with pytest.raises(RuntimeError, match=r"cross_entropy_forward could not be launched: invalid argument"):
        emulation.launch("cross_entropy_forward", Other(), torch.device("cpu"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"logits": torch.zeros(5, 3).t()}, "logits must be"),
        ({"logits": torch.zeros(3, 5, dtype=torch.float64)}, "logits must be"),
        ({"target": torch.zeros(3, dtype=torch.int32)}, "labels must be int64"),
        ({"target": torch.zeros(3, 5, dtype=torch.float16)}, "soft targets must be"),
        ({"target": torch.zeros(5, 3).t()}, "contiguous rows"),
        ({"weight": torch.zeros(4)}, "weight must be"),
        ({"gradient": torch.zeros(3, 5, dtype=torch.bfloat16)}, "the gradient must be"),
    ],
)
def test_what_would_be_read_wrongly_is_refused(
    emulation: Emulation, changed: dict[str, torch.Tensor], message: str
) -> None:
    given = {"logits": torch.zeros(3, 5), "target": torch.zeros(3, dtype=torch.int64), "weight": None, "gradient": None}
    given |= changed
    arguments = (given["logits"], given["target"], given["weight"], 5.0, -100, 0.0, 1.0, 0.0, 0.0, torch.ones(2))
    with pytest.raises(ValueError, match=message):
        cuda.forward(*arguments, torch.empty(3), torch.empty(3), given["gradient"], None)


def test_an_expanded_gradient_of_the_lse_is_refused(emulation: Emulation) -> None:
    logits, target, lse = torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64), torch.zeros(3)
    arguments = (logits, target, None, 5.0, -100, 0.0, 1.0, 0.0, 0.0, torch.ones(2), lse, torch.ones(()))
    with pytest.raises(ValueError, match=r"expected contiguous float32 \[3\]"):
        cuda.backward(*arguments, torch.ones(()).expand(3), torch.empty(3, 5))


KERNEL, ROW, REDUCE, ELEMENT = (
    "cross_entropy/cuda.cu",
    "cross_entropy/cuda.cuh",
    "common/cuda/reduce.cuh",
    "common/cuda/element.cuh",
)
MUTANTS = {
    "missing barrier": (REDUCE, "  __syncthreads();\n", "", "shared memory"),
    "barrier in one branch": (REDUCE, "  __syncthreads();", "  if (lane == 0) __syncthreads();", "shuffle|barrier"),
    "early exit": (
        KERNEL,
        "  const auto sums = sum_row",
        "  if (threadIdx.x >= 32) return;\n  const auto sums = sum_row",
        "barrier",
    ),
    "wrong lanes": (REDUCE, "__shfl_xor_sync(kAllLanes, word, mask)", "__shfl_down_sync(kAllLanes, word, mask)", None),
    "missing step": (REDUCE, "mask = kWarpSize / 2", "mask = kWarpSize / 4", None),
    "a warp too few": (REDUCE, "(blockDim.x) / kWarpSize", "(blockDim.x) / kWarpSize - 1", "|before it is written"),
    "unaligned packs": (KERNEL, "!is_aligned_at(row.gradient, row.split.head)", "false", "unaligned"),
    "no head": (ELEMENT, "return {head, (columns", "return {0, (columns", "unaligned|error"),
    "label of the wrong row": (KERNEL, "[index * problem.target_stride];", "[0];", None),
    "shares not raised": (
        ROW,
        "  if constexpr (dense) sums.gap += sums.mass * (shift - shift_of(sums.maximum));\n",
        "",
        None,
    ),
    "no slope": (ROW, "gradient.at[lane] = curve.slope.at[lane] * value", "gradient.at[lane] = value", None),
    "lse for the maximum": (
        KERNEL,
        "shift_of(sums.maximum), by_probability / sums.exponentials, s",
        "lse, by_probability, s",
        None,
    ),
    "32-bit rows": (
        KERNEL,
        "(problem.logits) + index * problem.logits_stride",
        "(problem.logits) + static_cast<unsigned>(index * problem.logits_stride)",
        None,
    ),
}


QUICK = ("missing barrier", "wrong lanes")


@pytest.mark.parametrize("mutant", [pytest.param(m, marks=[] if m in QUICK else pytest.mark.slow) for m in MUTANTS])
def test_a_planted_mistake_is_found(mutant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, old, new, message = MUTANTS[mutant]
    broken = Emulation(build_mutant(tmp_path, file, old, new))
    monkeypatch.setattr(cuda_library, "library", lambda: broken)
    with pytest.raises((AssertionError, RuntimeError), match=message):
        for case in CASES:
            check(cuda, case, TO_NEAREST)
        edges.check_large_logits(cuda)
        edges.check_far_rows(cuda)
