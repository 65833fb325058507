"""Optional experiment loggers, through their own libraries."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from hybridengine.errors import ConfigError

__all__ = ["Tracker", "check_trackers", "open_tracker"]

_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}


class Tracker(Protocol):
    """Somewhere that lines of `metrics.jsonl` go as well."""

    def log(self, line: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


class _Several:
    def __init__(self, members: Sequence[Tracker]) -> None:
        self._members = members

    def log(self, line: Mapping[str, Any]) -> None:
        for member in self._members:
            member.log(line)

    def close(self) -> None:
        for member in self._members:
            member.close()


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line, named `kind/name`."""
    kind = line["kind"]
    flat = {k: v for k, v in line.items() if isinstance(v, int | float) and k != "step"}
    for group in ("terms", "metrics"):
        flat.update({k: v for k, v in line.get(group, {}).items() if isinstance(v, int | float)})
    for method, effects in line.get("effects", {}).items():
        flat.update({f"{method}.{name}": value for name, value in effects.items()})
    return {f"{kind}/{name}": float(value) for name, value in flat.items()}


class _TensorBoard:
    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, line: Mapping[str, Any]) -> None:
        for name, value in scalars(line).items():
            self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._run = importlib.import_module("wandb").init(dir=str(folder), config=dict(config), name=folder.name)

    def log(self, line: Mapping[str, Any]) -> None:
        self._run.log(scalars(line), step=line["step"])

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._mlflow = importlib.import_module("mlflow")
        self._mlflow.start_run(run_name=folder.name)

    def log(self, line: Mapping[str, Any]) -> None:
        self._mlflow.log_metrics({k.replace("/", "."): v for k, v in scalars(line).items()}, step=line["step"])

    def close(self) -> None:
        self._mlflow.end_run()


_KINDS: dict[str, Callable[[Path, Mapping[str, Any]], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "mlflow": _MLflow,
}


def check_trackers(names: Sequence[str]) -> None:
    """Whether the loggers named by `log.to` are there.

    Raises:
        ConfigError: libraries are not installed, with the commands that install them.
    """
    missing = [name for name in names if importlib.util.find_spec(_PACKAGES[name]) is None]
    if missing:
        raise ConfigError(
            [f"log.to: {n} is not installed; run `pip install {_PACKAGES[n]}` or remove it" for n in missing]
        )


def open_tracker(names: Sequence[str], folder: Path, config: Mapping[str, Any]) -> Tracker:
    """The loggers named by `log.to`, which `check_trackers` has looked for."""
    return _Several([_KINDS[name](folder, config) for name in names])
