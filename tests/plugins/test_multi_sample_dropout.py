"""Multi-sample dropout against an encoder and a head called by hand, and that the encoder runs once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain import EXACT, Plain, apart, bert, check_accumulation, check_loss_scale, check_padding, gradients, match
from torch import Tensor
from torch.nn import functional

from hybridengine.errors import ModelError
from hybridengine.seams import Batch, mix
from hybridengine.seams.trace import cost_of
from hybridengine.testing import SimpleTask, make_batch, set_up, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from hybridengine_plugins.adapters.lora import LoRA
from hybridengine_plugins.adversarial.freelb import FreeLB
from hybridengine_plugins.adversarial.r3f import R3F
from hybridengine_plugins.regularize.multi_sample_dropout import MultiSampleDropout
from hybridengine_plugins.regularize.rdrop import RDrop
from hybridengine_plugins.regularize.supcon import SupCon


def reference(samples: int, p: float) -> Any:
    """Inoue, section 3: the mean of the losses of K dropped copies of what the encoder gives."""

    def gradient(plain: Plain, batch: Batch, seed: int) -> dict[str, Tensor]:
        model, total = plain.model, 0.0
        for k in range(samples):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed if k == 0 else mix(seed, "sample", k))
                if k == 0:
                    states = model.bert(**batch.inputs)
                functional.dropout(states.last_hidden_state, p)  # a mask that BERT's head does not read
                pooled = functional.dropout(states.pooler_output, p)
                logits = model.classifier(model.dropout(pooled))
            total = total + functional.cross_entropy(logits, batch.targets) / samples
        return plain.gradient(total)

    return gradient


@pytest.mark.parametrize(("samples", "p"), [(2, 0.5), (8, 0.3)])
def test_three_steps_match_the_paper(samples: int, p: float) -> None:
    match(MultiSampleDropout(samples=samples, p=p), reference(samples, p))


def test_without_any_dropout_it_is_plain_training() -> None:
    batch = make_batch()
    silent = gradients(lambda: [MultiSampleDropout(p=0.0)], [batch], bert(0.0))
    assert apart(silent, gradients(list, [batch], bert(0.0))) < EXACT


def test_the_encoder_runs_once_and_the_head_as_often_as_asked() -> None:
    model, calls = bert(), {"encoder": 0, "head": 0}
    bench = set_up([MultiSampleDropout(samples=5)], model, make_batch())
    model.bert.encoder.register_forward_hook(lambda *_: calls.update(encoder=calls["encoder"] + 1))
    model.classifier.register_forward_hook(lambda *_: calls.update(head=calls["head"] + 1))
    bench.step([make_batch()])
    assert calls == {"encoder": 1, "head": 5}
    assert bench.ctx.trace.text() == "F4 B S" and cost_of(bench.ctx.trace.events, 4) == 3
    assert bench.effect("multi-sample-dropout", "spread") > 0


def test_invariants() -> None:
    def still() -> list[Any]:
        return [MultiSampleDropout(p=0.0)]

    for check in (check_accumulation, check_padding):  # masks follow the micro-batch and its length, as all dropout
        check(still)
    check_loss_scale(lambda: [MultiSampleDropout()])


def test_each_pass_of_an_attack_and_of_rdrop_has_its_own_encoding() -> None:
    batch = make_batch()
    bench = set_up([MultiSampleDropout(p=0.0), RDrop(), FreeLB(steps=2, epsilon=0.5)], bert(), batch)
    bench.step([batch])
    assert bench.ctx.trace.text() == "F8 b F8 B S"
    assert bench.effect("freelb", "delta_norm") > 0 and bench.effect("rdrop", "kl") > 0


def test_methods_around_it_that_repeat_its_pass_know_that_they_cannot() -> None:
    """The clean logits of r3f are made again where dropout stood between encoder and head, else they are its first."""
    passes = []
    for p in (0.0, 0.5):
        bench = set_up([MultiSampleDropout(p=p), R3F(sigma=0.0)], bert(), make_batch())
        bench.step([make_batch()])
        passes.append(bench.ctx.trace.text())
        assert bench.effect("r3f", "kl") < EXACT
    assert passes == ["F4 F4 B S", "F4 F4 F4 B S"]


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama], ids=["gpt2", "llama"])
def test_heads_without_dropout_get_theirs(make: Any) -> None:
    model = make("AutoModelForSequenceClassification", num_labels=3, pad_token_id=0).double()
    bench = set_up([MultiSampleDropout()], model, make_batch())
    bench.step([make_batch()])
    assert bench.effect("multi-sample-dropout", "spread") > 0


def test_tags_adapters_and_hidden_states() -> None:
    tagger = tiny_bert("AutoModelForTokenClassification", num_labels=3).double()
    bench = set_up([MultiSampleDropout()], tagger, make_batch(kind="tokens"), task=SimpleTask("tokens"))
    bench.step([make_batch(kind="tokens")])
    assert bench.effect("multi-sample-dropout", "spread") > 0
    for stack in ([LoRA(r=2), MultiSampleDropout()], [SupCon(), MultiSampleDropout()]):
        bench = set_up(stack, bert(), make_batch())
        bench.step([make_batch()])
        assert bench.effect("multi-sample-dropout", "spread") > 0


def test_a_model_in_one_piece_is_refused() -> None:
    with pytest.raises(ModelError, match=r"cannot run apart.*use rdrop, or remove multi-sample-dropout"):
        set_up([MultiSampleDropout()], tiny_t5(), make_batch(kind="seq2seq"), task=SimpleTask("tokens"))
