"""The backbone below a head: found by tracing, kept for one owner, and never another model's."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hybridengine.errors import SeamError
from hybridengine.seams import Backbone, View
from hybridengine.stack.toy import ToyModel
from hybridengine.testing import make_batch, set_up, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5

INPUTS = dict(make_batch().inputs)
HEADS = ("AutoModelForSequenceClassification", "AutoModelForTokenClassification")


@pytest.mark.parametrize("make", [tiny_bert, tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("head", HEADS)
def test_the_head_gives_the_same_logits_and_gradients_on_what_was_kept(make: Any, head: str) -> None:
    model = make(head, num_labels=3, pad_token_id=0).double()

    def gradients(logits: Tensor) -> list[Tensor | None]:
        return list(torch.autograd.grad(logits.square().sum(), list(model.parameters()), allow_unused=True))

    whole = model.eval()(**INPUTS).logits
    found = Backbone.find(model.train(), INPUTS)
    assert found is not None and model.training
    model.eval()
    with found.kept():
        for again in (False, True):
            assert found.holds("mine") is again
            with found.armed("mine"):
                logits = model(**INPUTS).logits
    assert torch.equal(logits, whole)
    for one, other in zip(gradients(logits), gradients(whole), strict=True):
        assert one is other is None or torch.equal(one, other)


def test_outside_and_for_other_owners_everything_is_computed() -> None:
    model, calls = ToyModel(3), []
    found = Backbone.find(model, INPUTS)
    assert found is not None
    model.base_model.embedding.register_forward_hook(lambda *_: calls.append(1))
    with found.kept():
        for owner in ("a", "a", "b", "b", "a"):
            with found.armed(owner):
                model(**INPUTS)
        model(**INPUTS)
    assert len(calls) == 4  # a once, b twice, and the pass that was not armed
    with found.armed("a"):
        model(**INPUTS)
    assert len(calls) == 5


def test_what_heads_get_can_be_changed_and_the_kept_states_stay() -> None:
    model = tiny_bert(num_labels=3).double()
    found = Backbone.find(model, INPUTS)
    assert found is not None
    with found.kept(lambda x: 0 * x):
        for _ in range(2):
            with found.armed("mine"):
                assert torch.equal(model(**INPUTS).logits, model.classifier.bias.expand(4, 3))
        assert found._kept.pooler_output.abs().sum() > 0


def test_a_copy_has_its_own() -> None:
    model = tiny_bert(num_labels=3)
    found = Backbone.find(model, INPUTS)
    assert found is not None
    other = copy.deepcopy(model)
    nn.init.zeros_(other.bert.pooler.dense.weight)
    with found.kept(), found.armed("mine"):
        model(**INPUTS)
        assert torch.equal(other(**INPUTS).logits, copy.deepcopy(other)(**INPUTS).logits)
        assert not torch.equal(other(**INPUTS).logits, model(**INPUTS).logits)


class Peeking(nn.Module):
    """A head that reads more than the backbone's outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.base_model = tiny_bert("AutoModel")
        self.calls = 0

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        self.calls += 1
        return SimpleNamespace(logits=self.base_model(input_ids, attention_mask).pooler_output + self.calls)


class Twice(Peeking):
    """A backbone that runs twice in a pass."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        first, second = (self.base_model(input_ids, attention_mask).pooler_output for _ in range(2))
        return SimpleNamespace(logits=first + second)


def test_models_whose_head_is_not_apart_are_found_out() -> None:
    assert Backbone.find(Peeking(), INPUTS) is None
    assert Backbone.find(Twice(), INPUTS) is None
    assert Backbone.find(nn.Sequential(), {}) is None
    assert Backbone.find(tiny_t5(), dict(make_batch(kind="seq2seq").inputs)) is None


def test_of_a_context_heads_share_a_pass_of_one_batch_delta_and_parameters() -> None:
    bench = set_up([], tiny_bert(num_labels=3).double(), batch := make_batch())
    with pytest.raises(SeamError, match=r"set `run\.backbone`"), bench.ctx.heads_alone():
        pass
    bench.run.backbone = Backbone.find(bench.run.model, bench.run.probe)
    delta = {site: torch.randn_like(zero) for site, zero in bench.ctx.zeros(batch).items()}
    with bench.ctx.heads_alone():
        view = View(key=1)
        first, again, moved = (bench.ctx.outputs(batch, [v])[0].scores for v in (view, view.fork(1), view.plus(delta)))
        assert torch.equal(first, again) and not torch.allclose(first, moved)
        other = bench.ctx.outputs(make_batch(seed=5), [view])[0].scores
    assert torch.equal(other, bench.ctx.outputs(make_batch(seed=5), [view])[0].scores)
    assert bench.ctx.trace.text() == "F4 F4 F4 F4"
