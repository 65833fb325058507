"""Freezing: what trains, what does not, and clear refusals."""

from __future__ import annotations

import pytest
import torch

from hybridengine.errors import ModelError
from hybridengine.testing import make_batch, set_up, tiny_bert, tiny_gpt2
from hybridengine_plugins.adapters.freeze import Freeze
from hybridengine_plugins.adapters.full import Full
from hybridengine_plugins.adapters.lora import LoRA


def _moved(bench):
    before = {k: p.detach().clone() for k, p in bench.run.model.named_parameters()}
    bench.step([make_batch()])
    return {k for k, p in bench.run.model.named_parameters() if not torch.equal(p, before[k])}


@pytest.mark.parametrize(("layers", "still"), [(0, {"0", "1"}), (1, {"1"}), (2, set())])
def test_layers_freeze_from_the_bottom(layers, still):
    bench = set_up([Full(), Freeze(layers=layers)], tiny_bert(num_labels=3), make_batch(), lr=0.1)
    moved = _moved(bench)
    assert not any(name.startswith("bert.embeddings") for name in moved)
    assert {name.split(".")[3] for name in moved if ".layer." in name} == still
    assert {"classifier.weight", "bert.pooler.dense.weight"} <= moved
    assert moved <= set(bench.run.may_optimise)


def test_patterns_and_layers_add_up():
    freeze = Freeze(layers=0, patterns=["*.attention.*"])
    run = set_up([freeze], tiny_bert(num_labels=3), make_batch()).run
    assert not any("embeddings" in k or ".attention." in k for k in run.may_optimise)
    assert any(".intermediate." in k for k in run.may_optimise)
    assert "keep their values" in run.notes[0]


def test_over_lora_it_freezes_the_lower_adapters():
    run = set_up([Freeze(layers=1), LoRA(r=2)], tiny_bert(num_labels=3), make_batch()).run
    trained = set(run.may_optimise)
    assert any(".layer.1." in k for k in trained)
    assert not any(".layer.0." in k for k in trained)


def test_a_frozen_model_still_passes_gradients_to_a_delta():
    bench = set_up(
        [Freeze(layers=2)], tiny_gpt2("AutoModelForSequenceClassification", num_labels=3, pad_token_id=0), make_batch()
    )
    batch = make_batch()
    delta = {k: z.requires_grad_() for k, z in bench.ctx.zeros(batch).items()}
    from hybridengine.seams import View

    out = bench.ctx.task_loss(batch, View(delta=delta))
    (gradient,) = bench.ctx.grad(out.terms["loss"][0], list(delta.values()))
    assert float(gradient.norm()) > 0


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (lambda: Freeze(layers=3), "2 layers"),
        (lambda: Freeze(patterns=["*.nothing"]), "matches no parameter"),
        (lambda: Freeze(patterns=["*"]), "nothing could be trained"),
    ],
)
def test_refusals_of_a_model(freeze, message):
    with pytest.raises(ModelError, match=message):
        set_up([freeze()], tiny_bert(num_labels=3), make_batch())


@pytest.mark.parametrize("options", [{}, {"layers": -1}])
def test_refuses_nothing_to_freeze(options):
    with pytest.raises(ValueError, match=r"nothing to freeze|0 or more"):
        Freeze(**options)


def test_freezing_twice_is_named():
    with pytest.raises(ModelError, match="frozen already"):
        set_up([Freeze(patterns=["bert.embeddings.*"])], _embeddings_frozen(), make_batch())


def _embeddings_frozen():
    model = tiny_bert(num_labels=3)
    model.bert.embeddings.requires_grad_(False)
    return model
