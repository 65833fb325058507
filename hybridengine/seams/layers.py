"""The layers of a model, one above the other, and what leaves the last one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hybridengine.seams.overriding import override_forward

__all__ = ["Layers"]

Join = Callable[[list[Tensor]], Tensor]
"""All states `[B, L, D]`, before the first layer and after each, to those that stand for the last."""


class _Call(NamedTuple):
    name: str
    place: int
    states: Any
    output: Any


class Layers:
    """The layers that hidden states pass one after the other; of several stacks (encoder, decoder) the last to run."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self._modules = modules
        self._seen: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._modules)

    @classmethod
    @torch.no_grad()
    def find(cls, model: nn.Module, inputs: Mapping[str, Tensor]) -> Layers | None:
        """The layers of `model`, or None where no list of modules hands states from one to the next.

        That is measured in one traced pass: each layer must get the very tensor that the one below it returned.
        """
        calls: list[_Call] = []

        def record(name: str, index: int, module: nn.Module, args: Any, options: Any, output: Any) -> None:
            calls.append(_Call(name, index, _states_of(args, options), _first(output)))

        lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
        handles = [
            layer.register_forward_hook(functools.partial(record, name, index), with_kwargs=True)
            for name, layers in lists.items()
            for index, layer in enumerate(layers)
        ]
        training = model.training
        try:
            model.eval()(**inputs)
        finally:
            model.train(training)
            for handle in handles:
                handle.remove()
        stacks = {}
        for name, layers in lists.items():
            mine = [call for call in calls if call.name == name]
            linked = all(below.output is above.states for below, above in pairwise(mine))
            if [call.place for call in mine] == list(range(len(layers))) and linked and _has_length(mine[0].states):
                stacks[name] = calls.index(mine[-1])
        whole = [name for name in stacks if not any(name.startswith(f"{other}.") for other in stacks)]
        return cls(list(lists[max(whole, key=stacks.__getitem__)])) if whole else None

    def join(self, join: Join) -> None:
        """From now on `join(states)` leaves the last layer, in place of its own output."""
        for index, layer in enumerate(self._modules):
            override_forward(layer, functools.partial(self._watched, index, join))

    def _watched(self, index: int, join: Join, whole: Callable[..., Any]) -> Callable[..., Any]:
        def forward(module: nn.Module, *args: Any, **options: Any) -> Any:
            if index == 0:
                self._seen.clear()
            self._seen.append(_states_of(args, options))
            output = whole(module, *args, **options)
            if index < len(self._modules) - 1:
                return output
            states, self._seen = [*self._seen, _first(output)], []
            joined = join(states)
            return joined if isinstance(output, Tensor) else (joined, *output[1:])

        return forward


def _states_of(args: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
    return args[0] if args else options.get("hidden_states")


def _has_length(states: Any) -> bool:
    return isinstance(states, Tensor) and states.dim() == 3


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output
