"""LayerDrop: layers left out by hand, one draw a view, all layers in evaluation, smaller models that load again."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from plain import EXACT, LR, Plain, apart, bert, check_loss_scale, check_padding, check_restores, gradients, key

import hybridengine
from hybridengine import Engine
from hybridengine.errors import ModelError
from hybridengine.model import layer_stacks
from hybridengine.plugin import StackView
from hybridengine.seams import View
from hybridengine.seams.first_position import FirstPosition
from hybridengine.stack.resolve import as_method
from hybridengine.testing import (
    SimpleTask,
    make_batch,
    set_up,
    tiny_bert,
    tiny_checkpoint,
    tiny_config,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
)
from hybridengine_plugins.adapters.adapter import Adapter
from hybridengine_plugins.adapters.lora import LoRA
from hybridengine_plugins.adversarial.sam import SAM
from hybridengine_plugins.regularize.layer_drop import LayerDrop
from hybridengine_plugins.regularize.rdrop import RDrop

BATCH = make_batch()
LAYERS = 4


def model_of(dropout=0.1):
    return bert(dropout, num_hidden_layers=LAYERS)


def logits(model, batch=BATCH):
    with torch.no_grad():
        return model.eval()(**batch.inputs).logits


class Dropping(Plain):
    """A BERT whose encoder is a loop that throws a coin before each layer."""

    def __init__(self, model, p):
        super().__init__(model)
        self.dropped = []

        def encode(hidden, attention_mask=None, *args, **options):
            for number, layer in enumerate(model.bert.encoder.layer):
                if torch.rand(()) < p:
                    self.dropped.append(number)
                else:
                    hidden = layer(hidden, attention_mask)
            return SimpleNamespace(last_hidden_state=hidden, hidden_states=None, attentions=None, cache=None)

        model.bert.encoder.forward = encode


@pytest.mark.parametrize("p", [0.3, 0.7])
def test_three_steps_match_the_paper(p):
    batches = [make_batch(seed=s) for s in range(3)]
    bench = set_up([LayerDrop(p=p)], model_of(), batches[0], lr=LR)
    plain = Dropping(model_of(), p)
    for step, batch in enumerate(batches):
        bench.step([batch])
        plain.dropped.clear()
        gradient = plain.gradient(plain.loss(batch, key(step)))
        ours = {k: q.grad for k, q in bench.run.may_optimise.items() if q.grad is not None}
        assert apart(ours, gradient) < EXACT, step
        plain.descend(gradient)
        assert apart(bench.parameters(), {k: q.detach() for k, q in plain.parameters.items()}) < EXACT, step
        assert bench.effect("layer-drop", "dropped") == len(plain.dropped)
        assert bench.effect("layer-drop", "at_stake") == LAYERS


def test_p_zero_is_plain_training():
    plain = gradients(lambda: [], [BATCH], model_of())
    silent = gradients(lambda: [LayerDrop(p=0.0)], [BATCH], model_of())
    assert silent.keys() == plain.keys() and all(torch.equal(silent[k], plain[k]) for k in plain)


def test_layers_are_dropped_as_often_as_asked():
    bench = set_up([LayerDrop(p=0.3)], model_of(0.0), BATCH)
    total = 0
    for _ in range(250):
        bench.step([BATCH])
        total += bench.effect("layer-drop", "dropped")
    # 1000 coins: the share has a standard deviation of 0.0145
    assert abs(total / 1000 - 0.3) < 4 * 0.0145


def test_evaluation_uses_every_layer():
    base = logits(model_of())
    bench = set_up([LayerDrop(p=0.9)], model_of(), BATCH)
    with bench.evaluation():
        assert torch.equal(logits(bench.run.model), base)
    assert torch.equal(logits(bench.run.copy_of_model()), base)


# ---- draws follow the key, one for each view -------------------------------------------------------------------------


def test_equal_keys_drop_equal_layers_and_forks_others():
    bench = set_up([LayerDrop(p=0.5)], model_of(0.0), BATCH)
    ctx = bench.ctx
    same, again = (ctx.outputs(BATCH, [View(key=1)])[0].logits for _ in range(2))
    assert torch.equal(same, again)
    others = [ctx.outputs(BATCH, [View(key=1).fork(i)])[0].logits for i in range(8)]
    assert any(not torch.equal(same, other) for other in others)


def test_two_views_are_never_stacked_into_one_draw():
    bench = set_up([LayerDrop(p=0.5), RDrop()], model_of(0.0), BATCH, stack_views=True)
    assert not bench.ctx.stack_views
    bench.step([BATCH])
    assert bench.ctx.trace.text().startswith("F4 F4")
    # Without any other dropout the passes differ by their layers alone.
    assert bench.effect("rdrop", "kl") > 0


def test_both_passes_of_sam_leave_out_the_same_layers():
    method = LayerDrop(p=0.5)
    bench = set_up([method, SAM(rho=0.1)], model_of(), BATCH)
    drawn = []
    draw = method._draw
    method._draw = lambda: drawn.append(draw()) or drawn[-1]
    for _ in range(3):
        drawn.clear()
        bench.step([BATCH])
        assert len(drawn) == 2 * LAYERS and drawn[:LAYERS] == drawn[LAYERS:]


def test_recomputed_layers_are_those_of_the_pass():
    plain = gradients(lambda: [LayerDrop(p=0.5)], [BATCH], model_of())
    model = model_of()
    model.activation_checkpointing_enable()
    recomputed = gradients(lambda: [LayerDrop(p=0.5)], [BATCH], model)
    assert recomputed.keys() == plain.keys() and len(plain) < len(dict(model.named_parameters()))
    assert apart(recomputed, plain) < EXACT


@pytest.mark.parametrize("second_order", [False, True])
def test_where_all_that_trains_was_left_out_the_gradient_is_zero(second_order):
    batch = make_batch(kind="seq2seq")
    method = LayerDrop(p=0.5)
    bench = set_up([LoRA(r=2), method], tiny_t5(), batch, lr=0.1, task=SimpleTask("tokens"))
    method._draw = lambda: True
    before = bench.parameters()
    bench.step([batch])
    assert all(torch.equal(p, before[k]) for k, p in bench.parameters().items())
    assert all(float(p.grad.abs().max()) == 0 for p in bench.run.may_optimise.values())
    if second_order:  # in an inner loop the leaves are the view's
        params = {k: p.detach().requires_grad_() for k, p in bench.run.adapted().items()}
        (value, _), *_ = bench.ctx.task_loss(batch, View(params=params, key=0)).terms.values()
        (gradient, *_) = bench.ctx.grad(value, list(params.values()), create_graph=True)
        assert float(gradient.abs().max()) == 0


def test_the_shortcut_through_the_last_layer_stands_aside():
    """It would compute that layer whether dropped or not. Modules inside the layer it runs as they are."""
    for methods, found in (([], True), ([Adapter(size=2)], True), ([LayerDrop(p=0.5)], False)):
        bench = set_up(methods, tiny_bert(num_labels=3), BATCH)
        assert (FirstPosition.find(bench.run.model, BATCH.inputs) is not None) == found


def test_what_every_method_keeps():
    def stack():
        return [LayerDrop(p=0.5)]

    check_padding(stack)
    check_loss_scale(stack)
    check_restores(stack, forwards=1)


@pytest.mark.parametrize("dropped", [(0,), (1,), (0, 3), (2,), (0, 1, 2, 3)])
def test_t5_hands_its_position_bias_on(dropped):
    """Blocks 0 and 1 are the encoder's, 2 and 3 the decoder's; the first of each makes the bias of both."""
    batch = make_batch(kind="seq2seq")
    reference = tiny_t5().double()
    for number in dropped:
        stack = (reference.encoder, reference.decoder)[number // 2]
        block = stack.block[number % 2]

        def through(hidden, *args, block=block, whole=block.forward, **options):
            return (hidden, *whole(hidden, *args, **options)[1:])

        block.forward = through
    method = LayerDrop(p=0.5)
    model = set_up([method], tiny_t5().double(), batch, task=SimpleTask("tokens")).run.model
    coins = iter(number in dropped for number in range(4))
    method._draw = lambda: next(coins)
    ours = model.train()(**batch.inputs).logits
    assert torch.equal(ours, reference.train()(**batch.inputs).logits)
    assert next(coins, None) is None


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_decoders_go_on_from_the_states_they_had(make):
    method = LayerDrop(p=0.5)
    cut = make(**{"n_layer" if make is tiny_gpt2 else "num_hidden_layers": 3})
    shorter = copy.deepcopy(cut)
    (name,) = layer_stacks(cut)
    shorter.set_submodule(name, torch.nn.ModuleList(layer_stacks(shorter)[name][1:]))
    for number, layer in enumerate(layer_stacks(shorter)[name]):
        (layer.attn if make is tiny_gpt2 else layer.self_attn).layer_idx = number
    shorter.config.num_hidden_layers = 2
    model = set_up([method], cut, BATCH, task=SimpleTask("tokens")).run.model
    coins = iter([True, False, False])
    method._draw = lambda: next(coins)
    assert torch.equal(model.train()(**BATCH.inputs).logits, shorter.train()(**BATCH.inputs).logits)


# ---- smaller models --------------------------------------------------------------------------------------------------

FAMILIES = {
    "bert": (lambda: tiny_bert(num_labels=3, num_hidden_layers=5), {"num_hidden_layers": 3}, [0, 2, 4]),
    "gpt2": (
        lambda: tiny_gpt2("AutoModelForSequenceClassification", num_labels=3, pad_token_id=0, n_layer=4),
        {"n_layer": 2},
        [0, 2],
    ),
    "llama": (
        lambda: tiny_llama("AutoModelForSequenceClassification", num_labels=3, pad_token_id=0, num_hidden_layers=3),
        {"num_hidden_layers": 2},
        [0, 2],
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_other_layer_is_kept_with_its_weights(name):
    make, config, numbers = FAMILIES[name]
    whole = make().state_dict()
    model = set_up([LayerDrop(p=0.0, keep=2)], make(), BATCH).run.model
    ((stack, layers),) = layer_stacks(model).items()
    assert len(layers) == len(numbers) and {k: getattr(model.config, k) for k in config} == config
    for new, old in enumerate(numbers):
        for key_, value in layers[new].state_dict().items():
            assert torch.equal(value, whole[f"{stack}.{old}.{key_}"])
    assert {m.layer_idx for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int)} <= {
        *range(len(numbers))
    }
    twin = type(model)(copy.deepcopy(model.config))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(logits(twin), logits(model))


def config_of(tmp_path, *methods, architecture="bert", rows=None, **changes):
    many = {"bert": {"num_hidden_layers": 4}, "t5": {"num_layers": 4, "num_decoder_layers": 3}}
    base = tiny_checkpoint(tmp_path / "base", architecture, **many.get(architecture, {}))
    rows = rows or [
        {"text": f"a {label} movie {i}", "label": label} for i in range(8) for label in ("bad", "fine", "good")
    ]
    return {
        "task": "text-classification",
        "model": {"name": str(base)},
        "data": {"train": rows, "validation": rows[:6]},
        "train": {"max_steps": 3, "batch_size": 8, "lr": 0.01, "precision": "fp32"},
        "methods": list(methods),
        "output": str(tmp_path / "run"),
        **changes,
    }


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_a_cut_model_is_saved_loaded_and_trained_on(tmp_path, p):
    config = config_of(tmp_path, {"layer-drop": {"p": p, "keep": 2}})
    engine = Engine(config)
    summary = engine.train()
    assert "layer-drop: 2 of 4 layers are kept" in summary["notes"]
    assert summary["methods"]["layer-drop"]["at_stake"]["mean"] == 2 + (2 if p else 0)
    loaded = hybridengine.load(tmp_path / "run")
    assert loaded.run.model.config.num_hidden_layers == 2
    assert torch.equal(logits(loaded.run.model), logits(engine._run.model))
    again = {**config, "model": {"name": str(tmp_path / "run" / "best")}, "methods": [], "output": str(tmp_path / "b")}
    assert Engine(again).train()["parameters"]["total"] == summary["parameters"]["total"]


def test_a_cut_encoder_decoder_generates_what_it_did_in_training(tmp_path):
    rows = [{"text": f"a {w} movie {i}", "summary": w} for i in range(8) for w in ("bad", "fine", "good")]
    config = config_of(
        tmp_path, {"layer-drop": {"p": 0.5, "keep": 2}}, architecture="t5", rows=rows,
        task={"summarization": {"max_new_tokens": 4}},
    )  # fmt: skip
    engine = Engine(config)
    engine.train()
    loaded = hybridengine.load(tmp_path / "run")
    told = loaded.run.model.config
    assert (told.num_layers, told.num_decoder_layers) == (2, 2)
    batch = make_batch(kind="seq2seq")
    assert torch.equal(logits(loaded.run.model, batch), logits(engine._run.model, batch))
    inputs = {"input_ids": batch.inputs["input_ids"], "max_new_tokens": 4}
    assert torch.equal(loaded.run.model.generate(**inputs), engine._run.model.generate(**inputs))
    cacheless = loaded.run.model.generate(**inputs, use_cache=False)
    assert torch.equal(loaded.run.model.generate(**inputs), cacheless)


def test_rdrop_has_something_to_compare_on_a_model_without_dropout(tmp_path):
    summary = Engine(config_of(tmp_path, {"layer-drop": {"p": 0.5}}, "rdrop")).train()
    assert summary["methods"]["rdrop"]["kl"]["mean"] > 0


def test_refusals():
    def problems(*plugins, **train):
        methods = [as_method(p) for p in plugins]
        return plugins[0].check_stack(StackView(methods, {"config": tiny_config(**train)}))

    (problem,) = problems(LayerDrop(), compile=True)
    assert "compiled model" in problem and "train.compile: false" in problem
    (problem,) = problems(LayerDrop(keep=2), LoRA())
    assert "lora" in problem and "`stages`, or remove lora" in problem
    assert problems(LayerDrop(), LoRA()) == problems(LayerDrop(p=0.0), compile=True) == []
    with pytest.raises(ModelError, match="one layer, so there is none to cut; set keep to 1"):
        set_up([LayerDrop(keep=2)], tiny_bert(num_hidden_layers=1), BATCH)
    with pytest.raises(ModelError, match=r"no stack of layers .* remove layer-drop"):
        LayerDrop().transform_model(None, torch.nn.Linear(2, 2))
    strange = tiny_bert(num_labels=3)
    strange.bert.encoder.more = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    with pytest.raises(ModelError, match="does not tell its number of layers; set keep to 1"):
        set_up([LayerDrop(keep=2)], strange, BATCH)
