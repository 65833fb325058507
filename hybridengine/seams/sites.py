"""Embedding sites: the calls of embedding modules on the batch's token ids, where a delta may be added.

A site is a *call*, found by one traced forward with made-up ids: positions, token types and T5's relative bias are
embeddings too, T5 and BART share one module between encoder and decoder, and `get_input_embeddings` names only one.
Their modules read a slot from the start: what is added after `torch.compile` it silently ignores.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hybridengine.errors import SeamError
from hybridengine.seams.overriding import override_forward

__all__ = ["Site", "Sites"]


@dataclass(frozen=True)
class Site:
    """One embedding call: the model input it reads, its width D, its output's dtype, and how many ids it knows."""

    input: str
    width: int
    dtype: torch.dtype
    tokens: int


class Sites:
    """The embedding sites of one model, and the slot through which a delta reaches them."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
        self.table: dict[str, Site] = {}
        self.soft_prompt: Callable[[], Tensor] | None = None
        """What gives the prompt vectors `[P, D]` that stand where ids are negative: -1-i is vector i."""
        self._calls_per_module: dict[str, int] = {}
        self._delta: Mapping[str, Tensor] = {}
        self._calls: dict[str, int] = {}
        self._used: list[str] = []
        self._find(model, _made_up(inputs))
        for name in self._calls_per_module:
            override_forward(model.get_submodule(name), functools.partial(self._watched, name))
        self._classes = {type(model.get_submodule(name)) for name in self._calls_per_module} - {nn.Embedding}

    def reach(self, model: nn.Module) -> bool:
        """Whether this model's embeddings know deltas and soft tokens: the run's own model and its copies do."""
        return any(type(module) in self._classes for module in model.modules())

    def vocabulary(self, model: nn.Module, input: str = "input_ids") -> Tensor:
        """The embeddings `[V, D]` of the token ids that arrive as `input`."""
        name = next(name for name, site in self.table.items() if site.input == input)
        weight = model.get_submodule(name.partition("#")[0]).weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    def _watched(self, name: str, whole: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(module: nn.Module, ids: Tensor, *args: Any, **options: Any) -> Tensor:
            if self.soft_prompt is not None:
                # Placeholder id -1-i stands for prompt vector i; the lookup itself must see a valid row.
                looked_up = whole(module, ids.clamp_min(0), *args, **options)
                vectors = self.soft_prompt()[(-1 - ids).clamp_min(0)].to(looked_up.dtype)
                output = torch.where((ids < 0).unsqueeze(-1), vectors, looked_up)
            else:
                output = whole(module, ids, *args, **options)
            return self._moved(name, output) if self._delta else output

        return forward

    def _find(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
        seen: list[tuple[str, int, Tensor, Tensor]] = []

        def record(name: str, module: nn.Embedding, args: tuple[Any, ...], output: Tensor) -> None:
            seen.append((name, module.num_embeddings, args[0].clone(), output))

        handles = [
            module.register_forward_hook(functools.partial(record, name))
            for name, module in model.named_modules()
            if isinstance(module, nn.Embedding)
        ]
        training = model.training
        try:
            with torch.no_grad():
                model.eval()(**inputs)
        finally:
            model.train(training)
            for handle in handles:
                handle.remove()
        for name, tokens, ids, output in seen:
            matches = [k for k, v in inputs.items() if k.endswith("input_ids") and torch.equal(v, ids)]
            if matches:
                nth = self._calls_per_module.get(name, 0)
                self._calls_per_module[name] = nth + 1
                site = Site(matches[0], int(output.shape[-1]), output.dtype, tokens)
                self.table[_site_name(name, nth)] = site

    def read(self, model: nn.Module, inputs: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What every site of `model` that `inputs` feed looks up, `[B, L, D]` with its graph.

        Args:
            params: functional parameters of the model by name, in place of its own.
        """
        names = {id(p): name for name, p in model.named_parameters()} if params else {}
        found = {}
        for name, site in self.table.items():
            if site.input in inputs:
                module = model.get_submodule(name.partition("#")[0])
                own = {key: names.get(id(p), "") for key, p in module.named_parameters()}
                given = {key: params[known] for key, known in own.items() if known in params}
                found[name] = functional_call(module, given, (inputs[site.input],))
        return found

    def _moved(self, name: str, output: Tensor) -> Tensor:
        """The output of this call of module `name`, with its delta added."""
        nth = self._calls.get(name, 0)
        self._calls[name] = nth + 1
        if nth >= self._calls_per_module[name]:
            raise SeamError(f"embedding {name!r} ran again inside one forward with a delta (generation?)")
        site = _site_name(name, nth)
        if site not in self._delta:
            return output
        delta = self._delta[site]
        self._used.append(site)
        if delta.shape != output.shape:
            raise SeamError(f"site {site!r}: delta has shape {tuple(delta.shape)}, output {tuple(output.shape)}")
        return output + delta.to(output.dtype)

    @contextlib.contextmanager
    def armed(self, delta: Mapping[str, Tensor]) -> Iterator[None]:
        """One forward inside consumes each delta exactly once, or this raises `SeamError`."""
        if not delta:
            yield
            return
        self._delta, self._calls, self._used = dict(delta), {}, []
        try:
            yield
            if sorted(self._used) != sorted(delta):
                raise SeamError(
                    f"a delta was given for sites {sorted(delta)}, but the forward consumed {sorted(self._used)};"
                    f" this model's sites are {sorted(self.table)}"
                )
        finally:
            self._delta, self._calls, self._used = {}, {}, []


def _site_name(module: str, nth: int) -> str:
    return f"{module}#{nth}" if nth else module


def _made_up(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch with distinct, small ids per token input, so that equal real inputs cannot be confused."""
    out: dict[str, Tensor] = {}
    offset = 0
    for name, value in inputs.items():
        if name.endswith("input_ids"):
            # Small ids are valid in any vocabulary of 32 rows or more; the offset tells the inputs apart.
            rows, length = value.shape
            wave = (torch.arange(rows * length, device=value.device).view(rows, length) * 7 + offset) % 29
            value = wave.to(value.dtype) + 3
            offset += 11
        out[name] = value
    return out
