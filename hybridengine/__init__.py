"""hybridengine: fine-tune language models with checked, composable stacks of training methods.

Importing the package imports no torch; names are loaded when first used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybridengine.engine import Engine
    from hybridengine.predictor import Predictor

__version__ = "0.1.0"
__all__ = ["Engine", "Predictor", "__version__", "load"]


def load(folder: str | Path, methods: Sequence[object] = ()) -> Predictor:
    """The best model of a run folder, ready to predict: `hybridengine.load("runs/first").predict(["good"])`."""
    from hybridengine.predictor import Predictor

    return Predictor(folder, methods)


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from hybridengine.engine import Engine

        return Engine
    if name == "Predictor":
        from hybridengine.predictor import Predictor

        return Predictor
    raise AttributeError(f"module 'hybridengine' has no attribute {name!r}")
