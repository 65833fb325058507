"""The onion: each seam is an ordinary function, wrapped once at build time by the methods that use it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["SEAMS", "Layer", "fold"]

SEAMS = ("loss", "backward", "gradient", "step", "predict")
"""Run-time seams from the inside out; `predict` stands beside them for evaluation."""

Layer = Callable[..., Any]


def fold(base: Layer, layers: Iterable[Layer]) -> Layer:
    """Wrap `base` by `layers`, innermost first. A layer takes `inner` first and may call it 0..K times."""
    function = base
    for layer in layers:
        function = functools.partial(layer, function)
    return function
