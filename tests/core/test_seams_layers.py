"""The stack of layers: found by what they hand on, and joined without a change to anything else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hybridengine.seams import Layers
from hybridengine.testing import make_batch, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5

INPUTS = dict(make_batch().inputs)


@pytest.mark.parametrize("make", [tiny_bert, tiny_gpt2, tiny_llama])
def test_states_are_those_that_transformers_returns(make: Any) -> None:
    """Before the first layer and after each; the last one of a decoder is normalised after that."""
    model = make("AutoModel").eval()
    hidden = model(**INPUTS, output_hidden_states=True).hidden_states
    layers, seen = Layers.find(model, INPUTS), []
    assert layers is not None and len(layers) == 2 == model.config.num_hidden_layers

    def join(states: list[Tensor]) -> Tensor:
        seen.extend(states)
        return states[-1]

    layers.join(join)
    again = model(**INPUTS, output_hidden_states=True).hidden_states
    assert len(seen) == 3 and all(torch.equal(a, b) for a, b in zip(seen[:2], hidden[:2], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(again, hidden, strict=True))


def test_what_is_joined_replaces_the_last_layer() -> None:
    model = tiny_bert("AutoModel").eval()
    layers = Layers.find(model, INPUTS)
    assert layers is not None
    first = model(**INPUTS, output_hidden_states=True).hidden_states[1]
    layers.join(lambda states: states[1])
    output = model(**INPUTS)
    assert torch.equal(output.last_hidden_state, first) and torch.equal(output.pooler_output, model.pooler(first))
    output.last_hidden_state.square().sum().backward()
    assert model.encoder.layer[0].output.dense.weight.grad is not None
    assert model.encoder.layer[1].output.dense.weight.grad is None


def test_of_an_encoder_decoder_it_is_the_decoder() -> None:
    model, inputs = tiny_t5(), dict(make_batch(kind="seq2seq").inputs)
    layers = Layers.find(model, inputs)
    assert layers is not None
    assert layers._modules == list(model.decoder.block)
    layers.join(lambda states: 0 * states[0])
    assert model(**inputs).logits.abs().max() == 0


class Odd(nn.Module):
    """Layers of which the second does not read the first."""

    def __init__(self, chained: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.chained = chained

    def forward(self, x: Tensor) -> Any:
        first = self.layers[0](x)
        return SimpleNamespace(logits=self.layers[1](first if self.chained else x) + first)


def test_lists_that_are_no_stack_are_none() -> None:
    assert Layers.find(Odd(chained=True), {"x": torch.zeros(2, 3, 4)}) is not None
    assert Layers.find(Odd(chained=False), {"x": torch.zeros(2, 3, 4)}) is None
    assert Layers.find(Odd(chained=True), {"x": torch.zeros(2, 4)}) is None  # a row has no positions
    assert Layers.find(nn.Identity(), {"input": torch.zeros(1)}) is None
