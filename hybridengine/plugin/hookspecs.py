"""Every hook, its type and its calling convention. The prefix is the convention:

- `build_*`: first non-None result wins.
- `transform_*`: the last argument is threaded through; None means unchanged.
- `wrap_*`: the function is itself the layer, folded around `inner`; it may call `inner` 0..K times.
- `on_*`: observes; a returned value is an error.
- `check_*`: every result is collected.

A run, with the hooks where they act:

    build_task -> build_data -> transform_data -> build_tokenizer -> build_model -> transform_model
    -> on_run_start -> build_features -> transform_features -> build_sampler
    -> transform_param_groups -> build_optimizer -> build_scheduler
    for each step:     transform_batch
                       wrap_step( wrap_gradient( wrap_backward( wrap_loss( leaf; transform_outputs ))))
                       on_step_end
      every N steps:   wrap_evaluation: wrap_predict, transform_metrics; on_evaluate; on_save
    on_run_end
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hybridengine.data.rows import Split
    from hybridengine.plugin.stacking import StackView
    from hybridengine.run import ParamGroup, Run
    from hybridengine.seams import Batch, Context, Draw, Feature, Out, Prediction, Row, Task, View, Work

__all__ = ["HookSpecs", "hook", "spec"]

PROJECT = "hybridengine"
spec = pluggy.HookspecMarker(PROJECT)
hook = pluggy.HookimplMarker(PROJECT)


class HookSpecs:
    """The hook points, grouped as the user knows them."""

    # ==== data ==================================================================================================

    @spec
    def build_data(self, run: Run) -> dict[str, Split] | None:
        """Read the rows of every split.

        Called once, before the model is loaded. First result wins; the plugin named by `data.use` is asked.

        Example:
            @hook
            def build_data(self, run):
                return {"train": Split("train", [{"text": "good", "label": "pos"}])}
        """

    @spec
    def transform_data(self, run: Run, splits: dict[str, Split]) -> dict[str, Split] | None:
        """Change the rows, e.g. augment the training split (never validation or test).

        Called once, after roles are named and splits carved.

        Example:
            @hook
            def transform_data(self, run, splits):
                rows = [{**row, "text": row["text"].lower()} for row in splits["train"].rows]
                return {**splits, "train": Split("train", rows)}
        """

    @spec
    def build_features(self, run: Run, rows: Sequence[Row]) -> list[Feature] | None:
        """Tokenise rows in place of the task, e.g. into a prompt. First result wins.

        Called once per split, after the model is built; each feature holds `input_ids` and masks as lists.

        Example:
            @hook
            def build_features(self, run, rows):
                return run.task.features(run, [{**row, "text": "Review: " + row["text"]} for row in rows])
        """

    @spec
    def transform_features(self, run: Run, features: list[Feature]) -> list[Feature] | None:
        """Change tokenised rows, e.g. insert soft tokens (`text.insert_tokens`).

        Called once per split after `build_features`, and for the rows to predict.

        Example:
            @hook
            def transform_features(self, run, features):
                return [insert_tokens(feature, 0, run.soft_tokens.ids("mine")) for feature in features]
        """

    @spec
    def build_sampler(self, run: Run, split: str) -> Callable[[int], list[Draw]] | None:
        """How a split is cut into micro-batches: a function from epoch to draws. First result wins.

        Called once per split. Without one, rows are length-bucketed; evaluation goes in order.

        Example:
            @hook
            def build_sampler(self, run, split):
                return lambda epoch: [Draw((i,), epoch=epoch) for i in range(len(run.splits[split]))]
        """

    @spec
    def transform_batch(self, run: Run, batch: Batch) -> Batch | None:
        """Change a training micro-batch before it becomes work.

        Called for every micro-batch of training, on the run's device. Draw randomness from `run.random`.

        Example:
            @hook
            def transform_batch(self, run, batch):
                return replace(batch, inputs={**batch.inputs, "token_type_ids": None})
        """

    # ==== model init ============================================================================================

    @spec
    def build_task(self, run: Run) -> Task | None:
        """The task: features, batches, leaf loss, metrics. First result wins; the plugin named by `task` is asked.

        Example:
            @hook
            def build_task(self, run):
                return self
        """

    @spec
    def build_tokenizer(self, run: Run) -> Any | None:
        """A tokenizer in place of the model's own. First result wins. Called before the model is loaded.

        Example:
            @hook
            def build_tokenizer(self, run):
                return AutoTokenizer.from_pretrained(self.path)
        """

    @spec
    def build_model(self, run: Run) -> nn.Module | None:
        """A model in place of the task's own class, e.g. a masked LM for prompts. First result wins.

        Example:
            @hook
            def build_model(self, run):
                return AutoModelForMaskedLM.from_pretrained(run.config.model.name)
        """

    # ==== adapter ===============================================================================================

    @spec
    def transform_model(self, run: Run, model: nn.Module) -> nn.Module | None:
        """Wrap, extend or freeze the model. Called once, before the parameter sets are fixed.

        Example:
            @hook
            def transform_model(self, run, model):
                return get_peft_model(model, LoraConfig(r=self.r))
        """

    @spec
    def transform_param_groups(self, run: Run, groups: list[ParamGroup]) -> list[ParamGroup] | None:
        """Split or change the optimizer's parameter groups. Called once, before `build_optimizer`.

        Example:
            @hook
            def transform_param_groups(self, run, groups):
                for group in groups:
                    group.options["weight_decay"] = 0.0
        """

    # ==== loss ==================================================================================================

    @spec
    def wrap_loss(self, inner: Callable[..., Out], ctx: Context, batch: Batch, view: View) -> Out:
        """The loss of one batch under one view: pure, sums with units, nothing added to `.grad`.

        Example:
            @hook
            def wrap_loss(self, inner, ctx, batch, view):
                out = inner(ctx, batch, view)
                return replace(out, terms={**out.terms, "norm": (self.c * out.scores.square().sum(), "rows")})
        """

    @spec
    def transform_outputs(self, ctx: Context, batch: Batch, outputs: Any) -> Any | None:
        """Change what the model returns, e.g. vocabulary logits at the mask into class logits.

        Called after every forward of the run's model; `outputs.logits` is what losses and metrics see.

        Example:
            @hook
            def transform_outputs(self, ctx, batch, outputs):
                outputs.logits = outputs.logits / self.temperature
                return outputs
        """

    # ==== perturbation ==========================================================================================

    @spec
    def wrap_backward(
        self, inner: Callable[..., Mapping[str, Tensor]], ctx: Context, work: Work
    ) -> Mapping[str, Tensor]:
        """Add the weighted gradient of one work to `.grad`: attacks on inputs, episodes.

        Example:
            @hook
            def wrap_backward(self, inner, ctx, work):
                noise = {k: self.sigma * torch.randn_like(z) for k, z in ctx.zeros(work.batch).items()}
                return inner(ctx, work.at(work.view.plus(noise)))
        """

    @spec
    def wrap_gradient(
        self, inner: Callable[..., Mapping[str, Tensor]], ctx: Context, works: Sequence[Work]
    ) -> Mapping[str, Tensor]:
        """Complete `.grad` for the step, over all micro-batches: perturbations of weights, gradient surgery.

        Example:
            @hook
            def wrap_gradient(self, inner, ctx, works):
                terms = inner(ctx, works)
                ctx.add_grads({k: self.c * p for k, p in ctx.run.optimised().items()})
                return terms
        """

    # ==== optimizer step ========================================================================================

    @spec
    def build_optimizer(self, run: Run, groups: list[ParamGroup]) -> Any | None:
        """The optimizer. First result wins.

        Example:
            @hook
            def build_optimizer(self, run, groups):
                return torch.optim.SGD([g.as_torch() for g in groups], lr=run.config.train.lr)
        """

    @spec
    def build_scheduler(self, run: Run, optimizer: Any) -> Any | None:
        """The learning-rate schedule, stepped once per optimizer step. First result wins.

        Example:
            @hook
            def build_scheduler(self, run, optimizer):
                return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        """

    @spec
    def wrap_step(
        self, inner: Callable[..., Mapping[str, Tensor]], ctx: Context, works: Sequence[Work]
    ) -> Mapping[str, Tensor]:
        """One optimizer step: afterwards the parameters have moved. Averages, replays, changing trainable sets.

        Example:
            @hook
            def wrap_step(self, inner, ctx, works):
                terms = inner(ctx, works)
                self.average.update(ctx.run.optimised())
                return terms
        """

    # ==== around them ===========================================================================================

    @spec
    def check_stack(self, stack: StackView) -> list[str] | None:
        """Problems of the whole stack that traits cannot express; each with reason and way out.

        Called by `validate`, `plan` and `train`, before the model is loaded.

        Example:
            @hook
            def check_stack(self, stack):
                return ["mine: needs sgd; name it in methods"] if "adamw" in stack.names else []
        """

    @spec
    def wrap_predict(self, inner: Callable[..., Prediction], ctx: Context, batch: Batch, view: View) -> Prediction:
        """Evaluate one batch: calibration, ensembles, test-time adaptation.

        Example:
            @hook
            def wrap_predict(self, inner, ctx, batch, view):
                prediction = inner(ctx, batch, view)
                return replace(prediction, scores=prediction.scores.sqrt())
        """

    @spec
    def wrap_evaluation(self, ctx: Context) -> AbstractContextManager[Any]:
        """A context around each evaluation, `best/` and prediction, e.g. averaged weights swapped in.

        Example:
            @hook
            def wrap_evaluation(self, ctx):
                return ctx.swapped(ctx.run.state("ema"))
        """

    @spec
    def transform_metrics(self, run: Run, metrics: dict[str, Any]) -> dict[str, Any] | None:
        """Add to or change the computed metrics of an evaluation.

        Example:
            @hook
            def transform_metrics(self, run, metrics):
                return {**metrics, "error": 1 - metrics["accuracy"]}
        """

    @spec
    def on_run_start(self, run: Run) -> None:
        """The model is built and adapted, parameter sets are not yet fixed.

        Add run modules (teachers, learned rates) here. Also called on the plan's toy run (`run.dry`), and where a
        finished run is loaded (`run.predicting`): then there are no splits, and only what predicts is needed.

        Example:
            @hook
            def on_run_start(self, run):
                run.add_module("teacher", run.copy_of_model())
        """

    @spec
    def on_step_end(self, run: Run, metrics: Mapping[str, float]) -> None:
        """An optimizer step is done.

        Example:
            @hook
            def on_step_end(self, run, metrics):
                self.losses.append(metrics["loss"])
        """

    @spec
    def on_evaluate(self, run: Run, metrics: Mapping[str, Any]) -> None:
        """The validation split was evaluated. To stop training, set `run.stop_reason`.

        Example:
            @hook
            def on_evaluate(self, run, metrics):
                if metrics["accuracy"] > 0.99:
                    run.stop_reason = "good enough"
        """

    @spec
    def on_save(self, run: Run, folder: Path) -> None:
        """A checkpoint is staged in `folder`; further files written there are covered by its manifest.

        Example:
            @hook
            def on_save(self, run, folder):
                (folder / "mine.json").write_text(json.dumps(self.table))
        """

    @spec
    def on_load(self, run: Run, folder: Path) -> None:
        """A checkpoint was restored from `folder`.

        Example:
            @hook
            def on_load(self, run, folder):
                self.table = json.loads((folder / "mine.json").read_text())
        """

    @spec
    def on_run_end(self, run: Run) -> None:
        """Training is over, also after an error or a stop.

        Example:
            @hook
            def on_run_end(self, run):
                self.file.close()
        """
