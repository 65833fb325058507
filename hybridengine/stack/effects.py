"""What each method really did. No effect while active stops the run: that is how popular recipes fail."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hybridengine.errors import NoEffectError
from hybridengine.plugin.stacking import Method

__all__ = ["PATIENCE", "EffectLog"]

PATIENCE = 20
"""Steps that an active method may go without effect."""


class EffectLog:
    """Effects reported by methods: mean, last and count of each, converted from tensors only on `flush`."""

    def __init__(self, methods: Sequence[Method], patience: int = PATIENCE) -> None:
        self._methods = {id(m.plugin): m for m in methods}
        self._patience = patience
        self._pending: list[tuple[int, str, str, Tensor | float]] = []
        self._totals: dict[str, dict[str, list[float]]] = {m.name: {} for m in methods}
        self._idle = {m.name: 0 for m in methods if m.traits.effect and m.check_effect}
        self._watch = {m.name: m for m in methods if m.name in self._idle}
        self._steps: list[int] = []

    def report(self, plugin: object, effects: Mapping[str, Tensor | float]) -> None:
        """Called through `ctx.report`; keeps detached tensors, without a synchronisation."""
        method = self._methods.get(id(plugin))
        if method is None:
            raise ValueError(f"{plugin!r} is not a member of this stack; call ctx.report(self, ...)")
        for name, value in effects.items():
            step = len(self._steps)
            self._pending.append((step, method.name, name, value.detach() if isinstance(value, Tensor) else value))

    def step_end(self, step: int) -> None:
        """Mark the end of an optimizer step; every `PATIENCE` steps look for idle methods."""
        self._steps.append(step)
        if len(self._steps) >= self._patience:
            self.flush()

    def flush(self) -> None:
        """Turn what was reported into numbers and check for methods without effect.

        Raises:
            NoEffectError: naming the method, what it should have reported, and how to switch the check off.
        """
        seen: dict[tuple[int, str, str], float] = {}
        for step, method, name, value in self._pending:
            number = float(value.float().abs().mean()) if isinstance(value, Tensor) else float(value)
            entry = self._totals[method].setdefault(name, [0.0, 0.0, 0.0])
            entry[0] += number
            entry[1] += 1
            entry[2] = number
            key = (step, method, name)
            seen[key] = max(seen.get(key, 0.0), abs(number))
        self._pending.clear()
        steps, self._steps = self._steps, []
        for name, watched in self._watch.items():
            effect = watched.traits.effect or ""
            for index, step in enumerate(steps):
                if not watched.active(step):
                    continue
                self._idle[name] = 0 if seen.get((index, name, effect), 0.0) > 0 else self._idle[name] + 1
                if self._idle[name] >= self._patience:
                    self._refuse(watched, effect, step)

    def _refuse(self, method: Method, effect: str, step: int) -> None:
        raise NoEffectError(
            f"step {step + 1}: method {method.name!r} was active for {self._patience} steps without any effect"
            f" (its {effect!r} stayed 0). It costs time and changes nothing: check its parameters, or remove it; if"
            f" this is what you want, write `{method.name}: {{check_effect: false}}`."
        )

    def summary(self) -> dict[str, dict[str, dict[str, float]]]:
        """Mean, last and count of every effect, by method."""
        out: dict[str, dict[str, dict[str, float]]] = {}
        for method, effects in self._totals.items():
            out[method] = {
                name: {"mean": total / count, "last": last, "count": int(count)}
                for name, (total, count, last) in effects.items()
            }
        return out

    def state_dict(self) -> dict[str, Any]:
        """Totals and idle counters, JSON-able."""
        return {"totals": self._totals, "idle": self._idle}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for method, effects in state["totals"].items():
            if method in self._totals:
                self._totals[method] = {name: list(values) for name, values in effects.items()}
        self._idle.update({k: v for k, v in state["idle"].items() if k in self._idle})
