"""A competitor's function as one whole computation: forward, backward, or a gradient penalty."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybridengine.bench.case import Function, Mode, Tensors

__all__ = ["Computation", "copied", "in_float64", "size"]


class Computation:
    """A call without arguments that returns its results by name: the output, and a gradient for each wanted input."""

    def __init__(self, function: Function, inputs: Tensors, wanted: tuple[str, ...], mode: Mode) -> None:
        self._function, self._mode = function, mode
        self._inputs = [value for name, value in inputs.items() if name != "upstream"]
        self._upstream = inputs.get("upstream")
        self._leaves = {name: inputs[name] for name in wanted} if mode != "forward" else {}

    def __call__(self) -> dict[str, Tensor]:
        self.clear()
        if self._mode == "forward":
            with torch.no_grad():
                return {"output": self._function(*self._inputs)}
        for leaf in self._leaves.values():
            leaf.requires_grad_()
        output = self._function(*self._inputs)
        if self._mode == "forward+backward":
            output.backward(self._upstream)
            return {"output": output.detach(), **self._gradients()}
        found = torch.autograd.grad(output, list(self._leaves.values()), self._upstream, create_graph=True)
        if not any(one.requires_grad for one in found):
            raise RuntimeError("its gradients are detached and cannot be differentiated again")
        wide = torch.float64 if output.dtype == torch.float64 else torch.float32
        penalty = torch.stack([one.to(wide).square().sum() for one in found]).sum()
        penalty.backward()  # type: ignore[no-untyped-call]
        return {"penalty": penalty.detach(), **self._gradients()}

    def clear(self) -> None:
        """Drop the gradients of the last call."""
        for leaf in self._leaves.values():
            leaf.grad = None
            leaf.requires_grad_(False)

    def _gradients(self) -> dict[str, Tensor]:
        return {f"gradient of {name}": leaf.grad for name, leaf in self._leaves.items() if leaf.grad is not None}


def copied(inputs: Tensors) -> Tensors:
    """The inputs as tensors of their own."""
    return {name: _each(value, lambda one: one.detach().clone()) for name, value in inputs.items()}


def in_float64(inputs: Tensors) -> Tensors:
    """The inputs with every floating one in float64."""
    return {
        name: _each(value, lambda one: one.detach().double() if one.is_floating_point() else one)
        for name, value in inputs.items()
    }


def size(values: Tensors) -> int:
    """Bytes of all tensors."""
    found = 0
    for value in values.values():
        for one in value if isinstance(value, list) else [value]:
            found += one.numel() * one.element_size() if isinstance(one, Tensor) else 0
    return found


def _each(value: Any, change: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    return [_each(one, change) for one in value] if isinstance(value, list) else value
