"""What a transformers model is asked for beside its logits, and what it returned of every layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hybridengine.seams.randomness import seeded

__all__ = ["Wanted", "asking", "both", "evaluating", "layers_of", "width_projection"]

Wanted = bool | Literal["attention"]
"""Whether hidden states are wanted beside logits, with "attention" the attention maps too."""


def both(one: Wanted, other: Wanted) -> Wanted:
    """What is wanted by one of two or by the other."""
    return "attention" if "attention" in (one, other) else one or other


def asking(inputs: Mapping[str, Tensor], wanted: Wanted) -> dict[str, Any]:
    """A model's arguments."""
    options = {"output_hidden_states": bool(wanted), "output_attentions": wanted == "attention"}
    return {**inputs, **{name: True for name, value in options.items() if value}}


def layers_of(outputs: Any, wanted: Wanted) -> dict[str, Any]:
    """The fields of `Out` that tell of layers; of an encoder-decoder, the decoder's."""
    if not wanted:
        return {}
    hidden = getattr(outputs, "hidden_states", None) or outputs.decoder_hidden_states
    maps = getattr(outputs, "attentions", None) or getattr(outputs, "decoder_attentions", None) or ()
    return {"features": hidden[-1], "layers": tuple(hidden), "attentions": tuple(maps)}


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model is in evaluation mode inside, and as before afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@torch.no_grad()
def width_projection(mine: nn.Module, theirs: nn.Module, inputs: Mapping[str, Tensor], seed: int) -> nn.Linear | None:
    """A matrix to learn that takes hidden states of one model to the width of another's, or None where it is the same.

    Args:
        inputs: of one pass of each, in which the widths are found.
        seed: of the matrix's random values.
    """
    widths = []
    for model in (mine, theirs):
        with evaluating(model):
            widths.append(int(layers_of(model(**asking(inputs, True)), True)["features"].shape[-1]))
    if widths[0] == widths[1]:
        return None
    with seeded(torch.default_generator, seed):
        projection = nn.Linear(widths[0], widths[1], bias=False)
    return projection.to(torch.promote_types(next(mine.parameters()).dtype, torch.float32))
