"""Full tuning: every parameter moves, and it shares the backbone with no adapter."""

from __future__ import annotations

import torch

from hybridengine.stack import check_stack
from hybridengine.stack.resolve import as_method
from hybridengine.testing import make_batch, set_up, tiny_bert
from hybridengine_plugins.adapters.freeze import Freeze
from hybridengine_plugins.adapters.full import Full
from hybridengine_plugins.adapters.lora import LoRA


def test_every_parameter_trains_even_of_a_frozen_model():
    model = tiny_bert(num_labels=3).requires_grad_(False)
    bench = set_up([Full()], model, make_batch(), lr=0.1)
    names = {name for name, _ in model.named_parameters()}
    assert set(bench.run.may_optimise) == names
    before = bench.parameters()
    bench.step([make_batch()])
    still = {name for name, p in bench.parameters().items() if torch.equal(p, before[name])}
    # a key's bias shifts all scores of a query alike, so its gradient is 0 up to rounding
    assert all(name.endswith("key.bias") for name in still)


def test_equals_the_empty_stack():
    gradients = [
        set_up(stack, tiny_bert(num_labels=3), make_batch()).gradients([make_batch()]) for stack in ([], [Full()])
    ]
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_not_with_an_adapter_but_with_freeze():
    (problem,) = check_stack([as_method(Full()), as_method(LoRA())], set())
    assert "'full'" in problem and "'lora'" in problem and "'backbone'" in problem
    assert check_stack([as_method(Full()), as_method(Freeze(layers=1))], set()) == []
