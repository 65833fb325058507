"""Layer-wise rates, and the levels they go by, on every architecture of the test models."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hybridengine.errors import ModelError
from hybridengine.plugin import ParamGroup, parameter_levels
from hybridengine.testing import make_batch, set_up, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from hybridengine_plugins.adapters.lora import LoRA
from hybridengine_plugins.optim.llrd import LLRD
from hybridengine_plugins.optim.weight_decay import WeightDecay


def _run(model, plugins=(), kind="rows"):
    return set_up(list(plugins), model, make_batch(kind=kind)).run


def _rates(groups):
    return {name: group.options["lr"] for group in groups for name in group.parameters}


def test_rates_of_bert_by_hand():
    run = _run(tiny_bert(num_labels=3))
    run.config.train.lr = 1.0
    rates = _rates(LLRD(decay=0.5).transform_param_groups(run, [ParamGroup(dict(run.may_optimise))]))
    assert sorted(rates) == sorted(run.may_optimise)
    for name, rate in rates.items():
        if name.startswith(("classifier", "bert.pooler")):
            assert rate == 1.0, name
        elif ".layer.1." in name:
            assert rate == 0.5, name
        elif ".layer.0." in name:
            assert rate == 0.25, name
        else:
            assert name.startswith("bert.embeddings") and rate == 0.125, name


@pytest.mark.parametrize(
    ("model", "bottom", "first", "above"),
    [
        (
            lambda: tiny_gpt2("AutoModelForSequenceClassification"),
            "transformer.wpe",
            "transformer.h.0",
            "transformer.ln_f",
        ),
        (
            lambda: tiny_llama("AutoModelForSequenceClassification"),
            "model.embed_tokens",
            "model.layers.0",
            "model.norm",
        ),
        (tiny_t5, "shared", "decoder.block.0.layer.1", "decoder.final_layer_norm"),
        (lambda: tiny_bert("AutoModelForMaskedLM"), "bert.embeddings", "bert.encoder.layer.0", "cls"),
    ],
)
def test_levels(model, bottom, first, above):
    levels, top = parameter_levels(model(), ("score*",))
    assert top == 3
    for name, level in levels.items():
        for prefix, expected in ((bottom, 0), (first, 1), (first.replace(".0", ".1", 1), 2), (above, 3), ("score", 3)):
            if name.startswith(f"{prefix}."):
                assert level == expected, name
    assert set(levels.values()) == {0, 1, 2, 3}


def test_levels_see_through_lora():
    run = _run(tiny_bert(num_labels=3), [LoRA(r=2)])
    levels, top = parameter_levels(run.model, run.task.head)
    trained = {levels[name] for name in run.may_optimise}
    assert top == 3
    assert trained == {1, 2, 3}


def test_a_group_keeps_its_options_and_scales_its_own_rate():
    run = _run(tiny_bert(num_labels=3))
    groups = [ParamGroup(dict(run.may_optimise), lr=8.0)]
    groups = LLRD(decay=0.5).transform_param_groups(run, WeightDecay(value=0.3).transform_param_groups(run, groups))
    rates = _rates(groups)
    assert rates["classifier.weight"] == 8.0
    assert rates["bert.embeddings.word_embeddings.weight"] == 1.0
    decays = {name: group.options["weight_decay"] for group in groups for name in group.parameters}
    assert all(decays[name] == (0.3 if p.dim() >= 2 else 0.0) for name, p in run.may_optimise.items())


def test_run_modules_train_at_the_full_rate():
    run = _run(tiny_bert(num_labels=3))
    run.config.train.lr = 1.0
    groups = [ParamGroup({**run.may_optimise, "prompt/weight": nn.Parameter(torch.zeros(2, 2))})]
    assert _rates(LLRD().transform_param_groups(run, groups))["prompt/weight"] == 1.0


def test_refuses_a_model_without_layers():
    run = _run(tiny_bert(num_labels=3))
    run.model = nn.Sequential()
    run.model.add_module("classifier", nn.Linear(2, 2))
    with pytest.raises(ModelError, match="layer number"):
        LLRD().transform_param_groups(run, [ParamGroup(dict(run.model.named_parameters()))])
