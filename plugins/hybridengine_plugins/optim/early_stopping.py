"""Early stopping: no further training once validation has stopped getting better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from hybridengine.errors import ConfigError, did_you_mean
from hybridengine.plugin import Run, StackView, Traits, hook, parameter

__all__ = ["EarlyStopping"]

_LOWER = ("loss", "perplexity", "error", "ece")


@dataclass(eq=False)
class EarlyStopping:
    """Stops training after `patience` evaluations in a row without a better validation metric.

    Maths: an evaluation is better if its metric beats the best so far by more than `min_delta`; one that is no
    number never is. Best value and count are part of the run's state, so a resumed run stops at the same step.

    Paper: Prechelt 1998, "Early Stopping, But When?".
    Hooks: `check_stack`, `on_evaluate`. Cost: none. Combines with everything.
    """

    traits: ClassVar[Traits] = Traits(family="optim", paper="Prechelt 1998")

    patience: int = parameter(3, "evaluations in a row without a better metric", ge=1)
    metric: str | None = parameter(None, "metric to watch; by default the one that picks the best checkpoint")
    min_delta: float = parameter(0.0, "smallest change that counts as better", ge=0)
    mode: Literal["auto", "max", "min"] = parameter("auto", "whether larger is better; auto knows by the metric's name")

    @hook
    def check_stack(self, stack: StackView) -> list[str]:
        """The metric must be one of the task's, unless a method adds others."""
        known = stack.facts["metrics"]
        adds = any(hasattr(method.plugin, "transform_metrics") for method in stack.methods)
        if self.metric is None or self.metric in known or adds:
            return []
        return [f"early-stopping: the task has no metric {self.metric!r}.{did_you_mean(self.metric, known)}"]

    @hook
    def on_evaluate(self, run: Run, metrics: Mapping[str, Any]) -> None:
        """Count, and ask for a stop.

        Raises:
            ConfigError: if the metric is none of this evaluation's.
        """
        name = self.metric or run.config.evaluate.metric or run.task.metric
        if not isinstance(metrics.get(name, ""), int | float | None):
            known = [key for key, value in metrics.items() if isinstance(value, int | float)]
            raise ConfigError(f"early-stopping: no metric {name!r} in this evaluation.{did_you_mean(name, known)}")
        value = math.nan if metrics[name] is None else float(metrics[name])
        state = run.state("early-stopping")
        sign = 1.0 if self._larger(run, name) else -1.0
        best = state.get("best")
        if math.isfinite(value) and (best is None or sign * (value - best) > self.min_delta):
            state.update(best=value, step=run.step, waited=0)
            return
        state["waited"] = state.get("waited", 0) + 1
        if state["waited"] >= self.patience:
            found = "was never a number" if best is None else f"was best at step {state['step']} ({best:.6g})"
            run.stop_reason = f"early stopping: {name} {found} and not better in {state['waited']} evaluations since"

    def _larger(self, run: Run, name: str) -> bool:
        if self.mode != "auto":
            return self.mode == "max"
        if name == run.task.metric:
            return bool(run.task.greater_is_better)
        return not any(word in name for word in _LOWER)
