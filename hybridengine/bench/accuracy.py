"""Errors against float64, on as many rows as float64 can take."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from hybridengine.bench.case import OURS, Case, Function
from hybridengine.bench.computation import Computation, copied, in_float64

__all__ = ["WRONG", "checked_rows", "errors", "relative_error", "worst"]

# Half precision rounds to 4e-3; a wrong scale, sign or order of differentiation is far off.
WRONG = 0.05

_MOST_ELEMENTS = 1 << 22
"""Of the widest intermediate: some tens of MB in float64."""


def checked_rows(case: Case) -> int:
    """How many rows of the case are compared."""
    return max(1, min(case.rows, _MOST_ELEMENTS // max(1, case.width)))


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Return ||found - exact|| / ||exact||; the numerator alone where `exact` is 0."""
    distance = torch.linalg.vector_norm(found.detach().double() - exact.double())
    norm = torch.linalg.vector_norm(exact.double())
    return float(distance / norm if norm > 0 else distance)


def errors(case: Case, functions: Mapping[str, Function], device: torch.device) -> dict[str, dict[str, float]]:
    """Return, for each competitor, the error of each of its results; one that fails or is not compared is left out.

    A gradient that is missing, as of a loss that was silently detached, is an infinite error. A compiled function is
    compared at the case's own shape alone: another one would be compiled again.
    """
    if case.exact is None:
        return {}
    rows = checked_rows(case)
    inputs = case.make(rows, device)
    function = case.functions["torch"] if case.exact == "torch" else case.exact
    exact = Computation(function, in_float64(inputs), case.wanted, case.mode)()
    found = {}
    for name, competitor in functions.items():
        if name == "compile" and rows != case.rows:
            continue
        try:
            results = Computation(competitor, copied(inputs), case.wanted, case.mode)()
        except Exception:  # it ran on all rows: some competitors want many
            if name == OURS:
                raise
            continue
        found[name] = {
            key: relative_error(results[key], value) if key in results else math.inf for key, value in exact.items()
        }
    return found


def worst(found: Mapping[str, float]) -> float:
    """The largest error; NaN if one is."""
    return max(found.values(), key=lambda one: math.inf if math.isnan(one) else one, default=0.0)
