"""Errors against float64, on as many rows as float64 can take."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from hybridengine.bench.case import OURS, Case, Function
from hybridengine.bench.computation import Computation, copied, in_float64

__all__ = ["WRONG", "Exact", "checked_rows", "relative_error", "worst"]

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


class Exact:
    """The results of a case in float64, and the errors of others against them.

    A gradient that is missing, as of a loss that was silently detached, is an infinite error.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        self._case, self._device = case, device
        self.rows = checked_rows(case) if case.exact is not None else 0
        if case.exact is not None:
            self._inputs = case.make(self.rows, device)
            function = case.functions["torch"] if case.exact == "torch" else case.exact
            self._results = Computation(function, in_float64(self._inputs), case.wanted, case.mode)()

    def errors(self, name: str, function: Function, results: Mapping[str, Tensor]) -> dict[str, float] | None:
        """Return the error of each result; None where there is nothing to compare.

        Args:
            name: of the competitor; "compile" is left out where rows are, as it would be compiled again.
            function: run again where not all rows are compared.
            results: of all rows.
        """
        if not self.rows or (name == "compile" and self.rows != self._case.rows):
            return None
        if self.rows != self._case.rows:
            try:
                results = Computation(function, copied(self._inputs), self._case.wanted, self._case.mode)()
            except Exception:  # it ran on all rows: some competitors want many
                if name == OURS:
                    raise
                return None
        return {
            key: relative_error(results[key], value) if key in results else math.inf
            for key, value in self._results.items()
        }


def worst(found: Mapping[str, float]) -> float:
    """The largest error; NaN if one is."""
    return max(found.values(), key=lambda one: math.inf if math.isnan(one) else one, default=0.0)
