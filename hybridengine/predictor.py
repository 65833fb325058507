"""Use a finished run: predict texts, or evaluate on other rows, with its best weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridengine.batches import Assembler, in_order
from hybridengine.building import build_model, features_of, initial_run, prepare_data
from hybridengine.config import load_config, read_source
from hybridengine.data.checks import row_problem
from hybridengine.data.rows import TARGET_ROLES, Split
from hybridengine.errors import ConfigError, DataError, ModelError, OutputError
from hybridengine.evaluate.evaluator import Evaluator
from hybridengine.model.loading import load_model_config, load_tokenizer
from hybridengine.plugin.catalogue import Catalogue
from hybridengine.run import Run
from hybridengine.seams import Batch, Draw, Feature, Prediction, Row
from hybridengine.seams.sites import Sites
from hybridengine.seams.types import View
from hybridengine.stack import compose, evaluation, resolve
from hybridengine.train.adapters import needs_base
from hybridengine.train.best import load_best

__all__ = ["Predictor", "answering"]


class Predictor:
    """The best model of a run folder, ready to predict.

    Args:
        folder: a run folder.
        methods: method objects, where the run was made with any in Python.
        data: a `data` section in place of the run's own, for `evaluate`.

    Raises:
        OutputError: the folder holds no finished run.
    """

    def __init__(
        self, folder: str | Path, methods: Sequence[object] = (), data: Mapping[str, Any] | None = None
    ) -> None:
        self.folder = _last_stage(Path(folder))
        best = self.folder / "best"
        if (self.folder / "config.yaml").is_file() and not best.is_dir():
            raise OutputError(
                f"{folder} holds a run that stopped before its first evaluation, so there is no `best/` yet; train on"
                " with the command and config that started it"
            )
        if not best.is_dir() or not (self.folder / "config.yaml").is_file():
            raise OutputError(f"{folder} holds no trained model; give a run folder that has `config.yaml` and `best/`")
        source = read_source(self.folder / "config.yaml")
        if data is not None:
            source.values["data"] = dict(data)
        self.config, self._source = load_config(source.values)
        about = json.loads((best / "hybridengine.json").read_text(encoding="utf-8"))
        adapter = needs_base(best)
        self.run = self._build(best, about, adapter, methods)
        self._ctx = compose(self.run, self._hooks)
        self._ctx.trace.recording = False

    def _build(self, best: Path, about: Mapping[str, Any], adapter: bool, methods: Sequence[object]) -> Run:
        """The run's model by the road it was built on: the base and its adapter, or the full weights at once."""
        config = self.config.model_copy(deep=True)
        if not adapter:
            config.model.name = str(best)
        config.model.tokenizer = str(best)
        self._resolved = resolve(config, self._source, Catalogue(), methods)
        self._hooks = self._resolved.hooks()
        run = initial_run(config)
        run.predicting = True
        run.notes.clear()
        run.labels = list(about["labels"])
        run.memories = dict(about.get("memory", {}))
        run.task = self._hooks.build("build_task", run, only=self._resolved.task.name)
        run.model_config = load_model_config(config.model)
        run.tokenizer = self._hooks.build("build_tokenizer", run) or load_tokenizer(config.model)
        build_model(run, self._hooks)
        if adapter:
            run.model = self._hooks.transform("transform_model", run, run.model)
        run.model.to(run.device)
        run.probe = self._probe(run)
        run.sites = Sites(run.model, run.probe)
        self._hooks.notify("on_run_start", run)
        load_best(run, best)
        run.forward_model = run.model
        run.freeze_parameter_sets()
        run.model.eval()
        return run

    def _probe(self, run: Run) -> dict[str, Any]:
        inputs = (role for role in run.task.columns if role not in TARGET_ROLES)
        row = {role: ["text"] if role == "tokens" else "text" for role in inputs}
        batch = run.task.collate(run, run.task.features(run, [row, row]), (0, 1), run.random)
        return dict(batch.to(run.device).inputs)

    def predict(
        self, texts: str | Mapping[str, Any] | Iterable[str | Mapping[str, Any]], batch_size: int = 64
    ) -> list[dict[str, Any]]:
        """One record per text, in order.

        Args:
            texts: strings, or mappings with the task's columns (`text`, `text_pair`, `tokens`, ...); a single one is
                a list of one.
            batch_size: rows per forward.

        Raises:
            DataError: a row that the task cannot use, naming it.
        """
        rows = self._rows(_listed(texts))
        if not rows:
            return []
        records: list[dict[str, Any]] = [{}] * len(rows)
        for draw, batch, prediction in self._predictions(rows, batch_size):
            made = self.run.task.records(self.run, batch, prediction, [rows[i] for i in draw.rows])
            for position, record in zip(draw.rows, made, strict=True):
                records[position] = record
        return records

    def log_probabilities(self, rows: Sequence[Row], batch_size: int = 64) -> Tensor:
        """Of each class for each row, `[B, C]`; columns are named by the task's roles, and labels are not read."""
        rows = [{role: value for role, value in row.items() if role not in TARGET_ROLES} for row in rows]
        found: list[Tensor] = [torch.empty(0)] * len(rows)
        for draw, _, prediction in self._predictions(rows, batch_size):
            assert prediction.scores is not None
            for position, scores in zip(draw.rows, prediction.scores, strict=True):
                found[position] = scores.clamp_min(torch.finfo(scores.dtype).tiny).log()
        return torch.stack(found)

    def _predictions(self, rows: Sequence[Row], batch_size: int) -> Iterator[tuple[Draw, Batch, Prediction]]:
        run = self.run
        run.splits = {"test": Split("test", rows, "input")}
        features = features_of(run, self._hooks, rows)
        assembler = Assembler(run, {"test": features})
        with evaluation(self._ctx, self._hooks, stored=True):
            for draw in in_order([f["length"] for f in features], batch_size)(0):
                batch = assembler.batch("test", draw, 0).to(run.device)
                yield draw, batch, self._ctx.predict(self._ctx, batch, View(key=0))

    def evaluate(self) -> dict[str, Any]:
        """Metrics on the validation and test rows.

        Raises:
            DataError: the rows cannot be read, or have other labels than the model.
        """
        run = self.run
        trained = run.labels
        prepare_data(run, self._hooks, self._resolved)
        if run.labels != trained:
            raise DataError(f"these rows have the labels {run.labels}, the model was trained for {trained}")
        features: dict[str, list[Feature]] = {}
        for name in ("validation", "test"):
            if name in run.splits:
                features[name] = features_of(run, self._hooks, run.splits[name].rows)
        lengths = {name: [f["length"] for f in made] for name, made in features.items()}
        evaluator = Evaluator(run, self._ctx, self._hooks, Assembler(run, features), lengths)
        evaluator.stored_weights = True
        return {name: evaluator.evaluate(name) for name in features}

    def _rows(self, texts: Sequence[str | Mapping[str, Any]]) -> list[dict[str, Any]]:
        role = next(iter(self.run.task.columns))
        columns = {**self.run.task.columns, **self.config.data.columns}
        columns = {r: c for r, c in columns.items() if r not in TARGET_ROLES}
        rows = []
        for index, item in enumerate(texts):
            if not isinstance(item, str | Mapping):
                raise DataError(
                    f"input:{index + 1}: expected a text or a mapping such as {_example(columns, role)}, not"
                    f" {type(item).__name__}"
                )
            row = {role: item} if isinstance(item, str) else {r: item[c] for r, c in columns.items() if c in item}
            if role not in row:
                have = ", ".join(map(repr, item)) or "none"
                raise DataError(
                    f"input:{index + 1}: there is no column {columns[role]!r}, only {have}; rename the one that holds"
                    f" the {role}, so that a row reads {_example(columns, role)}"
                )
            if problem := row_problem(row, {r: r for r in row}, ()) or self.run.task.check_row(row):
                raise DataError(f"input:{index + 1}: {problem}")
            rows.append(row)
        return rows


def answering(run: Run) -> Run:
    """The same run, which can ask finished ones (`run.load_answers`)."""
    run.load_answers = lambda name: _answers(name, run.labels)
    return run


def _answers(name: str, labels: Sequence[str]) -> Callable[[Sequence[Row]], Tensor] | None:
    """The class log-probabilities that a finished run gives rows, where it writes them in its own way (a template).

    None for any other model: it understands the inputs of the run that asks.

    Raises:
        ModelError: the run was trained for other labels than those.
    """
    folder = _last_stage(Path(name))
    if not (folder / "config.yaml").is_file() or not (folder / "best").is_dir():
        return None
    config, source = load_config(read_source(folder / "config.yaml").values)
    try:
        hooks = resolve(config, source, Catalogue()).hooks()
    except ConfigError:  # it was made with method objects of Python, which are not here
        return None
    if not hooks.implementations("build_features"):
        return None
    finished = Predictor(folder)
    if finished.run.labels != list(labels):
        raise ModelError(
            f"{name} cannot teach: its labels are {finished.run.labels[:8]}, this run's are {list(labels)[:8]}, in"
            " order; give a run that was trained with these labels"
        )
    return finished.log_probabilities


def _listed(texts: Any) -> list[Any]:
    if isinstance(texts, str | Mapping):
        return [texts]
    if not isinstance(texts, Iterable) or isinstance(texts, bytes):
        raise DataError(f"expected texts, or mappings with the task's columns, not {type(texts).__name__}")
    return list(texts)


def _example(columns: Mapping[str, str], role: str) -> str:
    return f'{{"{columns[role]}": {["a", "b"] if role == "tokens" else "..."!r}}}'.replace("'", '"')


def _last_stage(folder: Path) -> Path:
    """The folder that holds `best/`: of a run in stages, the last one's; also where `best/` itself is named."""
    if folder.name == "best" and (folder.parent / "config.yaml").is_file():
        return folder.parent
    stages = sorted(folder.glob("stage-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    return folder if (folder / "best").is_dir() or not stages else stages[-1]
