"""A second distribution that claims the name `gradient-noise`."""

from __future__ import annotations

from dataclasses import dataclass

from hybridengine.plugin import parameter

__all__ = ["Noise"]


@dataclass(eq=False)
class Noise:
    """Does nothing, under a name that is taken."""

    level: float = parameter(0.5, "unused", ge=0)
