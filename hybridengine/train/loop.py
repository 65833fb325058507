"""The training loop: take works, step, observe; now and then evaluate and save; stop when asked."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from hybridengine.batches import Assembler, Sampler
from hybridengine.errors import Stopped
from hybridengine.evaluate.evaluator import Evaluator, better
from hybridengine.folder import RunFolder
from hybridengine.plugin.calling import Hooks
from hybridengine.run import Run
from hybridengine.seams.base import make_works
from hybridengine.seams.context import Context
from hybridengine.seams.types import Batch, Draw
from hybridengine.stack.effects import EffectLog
from hybridengine.train.best import save_best
from hybridengine.train.checkpoint import Checkpoints, Progress
from hybridengine.train.progress import Event, Listener
from hybridengine.train.trackers import Tracker

__all__ = ["Loop"]


@dataclass
class Loop:
    """Everything one training needs, in the order in which it is used."""

    run: Run
    ctx: Context
    hooks: Hooks
    effects: EffectLog
    sampler: Sampler
    assembler: Assembler
    evaluator: Evaluator
    checkpoints: Checkpoints
    folder: RunFolder
    listen: Listener
    cancelled: Callable[[], bool]
    tracker: Tracker
    progress: Progress

    def train(self) -> None:
        """Make the remaining steps.

        Raises:
            Stopped: the listener asked to cancel; a checkpoint of the present step is written first.
        """
        run, ctx = self.run, self.ctx
        ctx.trace.recording = False
        run.model.train()
        self._clock = time.perf_counter()
        for batches in self._batches():
            works = make_works(run.seed, run.step, batches)
            self._lr = run.optimizer.param_groups[-1]["lr"]
            terms = ctx.step(ctx, works)
            self.effects.step_end(run.step)
            run.step += 1
            self._account(batches, terms)
            last = run.step >= run.total_steps or run.stop_reason is not None
            if last or self._due(run.config.train.evaluate_every):
                with self._clock_stopped():
                    self._evaluate()
                last = last or run.stop_reason is not None
            cancelled = self.cancelled()
            if last or cancelled or self._due(run.config.train.save_every):
                with self._clock_stopped():
                    self._save()
            if last:
                break
            if cancelled:
                raise Stopped(f"stopped at step {run.step} of {run.total_steps}; run the same command to go on")
        self.effects.flush()

    # ---- batches -----------------------------------------------------------------------------------------------

    def _batches(self) -> Iterator[list[Batch]]:
        """Micro-batches of each remaining step, assembled ahead by `workers` threads."""
        run = self.run
        workers = run.config.train.workers
        if workers == 0:
            for step, draws in self._draws():
                yield [self._ready(draw, step) for draw in draws]
            return
        with ThreadPoolExecutor(workers) as pool:
            ahead: list[tuple[int, list[Future[Batch]]]] = []
            for step, draws in self._draws():
                ahead.append((step, [pool.submit(self.assembler.batch, "train", d, step) for d in draws]))
                if len(ahead) > 2 * workers:
                    yield [self._finish(future.result()) for future in ahead.pop(0)[1]]
            for _, futures in ahead:
                yield [self._finish(future.result()) for future in futures]

    def _draws(self) -> Iterator[tuple[int, Sequence[Draw]]]:
        run = self.run
        accumulate = run.config.train.accumulate
        step = run.step
        while step < run.total_steps and run.stop_reason is None:  # a resumed run may have stopped early before
            epoch, first = divmod(step, run.steps_per_epoch)
            draws = self.sampler(epoch)
            for start in range(first * accumulate, len(draws), accumulate):
                if step >= run.total_steps:
                    return
                yield step, draws[start : start + accumulate]
                step += 1

    def _ready(self, draw: Draw, step: int) -> Batch:
        return self._finish(self.assembler.batch("train", draw, step))

    def _finish(self, batch: Batch) -> Batch:
        moved = batch.to(self.run.device)
        changed: Batch = moved if self._transform is None else self._transform(self.run, moved)
        return changed

    # ---- after a step ------------------------------------------------------------------------------------------

    def _due(self, every: int | None) -> bool:
        return self.run.step % (every or self.run.steps_per_epoch) == 0

    def _account(self, batches: Sequence[Batch], terms: Any) -> None:
        """Note a step. Its time includes assembling the batches and logging, but neither evaluating nor saving."""
        run, progress = self.run, self.progress
        now = time.perf_counter()
        progress.seconds, self._clock = progress.seconds + now - self._clock, now
        progress.samples += sum(batch.size for batch in batches)
        logged = run.step % run.config.log.every == 0 or run.step == run.total_steps
        if not logged and not self._observed:
            self._notify_step(None)
            return
        values = {name: float(value) for name, value in terms.items()}
        norm = values.pop("gradient_norm", math.nan)
        if self._observed:
            summary = {**values, "loss": sum(values.values()), "gradient_norm": norm}
            self.hooks.notify("on_step_end", run, summary)
        if logged:
            self._log(values, norm)
        else:
            self._notify_step(None)

    def _log(self, values: dict[str, float], norm: float) -> None:
        run, progress = self.run, self.progress
        line = {
            "kind": "train",
            "step": run.step,
            "epoch": round(run.step / run.steps_per_epoch, 4),
            "loss": sum(values.values()),
            "terms": values,
            "gradient_norm": norm,
            "lr": self._lr,
            "samples_per_second": round(progress.samples / max(progress.seconds, 1e-9), 2),
            "seconds": round(progress.seconds, 3),
        }
        self.effects.flush()
        line["effects"] = {m: {e: v["last"] for e, v in es.items()} for m, es in self.effects.summary().items() if es}
        self.folder.append(line)
        self.tracker.log(line)
        self._notify_step(line)

    def _notify_step(self, line: dict[str, Any] | None) -> None:
        run, progress = self.run, self.progress
        done = max(run.step - self._first_step, 1)
        eta = (time.perf_counter() - self._started) / done * (run.total_steps - run.step)
        values: dict[str, Any] = {"eta": eta, "samples_per_second": progress.samples / max(progress.seconds, 1e-9)}
        if line is not None:
            values.update(loss=line["loss"], lr=line["lr"], line=line)
        self.listen(Event("step", run.step, run.total_steps, "", values))

    def __post_init__(self) -> None:
        self._transform = self.hooks.chain("transform_batch", Batch)
        self._observed = bool(self.hooks.implementations("on_step_end"))
        self._lr = 0.0
        self._started = self._clock = time.perf_counter()
        self._first_step = self.run.step

    @contextlib.contextmanager
    def _clock_stopped(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._clock += time.perf_counter() - started

    # ---- evaluating and saving ---------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        run = self.run
        if "validation" not in run.splits:
            if run.step >= run.total_steps or run.stop_reason is not None:
                save_best(run, self.ctx, self.hooks, self.folder.best)
            return
        self.effects.flush()
        metrics = self.evaluator.evaluate("validation", interval=False)
        main = metrics["main"]
        value = math.nan if metrics[main] is None else float(metrics[main])
        improved = better(value, self.progress.best_value, run.greater_is_better)
        if improved or not self.progress.best_step:  # an undefined value is better than nothing, and never than a value
            self.progress.best_value, self.progress.best_step = value if improved else None, run.step
            save_best(run, self.ctx, self.hooks, self.folder.best)
        scalars = {k: v for k, v in metrics.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        line = {"kind": "validation", "step": run.step, "metrics": scalars}
        self.folder.append(line)
        self.tracker.log(line)
        self.hooks.notify("on_evaluate", run, metrics)
        best = " (best so far)" if improved else ""
        told = f"{value:.4f}" if math.isfinite(value) else "is undefined"
        message = f"validation {main} {told}{best}"
        self.listen(Event("evaluate", run.step, run.total_steps, message, {"metrics": scalars, "improved": improved}))

    def _save(self) -> None:
        path = self.checkpoints.save(self.run, self.hooks, self.effects, self.progress)
        message = f"checkpoint {path.name}"
        self.listen(Event("save", self.run.step, self.run.total_steps, message, {"path": str(path)}))
