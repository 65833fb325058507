"""The layers of a model, and how deep each parameter stands: what freezing and layer-wise rates go by."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence

from torch import nn

__all__ = ["layer_stacks", "parameter_levels"]

_LAYER = re.compile(r"\.(\d+)\.")
_PEFT = "base_model.model."


def layer_stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The stacks of layers by name: the outermost module lists, an encoder-decoder's two apart."""
    stacks: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{above}.") for above in stacks)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            stacks[name] = module
    return stacks


def parameter_levels(model: nn.Module, head: Sequence[str] = ()) -> tuple[dict[str, int], int]:
    """The level of every parameter by name, counted from the bottom, and the top level.

    0 is the embeddings (and whatever is registered before the first layer), 1..N the layers, N + 1 all that stands
    above them: final norm, pooler, head. The layer is the first number in a parameter's name; encoder and decoder of
    one model are counted alike. Tied parameters have one level, that of their first name.

    Args:
        model: any module, also wrapped by PEFT.
        head: patterns naming the head's parameters, as `task.head`.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    levels: dict[str, int | None] = {}
    below = True
    for name, parameter in model.named_parameters():
        short = name.removeprefix(_PEFT)
        numbered = _LAYER.search(f".{short}")
        if any(fnmatch.fnmatchcase(short, pattern) for pattern in head):
            levels[name] = None
        elif numbered:
            levels[name] = int(numbered[1]) + 1
            below = False
        else:
            levels[name] = 0 if below or id(parameter) in embeddings or "embed" in short else None
    top = 1 + max((level for level in levels.values() if level is not None), default=0)
    if below:  # no layers at all: only embeddings are the bottom
        known = dict(model.named_parameters())
        return {
            k: 0 if v == 0 and (id(known[k]) in embeddings or "embed" in k) else top for k, v in levels.items()
        }, top
    return {name: top if level is None else level for name, level in levels.items()}, top
