"""The run folder: who owns it, whether it goes on, and what is written where."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from hybridengine.config import Config
from hybridengine.errors import OutputError
from hybridengine.train.files import append_lines, clear_leftovers, finite, write_json, write_text

__all__ = ["RunFolder", "resolved"]

_FREE = {"output", "resume", "log"}  # keys that may change between a run and its continuation


class RunFolder:
    """`config.yaml`, `plan.json`, `data_card.json`, `metrics.jsonl`, `summary.json`, `checkpoints/`, `best/`, ..."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.best = path / "best"
        self.checkpoints = path / "checkpoints"
        self.predictions = path / "predictions.jsonl"
        self._metrics = path / "metrics.jsonl"

    def check(self, config: Config) -> None:
        """Refuse what can be no output folder, or no checkpoint to start from.

        Raises:
            OutputError: the path is a file or cannot be used, or `resume` names no folder.
        """
        path = self.path
        if config.resume not in ("auto", "never") and not Path(config.resume).is_dir():
            raise OutputError(
                f"resume: there is no checkpoint folder {config.resume}; use auto, never, or an existing path such as"
                f" {self.checkpoints / 'step-00000010'}"
            )
        try:
            exists = path.exists()
        except OSError as error:
            raise OutputError(f"output {str(path)[:200]} cannot be used ({error.strerror}); choose another") from None
        if exists and not path.is_dir():
            raise OutputError(f"output {path} is a file; choose another `output` folder")

    def claim(self, config: Config) -> dict[str, Any] | None:
        """Take the folder for this config; returns the summary of a finished run of the same config.

        Raises:
            OutputError: as `check`; foreign files, or another config (naming the changed keys), or `resume: never`.
        """
        self.check(config)
        path = self.path
        occupied = path.is_dir() and any(path.iterdir())
        if not occupied:
            return None
        if config.resume == "never":
            raise OutputError(f"output {path} exists and `resume` is never; choose another `output` or remove it")
        if not (path / "config.yaml").is_file():
            raise OutputError(f"output {path} holds files that are no run of hybridengine; choose another `output`")
        changed = self._changed(config)
        if changed and not self._holds_nothing():
            steps = sorted(self.checkpoints.glob("step-*"))
            longer = steps and {"train.epochs", "train.max_steps"}.issuperset(changed)  # a checkpoint brings its own lr
            start = f" To train it for longer: output=ANOTHER resume={steps[-1]}" if longer else ""
            raise OutputError(
                f"output {path} holds a run of another config; changed: {', '.join(changed)}. Choose another `output`,"
                f" or restore these keys to go on with that run.{start}"
            )
        summary = self.summary()
        return summary if summary is not None and summary.get("status") == "finished" else None

    def check_data(self, card: Mapping[str, Any]) -> None:
        """Compare prepared rows with those of the run that the folder holds, by the digests of their data cards.

        Raises:
            OutputError: they are others, naming the splits.
        """
        before, now = self._digests(self._stored("data_card.json") or {}), self._digests(card)
        if not before or self._holds_nothing():
            return
        if changed := [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]:
            raise OutputError(
                f"output {self.path} holds a run on other data; the rows of these splits have changed since:"
                f" {', '.join(changed)}. Choose another `output`, or restore the rows to go on with that run."
            )

    @staticmethod
    def _digests(card: Mapping[str, Any]) -> dict[str, str]:
        """By split; a card without digests tells nothing."""
        splits = card.get("splits", {})
        return {name: split["digest"] for name, split in splits.items() if "digest" in split}

    def _holds_nothing(self) -> bool:
        """Whether the run failed before its first checkpoint, so that another config may take its place."""
        failed = (self.summary() or {}).get("status") == "failed"
        return failed and not self.best.exists() and not any(self.checkpoints.glob("step-*"))

    def open(self, config: Config) -> None:
        """Create the folder, clear what a crash left in it, and write the resolved config."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"output {self.path} cannot be created ({error.strerror}); choose another `output`"
            ) from error
        for folder in (self.path, self.checkpoints):
            clear_leftovers(folder)
        write_text(self.path / "config.yaml", yaml.safe_dump(resolved(config), sort_keys=False, allow_unicode=True))

    def write(self, name: str, value: Any) -> None:
        """Replace one JSON file of the folder."""
        write_json(self.path / name, value)

    def summary(self) -> dict[str, Any] | None:
        """The summary, if there is a readable one."""
        return self._stored("summary.json")

    def _stored(self, name: str) -> dict[str, Any] | None:
        try:
            loaded: dict[str, Any] = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return loaded

    def append(self, line: dict[str, Any]) -> None:
        """Add one line to `metrics.jsonl`; NaN is refused by JSON and written as null."""
        append_lines(self._metrics, [json.dumps(finite(line), ensure_ascii=False, allow_nan=False)])

    def record(self, lines: list[str]) -> None:
        """Add lines to `predictions.jsonl`."""
        append_lines(self.predictions, lines)

    def rewind(self, step: int) -> None:
        """Drop metric lines after `step`, so that a resumed run's log reads like an uninterrupted one."""
        if not self._metrics.is_file():
            return
        kept = []
        for line in self._metrics.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError):
                break  # a line cut by a crash
        write_text(self._metrics, "".join(f"{line}\n" for line in kept))

    def _changed(self, config: Config) -> list[str]:
        try:
            old = yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError):
            raise OutputError(f"{self.path / 'config.yaml'} is unreadable; choose another `output`") from None
        before, now = _flat(old), _flat(resolved(config))
        keys = sorted(before.keys() | now.keys())
        return [k for k in keys if k.split(".")[0] not in _FREE and before.get(k) != now.get(k)]


def resolved(config: Config) -> dict[str, Any]:
    """The config with every default, as JSON."""
    dumped: dict[str, Any] = json.loads(json.dumps(config.model_dump(mode="python"), default=_describe))
    return dumped


def _describe(value: object) -> str:
    """Python objects in a config (rows, data sets) are written as what they are, not as what they hold."""
    size = f" of {len(value)}" if hasattr(value, "__len__") else ""
    return f"<{type(value).__name__}{size}>"


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        out: dict[str, Any] = {}
        for key, entry in value.items():
            out.update(_flat(entry, f"{prefix}.{key}" if prefix else str(key)))
        return out
    return {prefix: value}
