"""FGM against a reference written from the paper, its invariants, and the places where the popular recipe fails."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import (
    EXACT,
    Plain,
    Spy,
    apart,
    bert,
    check_accumulation,
    check_loss_scale,
    check_padding,
    check_restores,
    gradients,
    match,
    unit,
)
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from hybridengine.seams import Batch, sequence_norms
from hybridengine.seams.trace import cost_of
from hybridengine.testing import SimpleTask, make_batch, set_up, tiny_bert, tiny_t5
from hybridengine_plugins.adversarial.fgm import FGM, FGSM


def reference(epsilon: float, weight: float, norm: str = "l2") -> Any:
    """(1 - weight) dL(e) + weight dL(e + epsilon g / ||g||), as in Miyato et al. section 3 plus the clean share."""

    def gradient(plain: Plain, batch: Batch, seed: int) -> dict[str, Tensor]:
        zero = plain.zeros(batch)
        clean = plain.loss(batch, seed, zero)
        g = torch.autograd.grad(clean, zero, retain_graph=True)[0]
        delta = epsilon * (unit(g) if norm == "l2" else g.sign())
        return plain.gradient((1 - weight) * clean + weight * plain.loss(batch, seed, delta))

    return gradient


@pytest.mark.parametrize(("epsilon", "weight", "norm"), [(1.0, 0.5, "l2"), (0.4, 0.9, "l2"), (0.02, 0.5, "linf")])
def test_matches_the_paper(epsilon: float, weight: float, norm: Any) -> None:
    match((FGM if norm == "l2" else FGSM)(epsilon=epsilon, weight=weight), reference(epsilon, weight, norm))


def test_weight_one_trains_on_the_adversarial_input_alone() -> None:
    bench = match(FGM(epsilon=1.0, weight=1.0), reference(1.0, 1.0))
    assert bench.ctx.trace.text() == "F4 G F4 B S"
    assert cost_of(bench.ctx.trace.events, 4) == 5


def test_cost_is_two_full_passes() -> None:
    bench = set_up([FGM(epsilon=1.0)], bert(), make_batch())
    bench.step([make_batch()])
    assert bench.ctx.trace.text() == "F4 b F4 B S"
    assert cost_of(bench.ctx.trace.events, 4) == 6


@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_epsilon_zero_is_plain_training(weight: float) -> None:
    batch = make_batch()
    attacked = gradients(lambda: [FGM(epsilon=0.0, weight=weight)], [batch], bert())
    assert apart(attacked, gradients(list, [batch], bert())) < EXACT


@settings(max_examples=12, deadline=None)
@given(
    epsilon=st.floats(1e-3, 10),
    size=st.integers(1, 5),
    length=st.integers(4, 9),
    seed=st.integers(0, 50),
    weight=st.sampled_from([0.3, 1.0]),
)
def test_each_sequence_moves_by_epsilon(epsilon: float, size: int, length: int, seed: int, weight: float) -> None:
    batch, spy = make_batch(size, length, seed=seed), Spy()
    bench = set_up([FGM(epsilon=epsilon, weight=weight)], bert(), batch, task=spy)
    bench.step([batch])
    delta = spy.deltas[-1]
    torch.testing.assert_close(sequence_norms(delta), torch.full((size,), epsilon, dtype=torch.float64))
    for moved in delta.values():
        assert not moved[batch.inputs["attention_mask"] == 0].any()
    assert bench.effect("fgm", "delta_norm") == pytest.approx(epsilon, rel=1e-6)


def test_both_passes_see_the_same_dropout() -> None:
    spy = Spy()
    set_up([FGM(epsilon=1.0)], bert(), make_batch(), task=spy).step([make_batch()])
    assert len(set(spy.keys)) == 1


def test_invariants() -> None:
    for stack in (
        lambda: [FGM(epsilon=1.0)],
        lambda: [FGM(epsilon=1.0, weight=1.0)],
        lambda: [FGSM(epsilon=0.05)],
    ):
        check_accumulation(stack)
        check_padding(stack)
        check_loss_scale(stack)
    check_restores(lambda: [FGM(epsilon=1.0)], forwards=2)


def test_starts_when_told() -> None:
    bench = set_up([FGM(epsilon=1.0, start=1)], bert(), make_batch())
    bench.step([make_batch()])
    assert bench.ctx.trace.text() == "F4 B S"
    bench.step([make_batch()])
    assert bench.ctx.trace.text() == "F4 b F4 B S"


def test_reported_gain_is_the_loss_difference() -> None:
    batch = make_batch()
    bench, plain = set_up([FGM(epsilon=1.0)], bert(0.0), batch), Plain(bert(0.0))
    bench.step([batch])
    zero = plain.zeros(batch)
    delta = unit(torch.autograd.grad(plain.loss(batch, 0, zero), zero)[0])
    gain = (plain.loss(batch, 0, delta) - plain.loss(batch, 0)).detach()
    assert bench.effect("fgm", "loss_gain") == pytest.approx(float(gain), rel=1e-6)
    assert gain > 0


def test_shared_between_passes_of_an_outer_method() -> None:
    """Inside `ctx.sharing` (AWP) the attack is made once and still trains the clean share."""
    batch, spy = make_batch(), Spy()
    bench = set_up([FGM(epsilon=1.0)], bert(0.0), batch, task=spy)
    alone = set_up([FGM(epsilon=1.0)], bert(0.0), batch).gradients([batch])
    ctx = bench.ctx
    plain_gradient = ctx.gradient

    def twice(ctx: Any, works: Any) -> Any:
        with ctx.sharing():
            plain_gradient(ctx, works)
            first = ctx.take_grads()
            terms = plain_gradient(ctx, works)
            assert apart({k: p.grad for k, p in ctx.run.optimised().items()}, first) < EXACT
        return terms

    ctx.gradient = twice
    assert apart(bench.gradients([batch]), alone) < EXACT
    (site,) = spy.deltas[1]
    assert torch.equal(spy.deltas[1][site], spy.deltas[3][site])


# ---- where the popular recipe does nothing --------------------------------------------------------------------------


class PopularFGM:
    """The recipe as it circulates: move the embedding matrix by its own gradient, put it back afterwards."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.backup: dict[str, Tensor] = {}

    def attack(self, epsilon: float = 1.0, emb_name: str = "word_embeddings") -> None:
        for name, param in self.model.named_parameters():
            if param.requires_grad and emb_name in name:
                self.backup[name] = param.data.clone()
                norm = torch.norm(param.grad)
                if norm != 0 and not torch.isnan(norm):
                    param.data.add_(epsilon * param.grad / norm)


def lora_bert(**sizes: Any) -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
    return peft.get_peft_model(tiny_bert(num_labels=3, **sizes).double(), config)


def popular_change(model: Any, batch: Batch, forward: Any = None) -> float:
    """How far the recipe moves the logits."""
    forward = model if forward is None else forward
    before = forward(**batch.inputs).logits
    before.logsumexp(-1).sum().backward()
    PopularFGM(model).attack()
    return float((forward(**batch.inputs).logits - before).detach().abs().max())


def assert_attacks(bench: Any, batch: Batch, spy: Spy, plain: dict[str, Tensor]) -> None:
    attacked = bench.gradients([batch])
    norms = sequence_norms(spy.deltas[-1])
    torch.testing.assert_close(norms, torch.ones_like(norms))
    assert apart(attacked, plain) > 1e-3


def test_lora_on_frozen_embeddings() -> None:
    batch, spy = make_batch(), Spy()
    assert popular_change(lora_bert(), batch) == 0
    bench = set_up([FGM(epsilon=1.0)], lora_bert(), batch, task=spy)
    assert_attacks(bench, batch, spy, gradients(list, [batch], lora_bert()))


def test_t5_at_both_sites() -> None:
    batch, spy = make_batch(kind="seq2seq"), Spy("tokens")
    assert popular_change(tiny_t5().double(), batch) == 0
    bench = set_up([FGM(epsilon=1.0)], tiny_t5().double(), batch, task=spy)
    assert_attacks(bench, batch, spy, gradients(list, [batch], tiny_t5().double(), task=SimpleTask("tokens")))
    assert len(spy.deltas[-1]) == 2
    assert all(delta.flatten(1).norm(dim=1).min() > 0 for delta in spy.deltas[-1].values())


class Bag(nn.Module):
    """The smallest text model: frozen word embeddings, mean, head."""

    def __init__(self) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(60, 8).requires_grad_(False)
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SequenceClassifierOutput:
        mask = attention_mask.unsqueeze(-1)
        hidden = torch.tanh(self.word_embeddings(input_ids)) * mask
        return SequenceClassifierOutput(logits=self.head(hidden.sum(1) / mask.sum(1)))


def bag() -> Bag:
    torch.manual_seed(0)
    return Bag().double()


@pytest.mark.parametrize(
    "make", [bag, pytest.param(lambda: lora_bert(num_hidden_layers=1), marks=pytest.mark.slow, id="lora")]
)
def test_compiled_model(make: Any) -> None:
    batch, spy = make_batch(), Spy()
    try:
        bench = set_up([FGM(epsilon=1.0)], make(), batch, task=spy)
        bench.run.forward_model = torch.compile(bench.run.model, backend="aot_eager")
        assert popular_change(bench.run.model, batch, bench.run.forward_model) == 0
        attacked = bench.gradients([batch])
    finally:
        torch._dynamo.reset()
    norms = sequence_norms(spy.deltas[-1])
    torch.testing.assert_close(norms, torch.ones_like(norms))
    # No dropout: compiled and eager differ by the rounding of fused operations alone.
    assert apart(attacked, gradients(lambda: [FGM(epsilon=1.0)], [batch], make())) < 1e-9
    assert apart(attacked, gradients(list, [batch], make())) > 1e-3
