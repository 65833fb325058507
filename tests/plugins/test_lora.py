"""LoRA: start at the pretrained function, move declared parameters only, merge, save and load."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import AutoPeftModel, AutoPeftModelForCausalLM, PeftModel

from hybridengine.errors import ModelError
from hybridengine.seams import View
from hybridengine.stack import check_stack
from hybridengine.stack.resolve import as_method
from hybridengine.testing import make_batch, set_up, tiny_bert, tiny_checkpoint, tiny_gpt2, tiny_llama, tiny_t5
from hybridengine_plugins.adapters.full import Full
from hybridengine_plugins.adapters.lora import LoRA

BATCH = make_batch()
MODELS = {
    "bert": lambda: tiny_bert(num_labels=3),
    "gpt2": lambda: tiny_gpt2("AutoModelForSequenceClassification", num_labels=3, pad_token_id=0),
    "llama": lambda: tiny_llama("AutoModelForSequenceClassification", num_labels=3, pad_token_id=0),
}


def _logits(model, batch=BATCH):
    with torch.no_grad():
        return model.eval()(**batch.inputs).logits


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("targets", [None, ["all"]])
def test_starts_at_the_pretrained_function_and_moves_only_what_it_declares(name, targets):
    model = MODELS[name]().double()
    base = _logits(copy.deepcopy(model))
    if targets:
        endings = {"bert": ["dense", "query"], "gpt2": ["c_fc", "c_proj"], "llama": ["down_proj"]}
        targets = endings[name]
    bench = set_up([LoRA(r=2, targets=targets)], model, BATCH, lr=0.5)
    assert torch.equal(_logits(bench.run.model), base)
    head = "classifier" if name == "bert" else "score"
    assert all("lora_" in k or f"{head}.modules_to_save" in k for k in bench.run.may_optimise)
    before = {k: v.clone() for k, v in bench.run.model.state_dict().items()}
    bench.run.model.train()
    bench.step([BATCH])
    after = bench.run.model.state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    # At B = 0 the gradient of A is exactly 0: the first step moves B and the head alone.
    assert changed and all("lora_B" in k or f"{head}.modules_to_save" in k for k in changed)
    bench.step([BATCH])
    assert any("lora_A" in k for k in before if not torch.equal(before[k], bench.run.model.state_dict()[k]))


def test_the_random_start_leaves_the_callers_generators_alone(monkeypatch):
    """`torch.manual_seed` seeds every GPU as well, at once or as soon as there is a context."""
    touched, models = [], [tiny_bert(num_labels=3) for _ in range(2)]
    monkeypatch.setattr(torch.cuda, "manual_seed_all", touched.append)
    before = torch.get_rng_state()
    starts = [set_up([LoRA(r=2)], model, BATCH).parameters() for model in models]
    assert touched == []
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(start, starts[1][name]) for name, start in starts[0].items())


@pytest.mark.parametrize("name", MODELS)
def test_merged_equals_unmerged(name):
    bench = set_up([LoRA(r=2, alpha=3)], MODELS[name]().double(), BATCH, lr=0.5)
    for _ in range(3):
        bench.step([BATCH])
    adapted = _logits(bench.run.model)
    merged = _logits(copy.deepcopy(bench.run.model).merge_and_unload())
    # fp64: W x + s B (A x) against (W + s B A) x differ by rounding alone
    torch.testing.assert_close(merged, adapted, rtol=1e-10, atol=1e-10)


def test_the_update_is_alpha_over_r_times_b_a():
    bench = set_up([LoRA(r=2, alpha=6)], MODELS["bert"]().double(), BATCH, lr=0.5)
    bench.step([BATCH])
    layer = bench.run.model.get_submodule("base_model.model.bert.encoder.layer.0.attention.self.query")
    expected = 3.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(layer.get_delta_weight("default"), expected)
    assert float(expected.detach().norm()) > 0


def test_the_start_depends_on_the_seed_alone_and_leaves_the_global_stream():
    def start(seed):
        torch.randn(seed + 1)
        state = torch.random.get_rng_state()
        run = set_up([LoRA(r=2)], MODELS["bert"](), BATCH, seed=seed).run
        assert torch.equal(torch.random.get_rng_state(), state)
        return {k: p.detach().clone() for k, p in run.may_optimise.items() if "lora_A" in k}

    first, same, other = start(0), start(0), start(1)
    assert all(torch.equal(first[k], same[k]) for k in first)
    assert not any(torch.equal(first[k], other[k]) for k in first)


def test_a_saved_adapter_loads_with_peft_alone(tmp_path):
    folder = tiny_checkpoint(tmp_path / "base", num_labels=3)
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder)
    bench = set_up([LoRA(r=2)], model, BATCH, lr=0.5)
    for _ in range(2):
        bench.step([BATCH])
    bench.run.model.save_pretrained(tmp_path / "best")
    expected = _logits(bench.run.model)
    base = AutoModelForSequenceClassification.from_pretrained(folder)
    assert torch.equal(_logits(PeftModel.from_pretrained(base, tmp_path / "best")), expected)
    from peft import AutoPeftModelForSequenceClassification as Auto

    assert torch.equal(_logits(Auto.from_pretrained(tmp_path / "best", num_labels=3)), expected)


def test_what_the_checkpoint_lacks_is_trained_and_saved(tmp_path):
    """A masked LM's checkpoint has no pooler: its random start must not be lost, or the adapter would not load."""
    from hybridengine.config import ModelConfig
    from hybridengine.model.loading import load_model

    folder = tiny_checkpoint(tmp_path / "base", "bert", "AutoModelForMaskedLM")
    load = ("AutoModelForSequenceClassification", ModelConfig(name=str(folder)), {"num_labels": 3})
    model, missing = load_model(*load, seed=1)

    def prepare(run):
        run.missing_parameters = missing

    bench = set_up([LoRA(r=2)], model, BATCH, lr=0.5, prepare=prepare)
    assert any("pooler.modules_to_save" in name for name in bench.run.may_optimise)
    bench.step([BATCH])
    bench.run.model.save_pretrained(tmp_path / "best")
    elsewhere, _ = load_model(*load, seed=2)
    assert torch.equal(_logits(PeftModel.from_pretrained(elsewhere, tmp_path / "best")), _logits(bench.run.model))


@pytest.mark.parametrize(
    ("architecture", "head", "auto"),
    [("llama", "AutoModelForCausalLM", AutoPeftModelForCausalLM), ("bert", "AutoModelForMaskedLM", AutoPeftModel)],
)
def test_language_models_keep_their_pretrained_head(tmp_path, architecture, head, auto):
    import transformers

    folder = tiny_checkpoint(tmp_path / "base", architecture, head)
    model = getattr(transformers, head).from_pretrained(folder)
    run = set_up([LoRA(r=2)], model, BATCH).run
    assert all("lora_" in k for k in run.may_optimise)
    for name, p in run.may_optimise.items():
        torch.nn.init.constant_(p, 0.1) if "lora_B" in name else None
    run.model.save_pretrained(tmp_path / "best")
    assert torch.equal(_logits(auto.from_pretrained(tmp_path / "best")), _logits(run.model))


def test_encoder_decoders_train_through_lora():
    batch = make_batch(kind="seq2seq")
    from hybridengine.testing import SimpleTask

    bench = set_up([LoRA(r=2)], tiny_t5(), batch, lr=0.1, task=SimpleTask("tokens"))
    before = bench.parameters()
    bench.step([batch])
    assert any(not torch.equal(before[k], p) for k, p in bench.parameters().items())


def test_models_that_peft_does_not_know_get_all_linear_layers_below_the_head():
    model = tiny_bert(num_labels=3)
    model.config.model_type = "unheard-of"
    run = set_up([LoRA(r=2)], model, BATCH).run
    adapted = {k.split(".lora_")[0].removeprefix("base_model.model.") for k in run.may_optimise if "lora_" in k}
    linear = {k for k, m in tiny_bert(num_labels=3).named_modules() if isinstance(m, torch.nn.Linear)}
    assert adapted == linear - {"classifier"}


def test_dropout_of_its_own_gives_rdrop_something_to_compare():
    assert LoRA(dropout=0.1).also_provides() == ("dropout",)
    assert LoRA().also_provides() == ()
    bench = set_up([LoRA(r=2, dropout=0.5)], tiny_bert(num_labels=3), BATCH, lr=0.5)
    bench.step([BATCH])
    views = [View(key=1), View(key=1), View(key=2)]
    same, again, other = (out.logits for out in bench.ctx.outputs(BATCH, views))
    assert torch.equal(same, again) and not torch.equal(same, other)


def test_refusals():
    with pytest.raises(ModelError, match=r"no layer .*'q_proj'.*query"):
        set_up([LoRA(targets=["q_proj"])], tiny_bert(num_labels=3), BATCH)
    (problem,) = check_stack([as_method(Full()), as_method(LoRA())], set())
    assert "full" in problem and "lora" in problem and "remove" in problem
