"""What an operation's file in `ops/` gives: cases, each a set of tensors and the functions that compete on them.

A file `ops/<name>.py` holds

    KERNEL = "cross_entropy"          # its function in `hybridengine.kernels`; without that function the op is left out

    def cases(device: str) -> list[Case]:      # for "cpu" or "cuda"
        ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

__all__ = ["OURS", "SHORT", "TIERS", "Case", "Function", "Mode", "Tensors", "Tier", "family", "label"]

OURS = "hybridengine"

Mode = Literal["forward", "forward+backward", "second order"]
Tier = Literal["quick", "default", "full"]
TIERS: tuple[Tier, ...] = ("quick", "default", "full")

Function = Callable[..., Any]
Tensors = dict[str, Any]

SHORT = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True, eq=False)
class Case:
    """One line of the table.

    Args:
        label: shape, dtype and options, as the table shows them.
        facts: the same for programs.
        dtype: of the floating inputs; its GEMM rate counts for the floor.
        mode: "second order" differentiates the sum of the squared gradients, as a gradient penalty does.
        rows: of the case.
        width: elements of the widest intermediate for one row; tells how many rows float64 can check.
        make: (rows, device) -> inputs by name, in the order of the functions' arguments. `upstream`, if there, is no
            argument but the gradient that comes in from above.
        wanted: inputs whose gradient is computed.
        functions: competitors by name. The first word is the family that `--against` names ("torch-lce 256" belongs to
            "torch-lce"); `OURS` and "torch" must be there. "compile" is made from "torch".
        exact: computed in float64 to tell errors; "torch" by default, None where results are random.
        memory: bytes that the hungriest of the usual competitors needs beside its inputs.
        flops: of matrix products; 0 for the rest.
        moved: bytes that any implementation must read and write; by default all inputs and all results.
        mutating: competitors that change their inputs; they get copies.
        tier: "quick" cases run always, "full" ones with `--full` alone.
    """

    label: str
    facts: Mapping[str, Any]
    dtype: torch.dtype
    mode: Mode
    rows: int
    width: int
    make: Callable[[int, torch.device], Tensors]
    wanted: tuple[str, ...]
    functions: Mapping[str, Function]
    memory: float
    exact: Function | Literal["torch"] | None = "torch"
    flops: float = 0.0
    moved: float | None = None
    mutating: frozenset[str] = field(default_factory=frozenset)
    tier: Tier = "default"


def family(variant: str) -> str:
    """The name by which `--against` knows a competitor."""
    return variant.partition(" ")[0]


def label(dtype: torch.dtype, shape: tuple[int, ...], mode: Mode, *more: str) -> str:
    """`fp32 512 x 30,522`, then what is out of the ordinary."""
    words = [f"{SHORT[dtype]} {' x '.join(f'{size:,}' for size in shape)}", *filter(None, more)]
    return ", ".join(words + ([mode] if mode != "forward+backward" else []))
