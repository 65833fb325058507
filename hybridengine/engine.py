"""The engine: prepare, select, initialize, adapt, train, evaluate. Each step is a method; `train()` makes them all."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hybridengine import kernels
from hybridengine.batches import Assembler
from hybridengine.building import (
    adapt_model,
    build_model,
    build_optimizer,
    capabilities,
    initial_run,
    make_features,
    prepare_data,
)
from hybridengine.config import Config, load_config
from hybridengine.data.card import card_lines
from hybridengine.errors import HybridEngineError, OutputError, StackError, Stopped, check_all
from hybridengine.estimate import estimate_memory, estimate_steps
from hybridengine.evaluate.evaluator import Evaluator
from hybridengine.folder import RunFolder, resolved
from hybridengine.model.loading import load_model_config, load_tokenizer
from hybridengine.plugin.catalogue import Catalogue
from hybridengine.plugin.stacking import StackView
from hybridengine.predictor import Predictor, answering
from hybridengine.report import write_report
from hybridengine.stack import EffectLog, Plan, as_method, check_stack, compose, make_plan, resolve
from hybridengine.stack.plan import training_sampler
from hybridengine.stack.resolve import plugin_problems
from hybridengine.stages import evaluated_data, stage_configs, train_stages
from hybridengine.summary import make_summary
from hybridengine.train.best import load_best, save_best
from hybridengine.train.checkpoint import Checkpoints, Progress
from hybridengine.train.loop import Loop
from hybridengine.train.progress import Event, Listener, silent
from hybridengine.train.resume import resume
from hybridengine.train.trackers import check_trackers, open_tracker

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
        self.config, self._source = load_config(config, overrides, plugin_problems)
        self.folder = Path(self.config.output)
        self._listen = progress or silent
        self._cancel = cancel or (lambda: False)
        self._extra = methods
        self._done: set[str] = set()
        with self._step("resolve"):
            self._resolved = resolve(self.config, self._source, Catalogue(), methods)
            self.config.objects = [{m.name: m.described} for m in map(as_method, methods)]
            self._hooks = self._resolved.hooks()
            self._stages = stage_configs(self.config, self._source, methods)
            self._run = answering(initial_run(self.config))
            check_trackers(self.config.log.to)
        self._plan: Plan | None = None

    # ---- the steps -------------------------------------------------------------------------------------------------

    def prepare(self) -> Engine:
        """Read, check and split the data; build the task; write nothing."""
        with self._step("prepare") as due:
            if due:
                prepare_data(self._run, self._hooks, self._resolved)
        return self

    def select(self) -> Engine:
        """Check that the stack fits task, data and model, and plan its passes; the model is not loaded yet."""
        self.prepare()
        with self._step("select") as due:
            if not due:
                return self
            run, hooks = self._run, self._hooks
            run.model_config = load_model_config(self.config.model)
            run.tokenizer = hooks.build("build_tokenizer", run) or load_tokenizer(self.config.model)
            have, methods = capabilities(run), self._resolved.methods
            facts = {"config": self.config, "capabilities": have, "labels": run.labels, "model": run.model_config}
            facts["metrics"] = run.task.metric_names
            if problems := check_stack(methods, have) + hooks.collect("check_stack", StackView(methods, facts)):
                raise StackError(problems)
            run.steps_per_epoch, run.total_steps = estimate_steps(run, hooks)
            self._plan = make_plan(self.config, methods, run.total_steps, run.card["splits"])
            run.say(*self._plan.notes)
            self._plan.memory = estimate_memory(run, methods)
        return self

    def initialize(self) -> Engine:
        """Load model and tokenizer."""
        self.select()
        with self._step("initialize") as due:
            if due:
                build_model(self._run, self._hooks)
        return self

    def adapt(self) -> Engine:
        """Apply adapters, tokenise, fix the parameter sets, build optimizer and schedule, fold the seams."""
        self.initialize()
        with self._step("adapt") as due:
            if not due:
                return self
            run, hooks = self._run, self._hooks
            self._done.discard("initialize")  # should this fail, the next try starts from a fresh model
            adapt_model(run, hooks, features=self.plan().features, logits=self.plan().logits)
            self._features = make_features(run, hooks)
            self._lengths = {name: [f["length"] for f in features] for name, features in self._features.items()}
            self._effects = EffectLog(self._resolved.methods)
            self._ctx = compose(run, hooks, stack_views=self.plan().stack_views, report=self._effects.report)
            self._sampler = training_sampler(run, hooks, self._lengths["train"])
            run.steps_per_epoch, run.total_steps = estimate_steps(run, hooks, len(self._sampler(0)))
            build_optimizer(run, hooks)
            self._assembler = Assembler(run, self._features)
            names = ("validation", "test") if self.config.evaluate.test else ("validation",)
            held = {name: self._lengths[name] for name in names if name in self._lengths}
            self._evaluator = Evaluator(run, self._ctx, hooks, self._assembler, held)
            self._done.add("initialize")
        return self

    def train(self) -> dict[str, Any]:
        """Train (or go on with a stopped run), evaluate with the best weights, write the report.

        Returns:
            The summary, as in `summary.json`.

        Raises:
            Stopped: `cancel` asked for it; a checkpoint was written.
            HybridEngineError: what the user can mend; the run folder's summary says `failed`.
        """
        if self._stages:
            return train_stages(self.config, self._stages, self._engine, self._extra, self._listen)
        folder = RunFolder(self.folder)
        with self._step("claim"):
            finished = folder.claim(self.config)
        self.check_data()
        if finished is not None:
            finished["report"] = str(write_report(folder.path))  # a run killed just before it has none
            self._listen(Event("done", message=f"{self.folder} is finished already", values={"summary": finished}))
            return finished
        plan = self.plan()
        self._listen(Event("plan", 0, self._run.total_steps, plan.phases[0].passes, {"plan": plan}))
        self.adapt()  # what is wrong with model, data or methods is told before anything is written
        folder.open(self.config)
        self._run.folder = folder.path
        self._ran = kernels.used()  # by the plan and earlier runs of this process
        try:
            with self._step("train"):
                return self._train(folder)
        except Exception as error:
            told = str(error) if isinstance(error, HybridEngineError) else f"{type(error).__name__}: {error}"
            with suppress(OutputError):  # a full disk must not hide what happened
                self._conclude(folder, "stopped" if isinstance(error, Stopped) else "failed", told)
            raise
        finally:
            if "adapt" in self._done:
                self._hooks.notify("on_run_end", self._run)

    def evaluate(self) -> dict[str, Any]:
        """Metrics of the finished run's best model on the configured validation and test rows.

        With stages, on those of the last one; an override of `data` comes before what a stage says.
        """
        last = [self.config, *self._stages][-1]
        return Predictor(last.output, self._extra, evaluated_data(last, self._source)).evaluate()

    # ---- looking without training -----------------------------------------------------------------------------------

    def validate(self) -> list[str]:
        """Everything that can be found without training: config, stack, data, model, output. Writes nothing.

        The model is loaded and adapted, and every row is tokenised, as training would.

        Returns:
            Lines worth reading: the data card and notes.
        """
        if self._stages:
            return list(dict.fromkeys(line for stage in self._stages for line in self._engine(stage).validate()))
        with self._step("claim"):
            check_all(lambda: RunFolder(self.folder).claim(self.config), self.adapt)
        self.check_data()
        return [*card_lines(self._run.card), *self._run.notes]

    def check_data(self) -> None:
        """Read the rows; OutputError if they are not those of the run that `output` holds. Writes nothing."""
        self.prepare()
        RunFolder(self.folder).check_data(self._run.card)

    def plans(self) -> list[Plan]:
        """One plan for each stage, in order; without stages, the only one. Writes nothing."""
        return [self._engine(stage).plan() for stage in self._stages] or [self.plan()]

    def plan(self) -> Plan:
        """What would run: layers, passes per step, cost and memory; of the last stage, where there are several."""
        if self._stages:
            return self.plans()[-1]
        with self._step("check"):
            RunFolder(self.folder).check(self.config)
        self.select()
        assert self._plan is not None  # select() makes it
        return self._plan

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _train(self, folder: RunFolder) -> dict[str, Any]:
        run = self._run
        folder.write("plan.json", self.plan().to_dict())
        folder.write("data_card.json", run.card)
        checkpoints = Checkpoints(folder.checkpoints, self.config.train.keep)
        progress = resume(run, self._hooks, self._effects, folder, checkpoints)
        trainable = sum(p.numel() for p in run.may_optimise.values())
        total = sum(p.numel() for p in run.model.parameters())
        for note in run.notes:
            self._listen(Event("note", run.step, run.total_steps, note))
        message = f"{trainable:,} of {total:,} parameters are trained, {run.total_steps} steps"
        values = {"trainable": trainable, "total": total, "card": run.card}
        self._listen(Event("start", run.step, run.total_steps, message, values))
        tracker = open_tracker(self.config.log.to, folder.path, resolved(self.config), self._tell)
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

    def _tell(self, note: str) -> None:
        self._run.say(note)
        self._listen(Event("note", self._run.step, self._run.total_steps, note))

    def _engine(self, stage: Config) -> Engine:
        methods = copy.deepcopy(list(self._extra))
        return Engine(stage, methods=methods, progress=self._listen, cancel=self._cancel)

    def _finish(self, folder: RunFolder) -> dict[str, Any]:
        """Evaluate the best weights on validation and test, and write summary and report."""
        folder.predictions.unlink(missing_ok=True)
        if not folder.best.is_dir():  # resumed at its last step from another folder: no evaluation has saved it
            save_best(self._run, self._ctx, self._hooks, folder.best)
        load_best(self._run, folder.best)
        self._evaluator.stored_weights = True
        metrics = {s: self._evaluator.evaluate(s, record=folder.record) for s in self._evaluator.splits}
        summary = self._conclude(folder, "finished", "", metrics)
        self._listen(Event("done", self._run.step, self._run.total_steps, "finished", {"summary": summary}))
        return summary

    def _conclude(
        self, folder: RunFolder, status: str, error: str, metrics: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        progress = getattr(self, "_progress", Progress())
        effects = getattr(self, "_effects", None)
        ran = kernels.used(since=self._ran)
        summary = make_summary(self._run, folder.path, status, error, metrics or {}, progress, effects, ran)
        folder.write("summary.json", summary)
        if status == "finished":
            summary["report"] = str(write_report(folder.path))
        return summary

    @contextmanager
    def _step(self, name: str) -> Iterator[bool]:
        """Whether a step is still to be made; it is made once it succeeded. Errors are told with `file:line`."""
        try:
            yield name not in self._done
        except HybridEngineError as error:
            self._source.locate(error)
            raise
        self._done.add(name)
