"""`dropout`: a model that was built with the rate, on every family; its own rates elsewhere; refusals."""

from __future__ import annotations

import pytest
import torch
from plain import EXACT, LR, apart, bert

from hybridengine.errors import ModelError
from hybridengine.stack import check_stack
from hybridengine.stack.resolve import as_method
from hybridengine.testing import make_batch, set_up, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from hybridengine_plugins.adapters.lora import LoRA
from hybridengine_plugins.regularize.dropout import Dropout
from hybridengine_plugins.regularize.rdrop import RDrop

BATCH = make_batch()
CLASSIFIER = "AutoModelForSequenceClassification"
FAMILIES = {
    "bert": (tiny_bert, {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
    "gpt2": (tiny_gpt2, {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "llama": (tiny_llama, {"attention_dropout": 0.0}),
    "t5": (tiny_t5, {"dropout_rate": 0.0}),
}


def outputs(model, seed=3):
    """Training-mode outputs under one seed; an encoder-decoder reads its own inputs shifted."""
    torch.manual_seed(seed)
    inputs = {k: v for k, v in BATCH.inputs.items() if k in ("input_ids", "attention_mask")}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return model.train()(**inputs).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_it_is_the_model_that_was_built_with_this_rate(family, p):
    build, rates = FAMILIES[family]
    options = {} if family == "t5" else {"num_labels": 3, "pad_token_id": 0}
    head = () if family in ("bert", "t5") else (CLASSIFIER,)
    built = build(*head, **options, **dict.fromkeys(rates, p))
    start = build(*head, **options, **dict.fromkeys(rates, 0.5 if p == 0 else 0.0))
    changed = Dropout(p=p).transform_model(set_up([], tiny_bert(num_labels=3), BATCH).run, start)
    assert torch.equal(outputs(changed), outputs(built))
    assert torch.equal(outputs(changed, 3), outputs(changed, 4)) == (p == 0)


def test_three_steps_are_those_of_the_model_built_so():
    ours = set_up([Dropout(p=0.25)], bert(dropout=0.0), BATCH, lr=LR)
    plain = set_up([], bert(dropout=0.25), BATCH, lr=LR)
    for _ in range(3):
        ours.step([BATCH])
        plain.step([BATCH])
        assert apart(ours.parameters(), plain.parameters()) < EXACT
    assert apart(ours.parameters(), set_up([], bert(dropout=0.0), BATCH).parameters()) > 1e-3


def test_only_the_modules_named_change_and_adapters_keep_their_own():
    model = set_up([LoRA(r=2, dropout=0.4), Dropout(p=0.2, modules=["*attention.self*"])], bert(0.1), BATCH).run.model
    rates = {name: m.p for name, m in model.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert {p for name, p in rates.items() if "attention.self.dropout" in name} == {0.2}
    assert {p for name, p in rates.items() if "lora_dropout" in name} == {0.4}
    assert {p for name, p in rates.items() if "self" not in name} == {0.1}


def test_a_pattern_without_match_is_told_with_what_there_is():
    with pytest.raises(ModelError, match=r"no module named \*atention\* drops anything; those that do end in: dropout"):
        set_up([Dropout(modules=["*atention*"])], bert(), BATCH)


def test_it_gives_rdrop_something_to_compare_or_says_that_it_takes_it_away():
    assert check_stack([as_method(Dropout(p=0.1)), as_method(RDrop())], {"labels"}) == []
    assert len(check_stack([as_method(Dropout(p=0.0)), as_method(RDrop())], {"labels"})) == 1

    class Stack:
        methods = [as_method(Dropout(p=0.0)), as_method(RDrop())]

    assert Dropout(p=0.1).check_stack(Stack()) == []
    (problem,) = Dropout(p=0.0).check_stack(Stack())
    assert problem == "dropout: p is 0, but rdrop needs dropout; set p above 0, or remove rdrop"
    Stack.methods = [*Stack.methods, as_method(LoRA(dropout=0.1))]
    assert Dropout(p=0.0).check_stack(Stack()) == []
    assert Dropout(p=0.0, modules=["classifier*"]).check_stack(Stack()) == []


def test_rdrop_trains_on_a_model_whose_rates_are_numbers(tmp_path):
    """Llama has no dropout module that the loaded model could be asked for."""
    from hybridengine import Engine
    from hybridengine.testing import tiny_checkpoint

    rows = [{"text": f"a {label} movie {i}", "label": label} for i in range(8) for label in ("bad", "good")]
    config = {
        "task": "text-classification",
        "model": {"name": str(tiny_checkpoint(tmp_path / "llama", "llama"))},
        "data": {"train": rows, "validation": rows[:4]},
        "train": {"max_steps": 2, "batch_size": 4, "precision": "fp32"},
        "methods": [{"dropout": {"p": 0.3}}, "rdrop"],
        "output": str(tmp_path / "run"),
    }
    assert Engine(config).train()["methods"]["rdrop"]["kl"]["mean"] > 0
