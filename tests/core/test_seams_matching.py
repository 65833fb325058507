"""Which layer teaches which, what the distances count, and the average that teaches."""

from __future__ import annotations

import pytest
import torch

from hybridengine.seams import (
    Average,
    View,
    attention_distance,
    evaluating,
    hidden_distance,
    paired_layers,
    width_projection,
)
from hybridengine.testing import make_batch, set_up, tiny_bert

MASK = torch.tensor([[1, 1, 1], [0, 1, 0]])


@pytest.mark.parametrize(
    ("mine", "theirs", "pairs"),
    [(4, 12, [3, 6, 9, 12]), (3, 3, [1, 2, 3]), (4, 2, [1, 1, 2, 2]), (4, 6, [2, 3, 5, 6]), (1, 24, [24])],
)
def test_layers_are_paired_over_the_whole_depth(mine: int, theirs: int, pairs: list[int]) -> None:
    assert paired_layers(mine, theirs) == pairs


def test_hidden_states_of_real_tokens_count_by_row() -> None:
    states = [torch.full((2, 3, 4), float(value)).double() for value in (0, 1, 2)]
    taught = [torch.full((2, 3, 4), float(value)).double() for value in (1, 7, 3, 7, 5)]
    for layers in (states, taught):
        layers[-1][MASK == 0] = 99.0 if layers is states else -99.0
    assert float(hidden_distance(states, taught, MASK)) == pytest.approx(2 * (1 + 4 + 9) / 3, abs=1e-12)
    shifted = hidden_distance(states, taught, MASK, lambda x: x + 1)
    assert float(shifted) == pytest.approx(2 * (0 + 1 + 4) / 3, abs=1e-12)


def test_maps_of_real_tokens_count_and_heads_are_averaged_where_their_numbers_differ() -> None:
    first = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0)).softmax(-1)
    second = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1)).softmax(-1)
    squares = (first - second).square().sum(-1).mean(1)
    assert torch.allclose(attention_distance([first], [second], MASK), squares[0].mean() + squares[1, 1])
    squares = (first.mean(1) - second[:, :2].mean(1)).square().sum(-1)
    assert torch.allclose(attention_distance([first], [second[:, :2]], MASK), squares[0].mean() + squares[1, 1])


def test_states_that_cannot_be_compared_are_told() -> None:
    state = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match="the other model gave no hidden states"):
        hidden_distance([state, state], [state], MASK)
    with pytest.raises(ValueError, match="this model gave no attention maps"):
        attention_distance([None], [state[:, None]], MASK)  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"hidden states of shapes \(2, 3, 4\) and \(2, 5, 4\) cannot be compared"):
        hidden_distance([state, state], [torch.zeros(2, 5, 4)] * 2, MASK)
    with pytest.raises(ValueError, match=r"attention maps of shapes \(2, 3, 3\) and \(2, 3, 5\) cannot be compared"):
        attention_distance([torch.zeros(2, 4, 3, 3)], [torch.zeros(2, 4, 3, 5)], MASK)


def test_a_projection_is_made_where_widths_differ_and_is_that_of_its_seed() -> None:
    wide, narrow, inputs = tiny_bert().train().double(), tiny_bert(hidden_size=16), make_batch().inputs
    before = torch.get_rng_state()
    first, again = (width_projection(wide, narrow, inputs, 3) for _ in range(2))
    assert first is not None and again is not None and first.weight.shape == (16, 32)
    assert torch.equal(first.weight, again.weight) and first.weight.dtype == torch.float64
    assert width_projection(wide, tiny_bert(), inputs, 3) is None
    assert wide.training and torch.equal(torch.get_rng_state(), before)


def test_evaluation_mode_ends_also_after_an_error() -> None:
    model = tiny_bert().train()
    with pytest.raises(RuntimeError), evaluating(model):
        assert not model.training
        raise RuntimeError
    assert model.training


def test_what_is_asked_for_reaches_every_evaluation_inside() -> None:
    model, batch = tiny_bert(num_labels=3, attn_implementation="eager"), make_batch()
    ctx = set_up([], model, batch).ctx
    with ctx.with_features("attention"), ctx.with_features():  # the more of both
        out = ctx.outputs(batch, [View()], features=True)[0]
    assert len(out.layers) == 3 and len(out.attentions) == 2 and torch.equal(out.features, out.layers[-1])
    with ctx.with_features(False):
        assert ctx.outputs(batch, [View()])[0].layers == ()
    assert ctx.outputs(batch, [View()], features=True)[0].attentions == ()


def test_an_average_follows_what_is_trained_and_keeps_what_rests() -> None:
    run = set_up([], tiny_bert(num_labels=3), make_batch()).run
    average, name = Average(run, "mine"), "classifier.weight"
    average.join()
    start = {k: x.clone() for k, x in average.values.items()}
    with torch.no_grad():
        run.may_optimise[name].add_(1.0)
    average.follow(rate=0.25)
    assert torch.allclose(average.values[name], start[name] + 0.25)
    assert run.state("mine") is average.values
    run.may_optimise[name].requires_grad_(False)
    average.follow(rate=1.0)
    assert torch.allclose(average.values[name], start[name] + 0.25) and name not in average.parameters()
