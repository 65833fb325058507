"""Prefixes in attention: against a cache of transformers and a patched attention, padded or not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from plain import EXACT, LR, check_accumulation, check_padding
from torch.nn import functional
from transformers import DynamicCache

import hybridengine
from hybridengine.engine import Engine
from hybridengine.errors import ConfigError, ModelError
from hybridengine.seams import View
from hybridengine.seams.first_position import FirstPosition
from hybridengine.testing import make_batch, set_up, tiny_bert, tiny_checkpoint, tiny_gpt2, tiny_llama, tiny_t5
from hybridengine_plugins.prompts.prefix_tuning import PrefixTuning, PTuningV2

N = 3
CLASSIFIER = "AutoModelForSequenceClassification"
CAUSAL = {
    "gpt2": lambda: tiny_gpt2("AutoModelForCausalLM", resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
    "llama": lambda: tiny_llama("AutoModelForCausalLM"),
}
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _bert():
    return tiny_bert(num_labels=3, **QUIET).double()


def _outputs(bench, **inputs):
    """The model's own call: hooks, views and all."""
    bench.run.model.eval()
    with torch.no_grad():
        return bench.run.model(**inputs).logits


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", CAUSAL)
def test_a_decoder_computes_what_a_cache_of_prefixes_gives(name, side):
    """Transformers' own cache holds the same keys and values; positions are the text's own."""
    bench = set_up([PTuningV2(n=N)], CAUSAL[name]().double(), make_batch())
    vectors = bench.run.modules["p-tuning-v2"].vectors.detach()
    rows = [[5, 6, 7, 8], [9, 10]]
    longest = max(map(len, rows))
    real = [[1] * len(row) for row in rows]
    pad = [[0] * (longest - len(row)) for row in rows]
    order = (lambda row, p: row + p) if side == "right" else (lambda row, p: p + row)
    ids = torch.tensor([order(row, p) for row, p in zip(rows, pad, strict=True)])
    mask = torch.tensor([order(row, p) for row, p in zip(real, pad, strict=True)])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    found = _outputs(bench, input_ids=ids, attention_mask=mask, position_ids=positions)
    plain = CAUSAL[name]().double().eval()
    cache = DynamicCache()
    for index, (keys, values) in enumerate(vectors):
        cache.update(keys.expand(2, -1, -1, -1), values.expand(2, -1, -1, -1), index)
    longer = torch.cat([torch.ones(2, N, dtype=torch.long), mask], 1)
    with torch.no_grad():
        expected = plain(input_ids=ids, attention_mask=longer, position_ids=positions, past_key_values=cache).logits
    assert (found - expected)[mask.bool()].abs().max() < EXACT


def _patched(vectors):
    """Torch's attention with the prefix of the n-th call before keys and values."""
    calls, whole = iter(range(len(vectors))), functional.scaled_dot_product_attention

    def attend(query, key, value, attn_mask=None, **options):
        keys, values = vectors[next(calls)]
        rows = key.shape[0]
        key = torch.cat([keys.expand(rows, -1, -1, -1), key], 2)
        value = torch.cat([values.expand(rows, -1, -1, -1), value], 2)
        if attn_mask is not None:
            fill = torch.ones if attn_mask.dtype == torch.bool else torch.zeros
            attn_mask = torch.cat([fill(*attn_mask.shape[:3], N, dtype=attn_mask.dtype), attn_mask], 3)
        return whole(query, key, value, attn_mask=attn_mask, **{**options, "is_causal": False})

    return attend


def test_three_steps_of_an_encoder_equal_patched_attention(monkeypatch):
    batch = make_batch()
    bench = set_up([PTuningV2(n=N)], _bert(), batch, lr=LR)
    vectors = bench.run.modules["p-tuning-v2"].vectors.detach().clone().requires_grad_(True)
    model = _bert().train()
    heads = {k: p for k, p in model.named_parameters() if k.startswith("classifier")}
    for _ in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(functional, "scaled_dot_product_attention", _patched(vectors))
            loss = functional.cross_entropy(model(**batch.inputs).logits, batch.targets)
            grads = torch.autograd.grad(loss, [vectors, *heads.values()])
        with torch.no_grad():
            for p, g in zip([vectors, *heads.values()], grads, strict=True):
                p -= LR * g
        bench.step([batch])
    assert (bench.run.modules["p-tuning-v2"].vectors - vectors).abs().max() < EXACT
    now = dict(bench.run.model.named_parameters())
    assert all((now[k] - p).abs().max() < EXACT for k, p in model.named_parameters())


def test_encoder_decoders_have_a_prefix_in_every_attention():
    model = tiny_t5(dropout_rate=0.0).double()
    batch = make_batch()
    batch = replace(batch, inputs={**batch.inputs, "decoder_input_ids": batch.inputs["input_ids"] + 1})
    bench = set_up([PTuningV2(n=N)], model, batch)
    vectors = bench.run.modules["p-tuning-v2"].vectors.detach()
    layers = model.config.num_layers + 2 * model.config.num_decoder_layers
    assert vectors.shape[:2] == (layers, 2) and bench.run.modules["p-tuning-v2"].vectors.requires_grad
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 1]]), "decoder_input_ids": torch.tensor([[0, 8, 9]])}
    found = _outputs(bench, **inputs)
    assert not torch.allclose(found, tiny_t5(dropout_rate=0.0).double().eval()(**inputs).logits)
    wider = {**inputs, "input_ids": torch.tensor([[5, 6, 7, 1, 0, 0]])}
    wider["attention_mask"] = (wider["input_ids"] != 0).long()
    assert (_outputs(bench, **wider) - found).abs().max() < EXACT


def test_generation_of_an_encoder_decoder_sees_the_prefix() -> None:
    """Greedy steps by hand, through the model's own forward."""
    batch = make_batch()
    batch = replace(batch, inputs={**batch.inputs, "decoder_input_ids": batch.inputs["input_ids"] + 1})
    bench = set_up([PTuningV2(n=N)], tiny_t5(dropout_rate=0.0).double(), batch)
    model = bench.run.model.eval()
    ids = torch.tensor([[5, 6, 7, 1]])
    made = torch.tensor([[model.config.decoder_start_token_id]])
    found = model.generate(input_ids=ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, num_beams=1)
    with torch.no_grad():
        for _ in range(4):
            scores = model(input_ids=ids, decoder_input_ids=made).logits[:, -1]
            scores[:, model.config.eos_token_id] = -torch.inf
            made = torch.cat([made, scores.argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, made)


def test_the_network_of_prefix_tuning_starts_silent_and_trains():
    batch = make_batch()
    bench = set_up([PrefixTuning(n=N, hidden=8)], _bert(), batch, lr=LR)
    module = bench.run.modules["prefix-tuning"]
    assert torch.equal(module(), module.vectors)
    before = {k: p.detach().clone() for k, p in module.named_parameters()}
    for _ in range(2):
        bench.step([batch])
    assert all(not torch.equal(before[k], p) for k, p in module.named_parameters())


def test_accumulation_and_padding():
    for plugin in (lambda: PTuningV2(n=N), lambda: PrefixTuning(n=N, hidden=8)):
        check_accumulation(lambda plugin=plugin: [plugin()])
        check_padding(lambda plugin=plugin: [plugin()])


def test_training_computes_the_last_layer_whole():
    """The short road to position 0 has attention of its own, which knows no prefix."""
    bench = set_up([PTuningV2(n=N)], _bert(), make_batch())
    assert FirstPosition.find(_bert(), make_batch().inputs) is not None
    assert FirstPosition.find(bench.run.model, make_batch().inputs) is None


def test_views_reach_the_prefix():
    batch = make_batch()
    bench = set_up([PTuningV2(n=N)], _bert(), batch)
    (name,) = [k for k in bench.run.adapted() if k.startswith("p-tuning-v2/")]
    moved = {**bench.run.adapted(), name: bench.run.adapted()[name] + 1.0}
    plain, other = bench.ctx.outputs(batch, [View(key=0), View(key=0, params=moved)])
    assert not torch.allclose(plain.scores, other.scores)


@pytest.mark.parametrize("method", ["prefix-tuning", "p-tuning-v2"])
@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_a_run_trains_saves_and_reloads(method, architecture, tmp_path):
    options = {"num_labels": 2, **({"pad_token_id": 0} if architecture == "llama" else DROPOUT)}
    folder = tiny_checkpoint(tmp_path / "base", architecture, CLASSIFIER, **options)
    rows = [{"text": text, "label": str("bad" in text)} for text in ["good film", "bad", "very good", "bad , bad"] * 2]
    config = {
        "model": {"name": str(folder)},
        "task": "text-classification",
        "data": {"train": rows, "validation": rows[:4]},
        "methods": [{method: {"n": 4}}, {"lora": {"r": 2}}, "fgm", "rdrop" if architecture == "bert" else "r3f"],
        "train": {"lr": 0.01, "epochs": 1, "batch_size": 4, "precision": "fp32", "max_length": 32},
        "output": str(tmp_path / "run"),
    }
    Engine(config).train()
    predictor = hybridengine.load(tmp_path / "run")
    stored = (tmp_path / "run/predictions.jsonl").read_text()
    for record in predictor.predict([row["text"] for row in rows[:4]]):
        assert all(f"{value}" in stored for value in record["probabilities"].values())


def test_attention_of_its_own_is_refused():
    model = _bert()
    model.set_attn_implementation = lambda name: None
    with pytest.raises(ModelError, match="attention by code of its own"):
        set_up([PTuningV2()], model, make_batch())
    with pytest.raises(ConfigError, match=r"train\.compile"):
        set_up([PTuningV2()], _bert(), make_batch(), compile=True)
