"""Stages: partial configs run in sequence, each from the best model of the one before."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from hybridengine.config import Config, Source, apply_overrides, check_config
from hybridengine.errors import ConfigError
from hybridengine.folder import RunFolder
from hybridengine.model.loading import quiet
from hybridengine.plugin.catalogue import Catalogue
from hybridengine.predictor import Predictor
from hybridengine.stack.resolve import plugin_problems, resolve
from hybridengine.train.adapters import ADAPTER, adds_modules
from hybridengine.train.files import replace_folder
from hybridengine.train.progress import Event, Listener

__all__ = ["evaluated_data", "merged", "stage_configs", "train_stages"]


class StageEngine(Protocol):
    """What a stage needs of the engine, which stands above."""

    def train(self) -> dict[str, Any]: ...
    def check_data(self) -> None: ...


def merged(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `change`, sections merged key by key, lists replaced."""
    out = copy.deepcopy(dict(base))
    for key, value in change.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = merged(out[key], value) if both else copy.deepcopy(value)
    return out


def stage_configs(config: Config, source: Source | None = None, methods: Sequence[object] = ()) -> list[Config]:
    """One full config per stage, in folders `stage-1`, `stage-2`, ... of the output.

    Args:
        source: where the keys of `config` stand, for errors.
        methods: method objects that join the stack of every stage.

    Raises:
        ConfigError: with every problem of every stage.
    """
    if config.stages and config.resume not in ("auto", "never"):
        raise ConfigError(
            f"resume: the checkpoint {config.resume} belongs to one run, but `stages` makes {len(config.stages)}; set"
            " `resume: auto` (each goes on from its own newest checkpoint), or name it in the stage that starts there"
        )
    base = config.model_dump(exclude={"stages"})
    found, problems = [], {}
    for index, stage in enumerate(config.stages):
        values = merged(base, {**stage, "output": str(Path(config.output) / f"stage-{index + 1}")})
        own = (source or Source({}, "config")).part(("stages", index), values)
        try:
            found.append(check_config(own, plugin_problems))
            added = adds_modules(resolve(found[-1], own, Catalogue(), methods).methods)
            if added and index + 1 < len(config.stages):
                raise ConfigError(
                    f"stages: {added[0]} cannot be merged into its base, so no stage can start from it; make it the"
                    " last stage, or use lora here"
                )
        except ConfigError as error:
            problems.update(dict.fromkeys(f"{problem} (stage {index + 1})" for problem in error.problems))
    if problems:
        raise ConfigError(list(problems))
    return found


def evaluated_data(config: Config, source: Source) -> dict[str, Any]:
    """The section `data` that a run is measured on: its own, or what the overrides of `source` put in its place."""
    rows = Source({"data": config.data.model_dump()})
    apply_overrides(rows, [text for key, text in source.overrides.items() if key[0] == "data"])
    section: dict[str, Any] = rows.values["data"]
    return section


def train_stages(
    config: Config,
    stages: Sequence[Config],
    engine: Callable[[Config], StageEngine],
    methods: Sequence[object],
    listen: Listener,
) -> dict[str, Any]:
    """Train every stage; returns the last one's summary, with all of them under `stages`.

    A stopped run goes on with the first unfinished stage.

    Args:
        stages: the full configs of `stage_configs`.
        engine: makes the engine of a stage.
        methods: method objects, which the model of a stage needs to be built again.
    """
    folder = RunFolder(Path(config.output))
    finished = folder.claim(config)
    if finished is not None:
        for stage in stages:
            engine(stage).check_data()
        return finished
    folder.open(config)
    summaries: list[dict[str, Any]] = []
    start: str | None = None
    for number, stage in enumerate(stages, 1):
        if start is not None:
            stage = stage.model_copy(update={"model": stage.model.model_copy(update={"name": start})})
        listen(Event("note", message=f"stage {number} of {len(stages)}: {stage.output}"))
        summaries.append(engine(stage).train())
        start = _start_of_next(Path(stage.output), methods)
    result = {**summaries[-1], "output": config.output, "stages": summaries}
    folder.write("summary.json", result)
    return result


def _start_of_next(folder: Path, methods: Sequence[object]) -> str:
    """The best model as a full model: an adapter is merged into its base first."""
    best = folder / "best"
    if not (best / ADAPTER).is_file():
        return str(best)
    full = folder / "merged"
    if not full.is_dir():
        run = Predictor(folder, copy.deepcopy(list(methods))).run
        with replace_folder(full) as staging, quiet():
            run.model.merge_and_unload().save_pretrained(staging)
            run.tokenizer.save_pretrained(staging)
    return str(full)
