"""Build a run's parts in order: device and precision, model, adapters, features, optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hybridengine import kernels
from hybridengine.config import Config, ModelConfig
from hybridengine.data.card import add_token_lengths, describe_split
from hybridengine.data.prepare import prepare_splits
from hybridengine.data.rows import TARGET_ROLES
from hybridengine.errors import ConfigError, DataError, HybridEngineError, ModelError, StackError
from hybridengine.evaluate.metrics import check_metric, greater_is_better
from hybridengine.model.capabilities import capabilities_of
from hybridengine.model.loading import choose_device, load_model, load_model_config
from hybridengine.plugin.calling import Hooks
from hybridengine.run import ParamGroup, Run
from hybridengine.seams.first_position import FirstPosition
from hybridengine.seams.precision import choose_precision
from hybridengine.seams.sites import Sites
from hybridengine.seams.task import Feature, Row
from hybridengine.stack.resolve import Resolved
from hybridengine.stack.rules import NEEDS

__all__ = [
    "adapt_model",
    "build_model",
    "build_optimizer",
    "capabilities",
    "features_of",
    "initial_run",
    "make_features",
    "prepare_data",
]


def initial_run(config: Config) -> Run:
    """A run with device and precision chosen, and nothing loaded."""
    device = choose_device(config.train.device)
    precision, scale = choose_precision(config.train.precision, device)
    run = Run(config, device, precision, scale)
    if config.train.precision == "auto":
        run.say(f"precision {precision.name}: {precision.reason}")
    elif precision.name == "fp16" and device.type == "cpu":
        run.say("precision fp16: CPUs have no fast fp16 arithmetic, so this is many times slower than fp32 or auto")
    return run


def prepare_data(run: Run, hooks: Hooks, resolved: Resolved) -> None:
    """Build the task; read, check and split the rows of `run.config`; let the task learn its labels from them."""
    data = run.config.data
    run.task = hooks.build("build_task", run, only=resolved.task.name)
    raw = hooks.build("build_data", run, only=resolved.data.name)
    if not raw:
        raise DataError(f"data plugin {resolved.data.name!r} gave no splits; check the `data` section")
    episodic = any("episodes" in m.provides for m in resolved.methods)
    run.splits, run.card = prepare_splits(data, run.task, raw, episodic=episodic)
    run.task.prepare(run, run.splits["train"].rows)
    wanted = run.config.evaluate.metric or run.task.metric
    main = check_metric(wanted, run.task.metric_names, resolved.task.name)
    run.greater_is_better = run.task.greater_is_better if main == run.task.metric else greater_is_better(main)
    run.splits = hooks.transform("transform_data", run, run.splits, expect=dict)
    run.rewrites.clear()  # and with them what they hold
    inputs = [role for role in run.task.columns if role not in TARGET_ROLES]
    made = {name: split for name, split in run.splits.items() if name not in run.card["splits"]}
    run.card["splits"].update({name: describe_split(split, inputs) for name, split in made.items()})


def capabilities(run: Run) -> set[str]:
    """What configuration, task, data and model provide to methods, before the model is loaded."""
    have = capabilities_of(run.model_config)
    if run.labels:
        have.add("labels")
    if "text" in run.task.columns:
        have.add("text")
    if "unlabelled" in run.splits:
        have.add("unlabelled")
    if not run.config.train.checkpointing:
        have.add("functional")
    return have


def build_model(run: Run, hooks: Hooks) -> None:
    """Load the model through `build_model`, or by the task's own class."""
    run.attach(hooks)
    model: Any = hooks.build("build_model", run, expect=nn.Module)
    if model is None:
        options = run.task.model_options(run)
        model, missing = load_model(run.task.auto_class, run.config.model, options, seed=run.seed)
        run.missing_parameters = missing
        _refuse_foreign_weights(run, model, missing)
        if missing:
            run.say(f"{run.config.model.name} has no weights for {', '.join(missing)}; they start from random values")
    model = run.task.configure(run, model)
    if run.config.train.checkpointing:
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise ConfigError(f"train.checkpointing: {type(model).__name__} does not support it; set it to false")
        # transformers renamed it; both default to the non-reentrant kind, which `ctx.grad` needs.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    run.model = model
    run.modules.clear()  # of an adaptation that failed
    run.static_modules.clear()
    run.model_parts.clear()
    run.soft_tokens.clear()
    run.load_model = lambda name: _second_model(run, name)


def _refuse_foreign_weights(run: Run, model: nn.Module, missing: list[str]) -> None:
    """A new head starts from random values; a model of which most does was not loaded at all."""
    names = [name for name, _ in model.named_parameters()]
    if len(missing) > len(names) / 2:
        raise ModelError(
            f"{run.config.model.name}: {len(missing)} of the model's {len(names)} parameters, such as {missing[0]}, are"
            " not in its weights or have another shape; config.json and the weights belong to different models"
        )


def _second_model(run: Run, name: str) -> nn.Module:
    """A teacher: a model folder, or the `best/` of a run folder, for the same task."""
    best = Path(name) / "best"
    source = ModelConfig(name=str(best) if best.is_dir() else name)
    names = list((load_model_config(source, key="teacher").id2label or {}).values())
    if run.labels and names != run.labels:
        raise ModelError(
            f"{name} cannot teach: its labels are {names[:8]}, this run's are {run.labels[:8]}, in order; give a model"
            " that was trained with these labels"
        )
    options = run.task.model_options(run)
    teacher, missing = load_model(run.task.auto_class, source, options, seed=run.seed, key="teacher")
    if missing:
        raise ModelError(
            f"{name} cannot teach: it has no weights for {', '.join(missing[:3])}; give a model that was trained on"
            " this task with these labels"
        )
    configured: nn.Module = run.task.configure(run, teacher)
    return configured.to(run.device)


def adapt_model(run: Run, hooks: Hooks, *, features: bool, logits: bool) -> None:
    """Apply adapters, find the embedding sites, compile, add run modules, fix the parameter sets.

    Args:
        features: a method of the stack reads hidden states, so that every layer must be computed in full.
        logits: a method of the stack reads logits, so that a language model's must be computed in full.
    """
    run.model = hooks.transform("transform_model", run, run.model, expect=nn.Module).to(run.device)
    run.probe = _probe_batch(run)
    try:
        run.sites = Sites(run.model, run.probe)
    except HybridEngineError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise ModelError(
            f"{run.config.model.name}: a forward pass over two training rows fails ({type(error).__name__}: {first});"
            f" task {run.config.task_entry[0]!r} and this model or its tokenizer do not fit"
        ) from error
    if run.config.train.checkpointing:
        _refuse_checkpointed_sites(run)
    hooks.notify("on_run_start", run)
    run.freeze_parameter_sets()
    _check_capabilities(run, hooks)
    train = run.config.train
    if not (features or train.compile or train.checkpointing):
        run.first_position = FirstPosition.find(run.model, run.probe)
        if run.first_position is not None:
            run.say("the model reads its last layer at the first position only; training computes it only there")
    if not (logits or train.compile):
        head = run.model.get_output_embeddings() if hasattr(run.model, "get_output_embeddings") else None
        run.lazy_head = head if kernels.why_not_patched(head) is None else None
    run.forward_model = torch.compile(run.model) if train.compile else run.model


def _probe_batch(run: Run) -> dict[str, Any]:
    """Inputs of the shape to come, on which the embedding sites are found."""
    features = run.task.features(run, list(run.splits["train"].rows[:2]))
    _check_vocabulary(run, {"train": features})
    batch = run.task.collate(run, features, run.splits["train"].ids(range(len(features))), run.random)
    return dict(batch.to(run.device).inputs)


def _refuse_checkpointed_sites(run: Run) -> None:
    modules = dict(run.model.named_modules())
    for site in run.sites.table if run.sites else ():
        parts = site.partition("#")[0].split(".")
        for depth in range(1, len(parts)):
            parent = modules[".".join(parts[:depth])]
            if type(parent).__mro__[1].__name__ == "GradientCheckpointingLayer":
                raise ConfigError(
                    f"train.checkpointing: the embedding {site} lies inside a checkpointed layer, where a delta would"
                    " be lost in the recomputation; set `train.checkpointing: false`"
                )


def _check_capabilities(run: Run, hooks: Hooks) -> None:
    """What only the loaded model can tell: whether it really has dropout and embedding sites.

    Dropout that a method brings need not be a module: Llama's rates are numbers, and whole layers may be dropped.
    """
    have = capabilities_of(None, run.model).union(*(method.provides for method in hooks.methods))
    if not run.sites or not run.sites.table:
        have.discard("embeddings")
    problems = []
    for method in hooks.methods:
        for need in {"dropout", "embeddings"} & set(method.traits.requires):
            if need not in have:
                problems.append(f"{method.name!r} needs {need!r}: {NEEDS[need]}")
    if problems:
        raise StackError(problems)


def features_of(run: Run, hooks: Hooks, rows: Sequence[Row]) -> list[Feature]:
    """Tokenise rows, by `build_features` or the task, and let methods change the features."""
    made = hooks.build("build_features", run, rows)
    features: list[Feature] = run.task.features(run, rows) if made is None else made
    return run.finish_features(features)


def make_features(run: Run, hooks: Hooks) -> dict[str, list[Feature]]:
    """Tokenise every split, and add token lengths to the data card."""
    features: dict[str, list[Feature]] = {}
    for name, split in run.splits.items():
        features[name] = features_of(run, hooks, split.rows)
    _check_vocabulary(run, features)
    lengths = {name: [f["length"] for f in made] for name, made in features.items()}
    cut = {name: [bool(f.get("truncated")) for f in made] for name, made in features.items()}
    add_token_lengths(run.card, lengths, cut, run.config.train.max_length)
    return features


def _check_vocabulary(run: Run, features: dict[str, list[Feature]]) -> None:
    """A tokenizer of another model makes ids that this model has no embedding for."""
    try:
        known = run.model.get_input_embeddings().num_embeddings
    except (AttributeError, NotImplementedError):
        return
    for name, made in features.items():
        for index, feature in enumerate(made):
            highest = max(feature["input_ids"], default=0)
            if highest >= known:
                raise ModelError(
                    f"{run.splits[name].where(index)}: token id {highest}, but {run.config.model.name} has {known}"
                    " token embeddings; set model.tokenizer to the tokenizer that belongs to the model"
                )


def build_optimizer(run: Run, hooks: Hooks) -> None:
    """Parameter groups, optimizer and schedule, through their hooks."""
    groups = hooks.transform("transform_param_groups", run, [ParamGroup(dict(run.may_optimise))], expect=list)
    grouped = [name for group in groups for name in group.parameters]
    if sorted(grouped) != sorted(run.may_optimise):
        raise StackError(
            "the parameter groups do not hold every optimised parameter exactly once; check the methods"
            " that implement transform_param_groups"
        )
    run.optimizer = hooks.build("build_optimizer", run, groups, expect=torch.optim.Optimizer)
    if run.optimizer is None:
        raise StackError("no method builds an optimizer; name one, e.g. adamw")
    run.scheduler = hooks.build("build_scheduler", run, run.optimizer, expect=torch.optim.lr_scheduler.LRScheduler)
