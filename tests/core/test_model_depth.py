"""Stacks of layers: the outermost lists, whatever the family and the wrapping."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from hybridengine.model import layer_stacks
from hybridengine.testing import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5


@pytest.mark.parametrize(
    ("make", "stacks"),
    [
        (tiny_bert, ["bert.encoder.layer"]),
        (tiny_gpt2, ["transformer.h"]),
        (tiny_llama, ["model.layers"]),
        (tiny_t5, ["encoder.block", "decoder.block"]),  # each of whose layers has a list of its own
        (lambda: nn.Linear(2, 2), []),
    ],
    ids=["bert", "gpt2", "llama", "t5", "none"],
)
def test_the_outermost_lists_are_the_stacks(make: Any, stacks: list[str]) -> None:
    found = layer_stacks(make())
    assert list(found) == stacks
    assert all(len(layers) == 2 for layers in found.values())


def test_inside_a_wrapper_they_have_its_prefix() -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(tiny_gpt2(), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    assert list(layer_stacks(adapted)) == ["base_model.model.transformer.h"]
