"""The five values that travel through the seams: Batch, View, Work, Out, Prediction.

Shape suffixes used in the project: B rows, L tokens, D embedding width, C classes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hybridengine.seams.randomness import mix

__all__ = [
    "Batch",
    "Draw",
    "Out",
    "Prediction",
    "Term",
    "View",
    "Work",
    "add_terms",
    "weight_of",
    "weighted",
    "weighted_sum",
]

Term = tuple[Tensor, str]
"""A loss term: the *sum* over its units, and the name of the unit (`rows`, `tokens`, `episodes`, ...)."""


@dataclass(frozen=True, eq=False)
class View:
    """*How* to evaluate the model: passed down, never global.

    Attributes:
        params: functional parameters by name (`module/name` for run modules); None means the model's own.
        delta: tensors `[B, L, D]` by embedding site, added to that site's output in one forward.
        key: pins dropout. Equal keys draw equal masks; None draws from the global stream.
    """

    params: Mapping[str, Tensor] | None = None
    delta: Mapping[str, Tensor] = field(default_factory=dict)
    key: int | None = None

    def plus(self, delta: Mapping[str, Tensor]) -> View:
        """Add `delta` to whatever is already added at each site."""
        own = self.delta
        return replace(self, delta={**own, **{s: own[s] + d if s in own else d for s, d in delta.items()}})

    def clean(self) -> View:
        """Drop the delta: it belongs to the rows of one batch and must not reach another."""
        return replace(self, delta={})

    def fork(self, *name: object) -> View:
        """Same parameters and delta under other dropout masks, reproducibly named."""
        return replace(self, key=None if self.key is None else mix(self.key, *name))

    def with_params(self, params: Mapping[str, Tensor]) -> View:
        """Evaluate with these parameters in place of the model's own (unnamed ones stay)."""
        return replace(self, params={**(self.params or {}), **params})


def _map_tensors(value: Any, function: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {k: _map_tensors(v, function) for k, v in value.items()}
    return value


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch, ready for the model.

    Attributes:
        inputs: keyword arguments of the model's forward, tensors with B rows.
        targets: what the leaf loss compares with (a tensor, or a mapping of tensors), or None.
        rows: global row ids; they key every random draw about a row.
        masks: `masks[kind][input name]`, 0/1 tensors `[B, L]`; kinds are `attention`, `perturbable`, `scored`.
        counts: how many of each unit the batch holds, known before any forward.
        parts: named sub-batches (`support`, `query`, `unlabelled`).
        task: name of the task whose leaf loss applies.
    """

    inputs: Mapping[str, Tensor]
    targets: Any = None
    rows: tuple[int, ...] = ()
    masks: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    parts: Mapping[str, Batch] = field(default_factory=dict)
    task: str = "main"

    @property
    def size(self) -> int:
        """Number of rows B."""
        return int(next(iter(self.inputs.values())).shape[0])

    def repeat(self, times: int) -> Batch:
        """The batch stacked `times` times along the rows; `counts` stay those of one copy."""

        def again(x: Tensor) -> Tensor:
            return torch.cat([x] * times)

        return replace(
            self,
            inputs=_map_tensors(self.inputs, again),
            targets=_map_tensors(self.targets, again),
            masks=_map_tensors(self.masks, again),
            rows=self.rows * times,
        )

    def to(self, device: torch.device) -> Batch:
        """The batch and its parts on another device."""

        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        return replace(
            self,
            inputs=_map_tensors(self.inputs, move),
            targets=_map_tensors(self.targets, move),
            masks=_map_tensors(self.masks, move),
            parts={name: part.to(device) for name, part in self.parts.items()},
        )


@dataclass(frozen=True, eq=False)
class Work:
    """One micro-batch's share of an optimizer step: batch, weight per unit, and the view to evaluate under."""

    batch: Batch
    weights: Mapping[str, float]
    view: View = View()
    id: int = 0

    def scaled(self, factor: float) -> Work:
        """The same work at `factor` times the weight.

        Raises:
            ValueError: for 0, which would also zero the gradient of a delta; skip the pass instead.
        """
        if factor == 0:
            raise ValueError("a Work cannot be scaled by 0: it would zero the gradient of delta too; skip the pass")
        return replace(self, weights={unit: factor * w for unit, w in self.weights.items()})

    def at(self, view: View) -> Work:
        """The same work under another view."""
        return replace(self, view=view)


@dataclass(frozen=True, eq=False)
class Out:
    """What one evaluation of the loss gives: sums with units, and the logits behind them.

    Attributes:
        terms: loss terms by name; a loss is always a sum with a unit, never a mean.
        logits: `[B, C]`, `[B, L, C]` or `[B, L, V]`.
        features: last hidden state `[B, L, D]` when asked for.
        layers: then also all hidden states, those before the first layer and after each.
        attentions: attention maps `[B, H, L, L]` of each layer when asked for.
        view: the view behind `logits`.
        replay: whether the same view gives the same masks again (stacked passes cannot be replayed).
    """

    terms: Mapping[str, Term] = field(default_factory=dict)
    logits: Tensor | None = None
    features: Tensor | None = None
    view: View | None = None
    replay: bool = True
    layers: tuple[Tensor, ...] = ()
    attentions: tuple[Tensor, ...] = ()

    @property
    def scores(self) -> Tensor:
        """The logits in at least fp32; raises if the evaluation kept none."""
        if self.logits is None:
            raise ValueError("this evaluation carries no logits")
        return self.logits if self.logits.dtype in (torch.float32, torch.float64) else self.logits.float()


@dataclass(frozen=True, eq=False)
class Prediction:
    """What evaluation sees of a batch.

    Attributes:
        scores: probabilities `[B, C]` or `[B, L, C]`, or None for generated text.
        generated: token ids `[B, T]`, or None.
        terms: the task's loss terms, for the validation loss and perplexity.
        per_row: further numbers `[B]` by name, e.g. summed loss and scored tokens of each row of a language model.
    """

    scores: Tensor | None = None
    generated: Tensor | None = None
    terms: Mapping[str, Term] = field(default_factory=dict)
    per_row: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Draw:
    """Which rows make one micro-batch: positions in a split, and in the splits of its parts.

    Attributes:
        rows: positions of the batch's own rows.
        parts: `{part: (split, positions)}`, e.g. `{"support": ("train", (3, 8))}`.
        relabel: class id to episode label, or None.
        epoch: how often the split was passed before (0-based).
    """

    rows: tuple[int, ...]
    parts: Mapping[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    relabel: Mapping[int, int] | None = None
    epoch: int = 0


def add_terms(*parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What several passes of one work returned, summed by name."""
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total[name] + value if name in total else value
    return total


def weight_of(unit: str, weights: Mapping[str, float], name: str) -> float:
    """The weight of the unit in which term `name` is counted.

    Raises:
        KeyError: if it has none, naming both.
    """
    if unit not in weights:
        raise KeyError(f"loss term {name!r} is counted in {unit!r}, but the batch counts only {sorted(weights)}")
    return weights[unit]


def weighted(value: Tensor, weight: float) -> Tensor:
    """The value times its weight; two tensors multiply twice as fast as a tensor and a Python number."""
    return value * torch.full_like(value, weight)


def weighted_sum(terms: Mapping[str, Term], weights: Mapping[str, float]) -> Tensor:
    """The scalar to differentiate: each term's sum times its unit's weight.

    Raises:
        KeyError: if a term's unit has no weight, naming both.
    """
    total: Tensor | None = None
    for name, (value, unit) in terms.items():
        part = weighted(value, weight_of(unit, weights, name))
        total = part if total is None else total + part
    if total is None:
        raise ValueError("the loss has no terms")
    return total
