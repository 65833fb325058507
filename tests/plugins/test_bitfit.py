"""BitFit: which parameters train, by their names, and refusals."""

from __future__ import annotations

import pytest
import torch
from plain import EXACT, LR, Plain, apart, bert, key

from hybridengine.errors import ModelError
from hybridengine.plugin import Method
from hybridengine.stack import check_stack
from hybridengine.testing import make_batch, set_up, tiny_llama
from hybridengine_plugins.adapters.bitfit import BitFit
from hybridengine_plugins.adapters.lora import LoRA


def test_matches_a_plain_loop() -> None:
    """Three steps of descent on biases and head, nothing else."""
    batches = [make_batch(seed=s) for s in range(3)]
    bench, plain = set_up([BitFit()], bert(), batches[0], lr=LR), Plain(bert())
    chosen = {k for k in plain.parameters if k.endswith("bias") or k.startswith("classifier")}
    assert set(bench.run.may_optimise) == chosen
    for step, batch in enumerate(batches):
        bench.step([batch])
        gradient = plain.gradient(plain.loss(batch, key(step)))
        plain.descend({k: g for k, g in gradient.items() if k in chosen})
    own = dict(bench.run.model.named_parameters())
    assert apart({k: p.detach() for k, p in own.items()}, {k: p.detach() for k, p in plain.parameters.items()}) < EXACT
    start = dict(bert().named_parameters())
    assert {k for k, p in own.items() if not torch.equal(p, start[k])} <= chosen


def test_what_the_checkpoint_lacked_is_trained_in_full() -> None:
    def missing(run: object) -> None:
        run.missing_parameters = ["bert.pooler.dense.weight"]  # type: ignore[attr-defined]

    run = set_up([BitFit()], bert(), make_batch(), prepare=missing).run
    assert "bert.pooler.dense.weight" in run.may_optimise
    assert "biases are trained" in run.notes[0]


def test_a_model_without_biases_is_refused() -> None:
    model = tiny_llama("AutoModelForSequenceClassification", num_labels=3, pad_token_id=0)
    with pytest.raises(ModelError, match="no biases"):
        set_up([BitFit()], model, make_batch())


def test_one_way_to_tune_the_backbone() -> None:
    (problem,) = check_stack([Method("bitfit", BitFit()), Method("lora", LoRA())], set())
    assert "backbone" in problem
