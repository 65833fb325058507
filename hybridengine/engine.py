"""The engine: prepare, select, initialize, adapt, train, evaluate. Each step is a method; `train()` makes them all."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hybridengine import kernels
from hybridengine.batches import Assembler
from hybridengine.building import adapt_model, build_model, build_optimizer, initial_run, make_features, prepare_data
from hybridengine.config import Config, load_config
from hybridengine.data.card import card_lines
from hybridengine.errors import HybridEngineError, OutputError, StackError, Stopped
from hybridengine.estimate import estimate_memory
from hybridengine.evaluate.evaluator import Evaluator
from hybridengine.folder import RunFolder
from hybridengine.model.loading import capabilities_of, load_model_config, load_tokenizer
from hybridengine.plugin.catalogue import Catalogue
from hybridengine.plugin.stacking import StackView
from hybridengine.predictor import Predictor
from hybridengine.report import write_report
from hybridengine.stack import EffectLog, Plan, check_stack, compose, make_plan, resolve
from hybridengine.stack.plan import training_sampler
from hybridengine.stages import train_stages
from hybridengine.summary import make_summary
from hybridengine.train.best import load_best
from hybridengine.train.checkpoint import Checkpoints, Progress
from hybridengine.train.loop import Loop
from hybridengine.train.progress import Event, Listener, silent
from hybridengine.train.trackers import open_tracker

__all__ = ["Engine"]


class Engine:
    """One run, from configuration to report.

    As a library it prints nothing, sets no signal handler and changes no global torch setting.

    Args:
        config: path of a YAML file, or the same as a mapping.
        overrides: dotted overrides, e.g. `["train.lr=1e-5"]`.
        methods: method objects that join the stack without packaging.
        progress: called with every `Event`.
        cancel: asked after every step; True writes a checkpoint and raises `Stopped`.

    Raises:
        ConfigError: with every problem of the configuration.

    Example:
        Engine({"task": "text-classification", "model": {"name": "path"}, "data": {"train": "a.jsonl"}}).train()
    """

    def __init__(
        self,
        config: str | Path | Mapping[str, Any] | Config,
        overrides: Sequence[str] = (),
        methods: Sequence[object] = (),
        *,
        progress: Listener | None = None,
        cancel: Callable[[], bool] | None = None,
    ) -> None:
        self.config, self._source = load_config(config, overrides)
        self.folder = Path(self.config.output)
        self._listen = progress or silent
        self._cancel = cancel or (lambda: False)
        self._resolved = resolve(self.config, self._source, Catalogue(), methods)
        self._hooks = self._resolved.hooks()
        self._run = initial_run(self.config)
        self._extra = methods
        self._done: set[str] = set()
        self._plan: Plan | None = None

    # ---- the steps -------------------------------------------------------------------------------------------------

    def prepare(self) -> Engine:
        """Read, check and split the data; build the task; write nothing."""
        if self._first("prepare"):
            prepare_data(self._run, self._hooks, self._resolved)
        return self

    def select(self) -> Engine:
        """Check that the stack fits task, data and model, and plan its passes; the model is not loaded yet."""
        self.prepare()
        if self._first("select"):
            run, hooks = self._run, self._hooks
            run.model_config = load_model_config(self.config.model)
            run.tokenizer = hooks.build("build_tokenizer", run) or load_tokenizer(self.config.model)
            have = self._capabilities()
            methods = self._resolved.methods
            facts = {"config": self.config, "capabilities": have, "labels": run.labels, "model": run.model_config}
            problems = check_stack(methods, have) + hooks.collect("check_stack", StackView(methods, facts))
            if problems:
                raise StackError(problems)
            run.steps_per_epoch, run.total_steps = self._steps()
            self._plan = make_plan(self.config, methods, run.total_steps, "unlabelled" in run.splits)
            self._plan.kernels = [row._asdict() for row in kernels.explain()]
            self._plan.memory = estimate_memory(run, methods)
        return self

    def initialize(self) -> Engine:
        """Load model and tokenizer."""
        self.select()
        if self._first("initialize"):
            build_model(self._run, self._hooks)
        return self

    def adapt(self) -> Engine:
        """Apply adapters, tokenise, fix the parameter sets, build optimizer and schedule, fold the seams."""
        self.initialize()
        if self._first("adapt"):
            run, hooks = self._run, self._hooks
            adapt_model(run, hooks)
            self._features = make_features(run, hooks)
            self._lengths = {name: [f["length"] for f in features] for name, features in self._features.items()}
            self._effects = EffectLog(self._resolved.methods)
            plan = self.plan()
            self._ctx = compose(run, hooks, stack_views=plan.stack_views, report=self._effects.report)
            self._sampler = training_sampler(run, hooks, self._lengths["train"])
            draws = len(self._sampler(0))
            run.steps_per_epoch, run.total_steps = self._steps(draws)
            build_optimizer(run, hooks)
            self._assembler = Assembler(run, self._features)
            self._evaluator = Evaluator(run, self._ctx, hooks, self._assembler, self._lengths)
        return self

    def train(self) -> dict[str, Any]:
        """Train (or go on with a stopped run), evaluate with the best weights, write the report.

        Returns:
            The summary, as in `summary.json`.

        Raises:
            Stopped: `cancel` asked for it; a checkpoint was written.
            HybridEngineError: what the user can mend; the run folder's summary says `failed`.
        """
        if self.config.stages:
            return train_stages(self.config, self._train_stage, self._listen)
        folder = RunFolder(self.folder)
        finished = folder.claim(self.config)
        if finished is not None:
            self._listen(Event("done", message=f"{self.folder} is finished already", values={"summary": finished}))
            return finished
        self.select()
        folder.open(self.config)
        try:
            return self._train(folder)
        except Stopped as stop:
            self._conclude(folder, "stopped", str(stop))
            raise
        except HybridEngineError as error:
            self._conclude(folder, "failed", str(error))
            raise
        finally:
            if "adapt" in self._done:
                self._hooks.notify("on_run_end", self._run)

    def evaluate(self) -> dict[str, Any]:
        """Metrics of the finished run's best model on the configured validation and test rows."""
        return Predictor(self.folder, self._extra, self.config.data.model_dump()).evaluate()

    # ---- looking without training -----------------------------------------------------------------------------------

    def validate(self) -> list[str]:
        """Everything that can be found without training: config, stack, data, model folder. Writes nothing.

        Returns:
            Lines worth reading: the data card and notes.
        """
        self.select()
        return [*card_lines(self._run.card), *self._run.notes]

    def plan(self) -> Plan:
        """What would run: layers, passes per step, cost and memory. Writes nothing."""
        self.select()
        if self._plan is None:
            raise RuntimeError("select() makes the plan")
        return self._plan

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _train(self, folder: RunFolder) -> dict[str, Any]:
        run = self._run
        plan = self.plan()
        folder.write("plan.json", plan.to_dict())
        self._listen(Event("plan", total=run.total_steps, message=plan.phases[0].passes, values={"plan": plan}))
        self.adapt()
        folder.write("data_card.json", run.card)
        checkpoints = Checkpoints(folder.checkpoints, self.config.train.keep)
        progress = self._resume(folder, checkpoints)
        trainable = sum(p.numel() for p in run.may_optimise.values())
        total = sum(p.numel() for p in run.model.parameters())
        for note in run.notes:
            self._listen(Event("note", run.step, run.total_steps, note))
        message = f"{trainable:,} of {total:,} parameters are trained, {run.total_steps} steps"
        values = {"trainable": trainable, "total": total, "card": run.card}
        self._listen(Event("start", run.step, run.total_steps, message, values))
        tracker = open_tracker(self.config.log.to, folder.path, self.config.model_dump(mode="json"))
        loop = Loop(
            run, self._ctx, self._hooks, self._effects, self._sampler, self._assembler, self._evaluator, checkpoints,
            folder, self._listen, self._cancel, tracker, progress,
        )  # fmt: skip
        self._progress = progress
        try:
            loop.train()
        finally:
            tracker.close()
        return self._finish(folder)

    def _train_stage(self, config: Config) -> dict[str, Any]:
        methods = copy.deepcopy(list(self._extra))
        return Engine(config, methods=methods, progress=self._listen, cancel=self._cancel).train()

    def _resume(self, folder: RunFolder, checkpoints: Checkpoints) -> Progress:
        run = self._run
        path: Path | None
        if self.config.resume in ("auto", "never"):
            path = checkpoints.latest(run)
        else:
            path = Path(self.config.resume)
            if not path.is_dir():
                raise OutputError(f"resume: there is no checkpoint folder {path}; use auto, never, or an existing path")
        if path is None:
            folder.rewind(0)
            return Progress()
        progress = checkpoints.restore(path, run, self._hooks, self._effects)
        folder.rewind(run.step)
        run.say(f"resumed from {path.name}")
        return progress

    def _finish(self, folder: RunFolder) -> dict[str, Any]:
        """Evaluate the best weights on validation and test, and write summary and report."""
        records = folder.path / "predictions.jsonl"
        records.unlink(missing_ok=True)
        splits = ["validation", *(["test"] if self.config.evaluate.test else [])]
        load_best(self._run, folder.best)
        self._evaluator.stored_weights = True
        metrics = {s: self._evaluator.evaluate(s, records=records) for s in splits if s in self._run.splits}
        summary = self._conclude(folder, "finished", "", metrics)
        self._listen(Event("done", self._run.step, self._run.total_steps, "finished", {"summary": summary}))
        return summary

    def _conclude(
        self, folder: RunFolder, status: str, error: str, metrics: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        progress = getattr(self, "_progress", Progress())
        effects = getattr(self, "_effects", None)
        summary = make_summary(self._run, folder.path, status, error, metrics or {}, progress, effects)
        folder.write("summary.json", summary)
        if status == "finished":
            summary["report"] = str(write_report(folder.path))
        return summary

    def _steps(self, draws: int | None = None) -> tuple[int, int]:
        """Optimizer steps per epoch and in all; before the features exist, estimated from the row count."""
        train = self.config.train
        if draws is None:
            sampler = self._hooks.build("build_sampler", self._run, "train")
            rows = len(self._run.splits["train"])
            draws = len(sampler(0)) if sampler is not None else -(-rows // train.batch_size)
        per_epoch = max(1, -(-draws // train.accumulate))
        total = train.max_steps or max(1, round(train.epochs * per_epoch))
        return per_epoch, total

    def _capabilities(self) -> set[str]:
        run = self._run
        have = capabilities_of(run.model_config)
        if run.labels:
            have.add("labels")
        if "text" in run.task.columns:
            have.add("text")
        if "unlabelled" in run.splits:
            have.add("unlabelled")
        if not self.config.train.checkpointing:
            have.add("functional")
        return have

    def _first(self, step: str) -> bool:
        first = step not in self._done
        self._done.add(step)
        return first
