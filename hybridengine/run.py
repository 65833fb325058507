"""Everything one run owns: configuration, data, model, optimizer, state of the methods, parameter sets."""

from __future__ import annotations

import copy
import fnmatch
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hybridengine.config import Config
from hybridengine.data.rows import Split, row_places, rows_of
from hybridengine.errors import ModelError
from hybridengine.seams.backbone import Backbone
from hybridengine.seams.first_position import FirstPosition
from hybridengine.seams.inner import InnerUpdate
from hybridengine.seams.precision import LossScale, Precision
from hybridengine.seams.randomness import KeyedRows
from hybridengine.seams.sites import Sites
from hybridengine.seams.soft_tokens import SoftTokens
from hybridengine.seams.task import Feature, Row

if TYPE_CHECKING:
    from hybridengine.plugin.calling import Hooks

__all__ = ["ParamGroup", "Run"]


class ParamGroup:
    """Parameters that share optimizer options; `options` override the optimizer's own (`lr`, `weight_decay`)."""

    def __init__(self, parameters: dict[str, nn.Parameter], **options: Any) -> None:
        self.parameters = parameters
        self.options = options

    def as_torch(self) -> dict[str, Any]:
        """The group as torch optimizers take it."""
        return {"params": list(self.parameters.values()), **self.options}

    def with_undecayed_vectors(self) -> list[dict[str, Any]]:
        """The group as torch takes it, tensors of fewer than two dimensions (biases, norm weights) apart, at decay 0.

        A group with a `weight_decay` of its own stays whole.
        """
        if "weight_decay" in self.options:
            return [self.as_torch()]
        matrices = {k: p for k, p in self.parameters.items() if p.dim() >= 2}
        others = {k: p for k, p in self.parameters.items() if p.dim() < 2}
        parts = [ParamGroup(matrices, **self.options), ParamGroup(others, **self.options, weight_decay=0.0)]
        return [part.as_torch() for part in parts if part.parameters]


class Run:
    """One training run. Hooks receive it; there are no globals.

    Attributes:
        config: the validated configuration.
        model: the model whose parameters are tuned; `forward_model` is the same, compiled when asked for.
        tokenizer: its tokenizer.
        probe: inputs of two rows, of the shape to come, with which a method may trace the adapted model.
        backbone: what lies below the head, where a method found it.
        task: the task object.
        splits: rows by split name.
        labels: label names in id order, where the task has labels.
        modules: extra modules by name (teachers, averages, learned rates, soft tokens), checkpointed.
        slots: the exclusive places that methods of the stack take, known from `build_model` on.
        cloze: the `hybridengine.text.Cloze` of a template, where one writes the rows.
        rewrites: how methods of data augmentation rewrite texts, by method, in order; known while rows are prepared.
        step: optimizer steps made; `total_steps` how many are planned.
        stop_reason: set it to stop training after this step, with the reason.
        notes: things worth telling the user, in order.
        dry: True on the toy run of the plan.
        predicting: True where a finished run is loaded to predict or evaluate: nothing is trained, and `on_run_start`
            sees no splits. A method prepares there only what it needs to predict.
        card: the data card; `model_config` the transformers configuration, known before the model is loaded.
        missing_parameters: names that the checkpoint lacked and that start from random values.
        greater_is_better: direction of the main metric.
    """

    def __init__(self, config: Config, device: torch.device, precision: Precision, scale: LossScale) -> None:
        self.config = config
        self.device = device
        self.precision = precision
        self.loss_scale = scale
        self.seed = config.train.seed
        self.clip: float | None = config.train.clip or None
        self.folder: Path | None = None
        self.model: Any = None
        self.forward_model: Any = None
        self.tokenizer: Any = None
        self.task: Any = None
        self.splits: dict[str, Split] = {}
        self.labels: list[str] = []
        self.cloze: Any = None
        self.rewrites: dict[str, Callable[..., Sequence[str]]] = {}
        self.sites: Sites | None = None
        self.probe: Mapping[str, Tensor] = {}
        self.first_position: FirstPosition | None = None
        self.backbone: Backbone | None = None
        self.lazy_head: nn.Module | None = None
        self.optimizer: Any = None
        self.scheduler: Any = None
        self.step = 0
        self.total_steps = 0
        self.steps_per_epoch = 1
        self.dry = False
        self.predicting = False
        self.notes: list[str] = []
        self.stop_reason: str | None = None
        self.card: dict[str, Any] = {}
        self.model_config: Any = None
        self.missing_parameters: list[str] = []
        self.greater_is_better = True
        self.modules: dict[str, nn.Module] = {}
        self.static_modules: set[str] = set()
        self.model_parts: set[str] = set()
        self.slots: frozenset[str] = frozenset()
        self.soft_tokens = SoftTokens()
        self.inner_patterns: Sequence[str] = ("*",)  # what inner loops adapt, in training and at test time
        self.inner_update: InnerUpdate | None = None  # how, where a method learned it; at test time too
        self.load_model: Callable[[str], nn.Module] = self._cannot_load
        self.finish_features: Callable[[list[Feature]], list[Feature]] = lambda features: features
        self.value: Callable[[str, Tensor], Tensor] = lambda name, parameter: parameter  # set by the context
        self.load_answers: Callable[[str], Callable[[Sequence[Row]], Tensor] | None] = lambda name: None
        self.memories: dict[str, dict[str, Any]] = {}
        self._made_up: list[Row] = []
        self._state: dict[str, dict[str, Any]] = {}
        self._optimised: dict[str, nn.Parameter] | None = None

    def attach(self, hooks: Hooks) -> None:
        """Know the stack: the slots it takes, and what it makes of features."""
        self.slots = hooks.slots
        self.finish_features = functools.partial(hooks.transform, "transform_features", self, expect=list)

    # ---- state of methods --------------------------------------------------------------------------------------

    def state(self, name: str) -> dict[str, Any]:
        """A method's own state: tensors and JSON values by name, saved and restored with checkpoints."""
        return self._state.setdefault(name, {})

    def memory(self, name: str) -> dict[str, Any]:
        """What a method learned before the first step and needs to predict: JSON values, kept in `best/`.

        Where a finished run is loaded they are there before `on_run_start`.
        """
        return self.memories.setdefault(name, {})

    @property
    def states(self) -> dict[str, dict[str, Any]]:
        """All methods' states."""
        return self._state

    def module(self, name: str) -> nn.Module:
        """An extra module by name."""
        return self.modules[name]

    def add_module(
        self, name: str, module: nn.Module, *, static: bool = False, part_of_model: bool = False
    ) -> nn.Module:
        """Own an extra module: moved to the device, checkpointed, optimised where it requires gradients.

        Args:
            static: never changes (a teacher) and is rebuilt by its method; left out of checkpoints.
            part_of_model: the model computes with it (soft prompts), so that inner loops adapt and perturbations of
                weights move it like the model's own parameters; read it by `evaluated`, where views reach it.
        """
        if name in self.modules:
            raise ValueError(f"run module {name!r} exists already")
        if static:
            self.static_modules.add(name)
        if part_of_model:
            self.model_parts.add(name)
        self.modules[name] = module.to(self.device)
        return self.modules[name]

    def add_soft_tokens(self, name: str, module: nn.Module, count: int) -> list[int]:
        """Own a module that returns `count` vectors `[count, D]`, a part of the model; the ids that features hold."""
        self.add_module(name, module, part_of_model=True)
        ids = self.soft_tokens.add(name, count)
        if self.sites is not None:
            self.sites.soft_prompt = lambda: self.soft_tokens.vectors(self.evaluated)
        return ids

    def evaluated(self, name: str) -> Tensor:
        """What a run module returns without arguments, its parameters those of the view being evaluated."""
        module = self.modules[name]
        parameters = {key: self.value(f"{name}/{key}", p) for key, p in module.named_parameters()}
        result: Tensor = functional_call(module, parameters, ())
        return result

    def copy_of_model(self) -> nn.Module:
        """A frozen copy of the model in evaluation mode (a teacher, an average)."""
        twin: nn.Module = copy.deepcopy(self.model)
        return twin.eval().requires_grad_(False)

    def places(self, rows: Sequence[int]) -> list[str]:
        """`file:row` of rows by their global ids, for messages."""
        return row_places(self.splits, rows)

    def rows_of(self, ids: Sequence[int]) -> list[Row]:
        """The rows that have these global ids (`batch.rows`).

        Raises:
            KeyError: there is no such row.
        """
        if not self._made_up:
            return rows_of(self.splits, ids)
        return [self._made_up[-1 - i] if i < 0 else rows_of(self.splits, [i])[0] for i in ids]

    def make_up(self, rows: Sequence[Row]) -> tuple[int, ...]:
        """Global ids for rows that stand in no split, e.g. texts without content."""
        self._made_up += rows
        return tuple(range(-1 - len(self._made_up) + len(rows), -1 - len(self._made_up), -1))

    def say(self, *notes: str) -> None:
        """Tell the user something, each once."""
        self.notes += [note for note in dict.fromkeys(notes) if note not in self.notes]

    def random(self, stream: str, rows: Sequence[int]) -> KeyedRows:
        """Random numbers keyed by (seed, stream, step, row), as `ctx.rng`."""
        return KeyedRows((self.seed, stream, self.step), rows)

    # ---- parameter sets ----------------------------------------------------------------------------------------

    def freeze_parameter_sets(self) -> None:
        """Fix which parameters may ever be optimised; called once, after the model is built."""
        named = dict(self.model.named_parameters())
        for module_name, module in self.modules.items():
            named.update({f"{module_name}/{k}": p for k, p in module.named_parameters()})
        self._optimised = {k: p for k, p in named.items() if p.requires_grad}
        if not self._optimised:
            raise ModelError("no parameter is trainable; remove `freeze` or add a method such as lora")

    @property
    def may_optimise(self) -> dict[str, nn.Parameter]:
        """Every parameter of the optimised set, also those that a schedule has frozen for now."""
        if self._optimised is None:
            raise RuntimeError("parameter sets are not fixed yet")
        return self._optimised

    def optimised(self) -> dict[str, nn.Parameter]:
        """Parameters that are optimised at this step, `module/name` for run modules."""
        return {k: p for k, p in self.may_optimise.items() if p.requires_grad}

    def adapted(self) -> dict[str, nn.Parameter]:
        """Parameters that inner loops adapt: the model's own and its parts, that match `inner_patterns`."""
        patterns, mine = self.inner_patterns, self.perturbed()
        return {k: p for k, p in mine.items() if any(fnmatch.fnmatchcase(k, pattern) for pattern in patterns)}

    def perturbed(self) -> dict[str, nn.Parameter]:
        """Parameters that weight perturbations move: the model's own and its parts."""
        return {k: p for k, p in self.optimised().items() if "/" not in k or k.partition("/")[0] in self.model_parts}

    def _cannot_load(self, name: str) -> nn.Module:
        raise ModelError(f"this run cannot load a second model ({name})")
