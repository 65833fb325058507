"""Optional experiment loggers, through their own libraries."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from hybridengine.errors import ConfigError
from hybridengine.train.files import write_json

__all__ = ["Tracker", "check_trackers", "open_tracker"]

_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
_ADVICE = {
    "tensorboard": "",
    "wandb": "run `wandb login`, set WANDB_MODE=offline, ",
    "mlflow": "set MLFLOW_TRACKING_URI to a server that answers, ",
}
_IDENTITIES = "trackers.json"


class Tracker(Protocol):
    """Somewhere that lines of `metrics.jsonl` go as well."""

    def log(self, line: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


class _Several:
    """All loggers of a run. What fails while training is told once for each; the run itself goes on."""

    def __init__(self, members: Mapping[str, Tracker], say: Callable[[str], None]) -> None:
        self._members = members
        self._say = say
        self._told: set[str] = set()

    def log(self, line: Mapping[str, Any]) -> None:
        for name, member in self._members.items():
            self._try(name, partial(member.log, line))

    def close(self) -> None:
        for name, member in self._members.items():
            self._try(name, member.close)

    def _try(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # networks, disks and servers of three libraries
            if name not in self._told:
                self._told.add(name)
                self._say(f"{name} lost lines ({_first_line(error)}); metrics.jsonl has them all")


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
    identity = None

    def __init__(self, folder: Path, config: Mapping[str, Any], identity: str | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, line: Mapping[str, Any]) -> None:
        for name, value in scalars(line).items():
            self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, folder: Path, config: Mapping[str, Any], identity: str | None) -> None:
        again = {"id": identity, "resume": "allow"} if identity else {}
        init = importlib.import_module("wandb").init
        self._run = init(dir=str(folder), config=dict(config), name=folder.name, **again)
        self.identity = str(self._run.id)

    def log(self, line: Mapping[str, Any]) -> None:
        self._run.log(scalars(line), step=line["step"])

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self, folder: Path, config: Mapping[str, Any], identity: str | None) -> None:
        self._mlflow = importlib.import_module("mlflow")
        named = {"run_id": identity} if identity else {"run_name": folder.name}
        self.identity = str(self._mlflow.start_run(**named).info.run_id)

    def log(self, line: Mapping[str, Any]) -> None:
        self._mlflow.log_metrics({k.replace("/", "."): v for k, v in scalars(line).items()}, step=line["step"])

    def close(self) -> None:
        self._mlflow.end_run()


_KINDS: dict[str, Callable[[Path, Mapping[str, Any], str | None], Any]] = {
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


def open_tracker(names: Sequence[str], folder: Path, config: Mapping[str, Any], say: Callable[[str], None]) -> Tracker:
    """The loggers named by `log.to`, which `check_trackers` has looked for; a resumed run goes on in their old runs.

    Args:
        folder: the run folder; `trackers.json` keeps the loggers' names of the run there.
        config: what the loggers show as the run's configuration.
        say: told once of each logger that fails later.

    Raises:
        ConfigError: a logger cannot start.
    """
    known = _identities(folder)
    members: dict[str, Any] = {}
    for name in names:
        try:
            members[name] = _KINDS[name](folder, config, known.get(name))
        except Exception as error:  # each library has its own
            _Several(members, say).close()
            raise ConfigError(
                f"log.to: {name} cannot start ({_first_line(error)}); {_ADVICE[name]}or remove it from log.to"
            ) from error
    if found := {name: member.identity for name, member in members.items() if member.identity}:
        write_json(folder / _IDENTITIES, {**known, **found})
    return _Several(members, say)


def _identities(folder: Path) -> dict[str, str]:
    try:
        known: dict[str, str] = json.loads((folder / _IDENTITIES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
