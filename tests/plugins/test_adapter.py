"""Bottleneck adapters: the formula by forward hooks, the pretrained start, what moves, what is saved, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from plain import EXACT, LR, apart, bert, check_accumulation, check_loss_scale, check_padding, check_restores, key
from safetensors.torch import load_file
from torch.nn import functional

import hybridengine
from hybridengine import Engine
from hybridengine.errors import ConfigError, ModelError
from hybridengine.model import layer_stacks
from hybridengine.stack import check_stack
from hybridengine.stack.resolve import as_method
from hybridengine.testing import (
    SimpleTask,
    make_batch,
    set_up,
    tiny_bert,
    tiny_checkpoint,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
)
from hybridengine_plugins.adapters.adapter import Adapter
from hybridengine_plugins.adapters.full import Full
from hybridengine_plugins.adversarial.fgm import FGM

BATCH = make_batch()
MODELS = {
    "bert": lambda: tiny_bert(num_labels=3),
    "gpt2": lambda: tiny_gpt2("AutoModelForSequenceClassification", num_labels=3, pad_token_id=0),
    "llama": lambda: tiny_llama("AutoModelForSequenceClassification", num_labels=3, pad_token_id=0),
}
LAYER = "bert.encoder.layer.{}."
BEHIND = {"houlsby": ("attention.output.dense", "output.dense"), "pfeiffer": ("output.dense",)}
FUNCTIONS = {"gelu": functional.gelu, "relu": torch.relu, "silu": functional.silu, "tanh": torch.tanh}


def logits(model, batch=BATCH):
    with torch.no_grad():
        return model.eval()(**batch.inputs).logits


class Reference:
    """A BERT with hooks behind its sublayers' output layers, descending without the engine."""

    def __init__(self, start, placement, activation):
        self.model = bert().train()
        self.values = {k: v.clone().requires_grad_() for k, v in start.items()}
        modules = dict(self.model.named_modules())
        for layer in range(2):
            for place in BEHIND[placement]:
                name = LAYER.format(layer) + place
                modules[name].register_forward_hook(self.bottleneck(f"{name}.adapter", FUNCTIONS[activation]))
        self.model.classifier.weight = torch.nn.Parameter(self.values["classifier.weight"].detach())
        self.values |= {f"classifier.{k}": p for k, p in self.model.classifier.named_parameters()}

    def bottleneck(self, name, function):
        def change(module, inputs, h):
            down, b = self.values[f"{name}.down.weight"], self.values[f"{name}.down.bias"]
            up, c = self.values[f"{name}.up.weight"], self.values[f"{name}.up.bias"]
            return h + function(h @ down.T + b) @ up.T + c

        return change

    def step(self, batch, seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            loss = functional.cross_entropy(self.model(**batch.inputs).logits, batch.targets)
        gradient = dict(zip(self.values, torch.autograd.grad(loss, list(self.values.values())), strict=True))
        with torch.no_grad():
            for name, g in gradient.items():
                self.values[name] -= LR * g
        return gradient


@pytest.mark.parametrize(("placement", "activation"), [("houlsby", "gelu"), ("pfeiffer", "tanh"), ("houlsby", "silu")])
def test_three_steps_match_the_paper(placement, activation):
    batches = [make_batch(seed=s) for s in range(3)]
    method = Adapter(placement=placement, size=5, activation=activation, std=0.3)
    bench = set_up([method], bert(), batches[0], lr=LR)
    reference = Reference(bench.parameters(), placement, activation)
    for step, batch in enumerate(batches):
        bench.step([batch])
        expected = reference.step(batch, key(step))
        assert apart({k: p.grad for k, p in bench.run.may_optimise.items()}, expected) < EXACT, step
        assert apart(bench.parameters(), {k: v.detach() for k, v in reference.values.items()}) < EXACT, step
    norm = sum(float(v.detach().square().sum()) for k, v in reference.values.items() if "up.weight" in k) ** 0.5
    assert bench.effect("adapter", "up_norm") == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("placement", BEHIND)
def test_starts_at_the_pretrained_function_and_moves_only_what_it_declares(name, placement):
    model = MODELS[name]()
    base = logits(copy.deepcopy(model))
    bench = set_up([Adapter(placement=placement, size=4)], model, BATCH, lr=0.5)
    assert torch.equal(logits(bench.run.model), base)
    head = "classifier" if name == "bert" else "score"
    assert all(".adapter." in k or k.startswith(head) for k in bench.run.may_optimise)
    assert sum(k.endswith("up.weight") for k in bench.run.may_optimise) == 2 * len(BEHIND[placement])
    before = {k: v.clone() for k, v in bench.run.model.state_dict().items()}
    bench.run.model.train()
    bench.step([BATCH])
    after = bench.run.model.state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    # At U = 0 no gradient reaches what stands below it: the first step moves U, c and the head alone.
    assert changed and all(".adapter.up." in k or k.startswith(head) for k in changed)
    bench.step([BATCH])
    assert any(".adapter.down." in k for k in before if not torch.equal(before[k], bench.run.model.state_dict()[k]))


def test_encoder_decoders_get_one_behind_cross_attention_too():
    batch = make_batch(kind="seq2seq")
    model = tiny_t5()
    base = logits(copy.deepcopy(model), batch)
    bench = set_up([Adapter(size=4)], model, batch, lr=0.1, task=SimpleTask("tokens"))
    assert torch.equal(logits(bench.run.model, batch), base)
    assert list(layer_stacks(model)) == ["encoder.block", "decoder.block"]
    assert sum(k.endswith("up.weight") for k in bench.run.may_optimise) == 2 * 2 + 2 * 3
    bench.run.model.train()
    bench.step([batch])
    assert all(float(p.grad.abs().max()) > 0 for k, p in bench.run.may_optimise.items() if "adapter.up" in k)


def test_other_families_are_found_by_the_names_of_their_parts():
    from transformers import AutoModel, BartConfig, DistilBertConfig, GPTNeoXConfig, MPNetConfig, OPTConfig

    small = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    bart = {"encoder_layers": 1, "encoder_attention_heads": 2, "decoder_layers": 2, "decoder_attention_heads": 2}
    for config, count in (
        (MPNetConfig(vocab_size=40, intermediate_size=16, **small), 4),
        (GPTNeoXConfig(vocab_size=40, intermediate_size=16, bos_token_id=0, eos_token_id=0, **small), 4),
        (DistilBertConfig(vocab_size=40, dim=8, n_layers=2, n_heads=2, hidden_dim=16), 4),
        (OPTConfig(vocab_size=40, ffn_dim=16, word_embed_proj_dim=8, **small), 4),
        (BartConfig(vocab_size=40, d_model=8, **bart), 2 + 6),
    ):
        assert len(Adapter()._places(AutoModel.from_config(config))) == count, type(config).__name__


def test_the_start_depends_on_the_seed_alone_and_leaves_the_global_stream():
    def start(seed):
        torch.randn(seed + 1)
        state = torch.random.get_rng_state()
        run = set_up([Adapter(size=3)], MODELS["bert"](), BATCH, seed=seed).run
        assert torch.equal(torch.random.get_rng_state(), state)
        return {k: p.detach().clone() for k, p in run.may_optimise.items() if "down.weight" in k}

    first, same, other = start(0), start(0), start(1)
    assert all(torch.equal(first[k], same[k]) for k in first)
    assert not any(torch.equal(first[k], other[k]) for k in first)


def test_copies_of_the_model_have_adapters_of_their_own():
    bench = set_up([Adapter(size=3)], MODELS["bert"](), BATCH, lr=0.5)
    teacher = bench.run.copy_of_model()
    before = logits(teacher)
    for _ in range(2):
        bench.step([BATCH])
    assert torch.equal(logits(teacher), before)
    assert not torch.equal(logits(bench.run.model), before)


def test_an_embedding_attack_reaches_through_the_frozen_backbone():
    bench = set_up([Adapter(size=3), FGM(epsilon=0.5)], bert(), BATCH, lr=0.1)
    bench.step([BATCH])
    assert bench.effect("fgm", "delta_norm") == pytest.approx(0.5)


def test_what_every_method_keeps():
    def stack():
        return [Adapter(size=3)]

    check_accumulation(stack)
    check_padding(stack)
    check_loss_scale(stack)
    check_restores(stack, forwards=1)


# ---- whole runs ------------------------------------------------------------------------------------------------------


def config_of(tmp_path, *more, **changes):
    """A run on a masked LM's checkpoint, which lacks a pooler: its random start must come back too."""
    base = tiny_checkpoint(tmp_path / "base", "bert", "AutoModelForMaskedLM")
    rows = [{"text": f"a {label} movie {i}", "label": label} for i in range(8) for label in ("bad", "fine", "good")]
    return {
        "task": "text-classification",
        "model": {"name": str(base)},
        "data": {"train": rows, "validation": rows[:6]},
        "train": {"max_steps": 4, "batch_size": 8, "lr": 0.05, "precision": "fp32"},
        "methods": [{"adapter": {"size": 4}}, *more],
        "output": str(tmp_path / "run"),
        **changes,
    }


@pytest.mark.parametrize(
    "more", [(), ("ema",), ({"freeze": {"patterns": ["bert.pooler*"]}},)], ids=["alone", "ema", "freeze"]
)
def test_best_holds_what_was_trained_and_predicts_to_the_bit(tmp_path, more):
    engine = Engine(config_of(tmp_path, *more))
    summary = engine.train()
    assert summary["methods"]["adapter"]["up_norm"]["last"] > 0
    loaded = hybridengine.load(tmp_path / "run")
    assert torch.equal(logits(loaded.run.model), logits(engine._run.model))
    assert loaded.predict("a good movie")[0]["prediction"] in ("bad", "fine", "good")
    best = tmp_path / "run" / "best"
    saved = load_file(best / "trained.safetensors")
    assert saved and all(".adapter." in k or k.startswith(("classifier", "bert.pooler")) for k in saved)
    assert saved.keys() >= set(engine._run.missing_parameters)  # random ones too, frozen or not
    assert not (best / "model.safetensors").exists() and not (best / "config.json").exists()
    assert "trained.safetensors" in (best / "README.md").read_text(encoding="utf-8")
    assert Engine(config_of(tmp_path, *more)).evaluate()["validation"] == summary["metrics"]["validation"]


def test_a_folder_of_another_adapter_is_refused(tmp_path):
    from hybridengine.errors import OutputError
    from hybridengine.train.adapters import load_trained

    Engine(config_of(tmp_path)).train()
    other = set_up([Adapter(size=3)], tiny_bert(num_labels=3), BATCH).run
    with pytest.raises(OutputError, match=r"another model or stack \(.*adapter.*differs\)"):
        load_trained(other, tmp_path / "run" / "best")


def test_neither_a_stage_nor_a_run_can_start_from_it(tmp_path):
    staged = config_of(tmp_path, stages=[{}, {"methods": []}])
    with pytest.raises(ConfigError, match=r"adapter cannot be merged .* last stage, or use lora .*\(stage 1\)"):
        Engine(staged)
    Engine(config_of(tmp_path, stages=[{"methods": []}, {}]))  # as the last stage it may
    Engine(config_of(tmp_path)).train()
    again = config_of(tmp_path, model={"name": str(tmp_path / "run" / "best")}, output=str(tmp_path / "again"))
    with pytest.raises(ModelError, match=r"model.name: .* cannot be merged .* name the base model"):
        Engine(again).train()


def test_refusals():
    with pytest.raises(ModelError, match=r"0 \(BertLayer\) has no output layer of its attention named o_proj.*query"):
        set_up([Adapter(attention=["o_proj"])], tiny_bert(num_labels=3), BATCH)
    with pytest.raises(ModelError, match=r"of its feedforward named wo; .*`feedforward: \[...\]`, or use lora"):
        set_up([Adapter(feedforward=["wo"])], tiny_bert(num_labels=3), BATCH)
    with pytest.raises(ModelError, match=r"no stack of layers .* use lora"):
        Adapter()._places(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    with pytest.raises(ModelError, match=r"no module 'score'; change `heads`"):
        set_up([Adapter(heads=["score"])], tiny_bert(num_labels=3), BATCH)
    (problem,) = check_stack([as_method(Full()), as_method(Adapter())], set())
    assert "full" in problem and "adapter" in problem and "remove" in problem
