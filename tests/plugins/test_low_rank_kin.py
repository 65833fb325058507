"""`rslora`, `dora`, `lora-plus`, `ia3`, `vera` and `peft`: each against its formula for the effective weight."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from peft import PeftModel
from plain import EXACT, LR, apart, bert
from torch.func import functional_call
from torch.nn import functional

from hybridengine.errors import ConfigError, ModelError
from hybridengine.plugin import ParamGroup
from hybridengine.testing import make_batch, set_up, tiny_bert, tiny_gpt2, tiny_llama
from hybridengine_plugins.adapters.ia3 import IA3
from hybridengine_plugins.adapters.lora import DoRA, LoRA, LoRAPlus, RsLoRA
from hybridengine_plugins.adapters.peft import Peft
from hybridengine_plugins.adapters.vera import VeRA

BATCH = make_batch()
QUERY = ["query", "output.dense"]  # a square layer, and two of other shapes
MODELS = {
    "bert": lambda: tiny_bert(num_labels=3),
    "gpt2": lambda: tiny_gpt2("AutoModelForSequenceClassification", num_labels=3, pad_token_id=0),
    "llama": lambda: tiny_llama("AutoModelForSequenceClassification", num_labels=3, pad_token_id=0),
}
METHODS = {
    "rslora": RsLoRA(r=4, alpha=3.0, targets=QUERY),
    "dora": DoRA(r=2, alpha=3.0, targets=QUERY),
    "lora-plus": LoRAPlus(r=2, alpha=3.0, ratio=1.0, targets=QUERY),
    "vera": VeRA(r=4, targets=QUERY),
    "ia3": IA3(targets=QUERY, feedforward=["output.dense"]),
    "ia3 on outputs": IA3(targets=QUERY),
}


def effective(
    kind: str, weight: torch.Tensor, bias: torch.Tensor, p: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of an adapted layer from what is trained of it, by the papers."""
    if kind == "rslora":
        return weight + 3.0 / math.sqrt(4) * p["lora_B"] @ p["lora_A"], bias
    if kind == "lora-plus":
        return weight + 3.0 / 2 * p["lora_B"] @ p["lora_A"], bias
    if kind == "dora":
        turned = weight + 3.0 / 2 * p["lora_B"] @ p["lora_A"]
        return p["lora_magnitude_vector"][:, None] * turned / turned.norm(dim=1, keepdim=True).detach(), bias
    if kind == "vera":
        a, b = p["vera_A"][:, : weight.shape[1]], p["vera_B"][: weight.shape[0]]
        return weight + (p["vera_lambda_b"][:, None] * b) @ (p["vera_lambda_d"][:, None] * a), bias
    if kind == "ia3" and weight.shape[0] * p["ia3_l"].numel() == weight.numel() and p["ia3_l"].shape[0] == 1:
        return weight * p["ia3_l"], bias  # at the input: one row of factors
    return weight * p["ia3_l"].reshape(-1, 1), bias * p["ia3_l"].reshape(-1)


class Reference:
    """A BERT whose target layers get their effective weights, descending without PEFT and without the engine."""

    def __init__(self, kind: str, adapted: torch.nn.Module) -> None:
        self.kind, self.plain = kind, bert(dropout=0.0)
        state = {k.removeprefix("base_model.model."): v for k, v in adapted.state_dict().items()}
        self.layers = [
            n for n, m in self.plain.named_modules() if isinstance(m, torch.nn.Linear) and n.endswith(tuple(QUERY))
        ]
        self.parts: dict[str, dict[str, torch.Tensor]] = {}
        for layer in self.layers:
            mine = {k.removeprefix(f"{layer}."): v for k, v in state.items() if k.startswith(f"{layer}.")}
            self.parts[layer] = {k.split(".")[0]: v.detach().clone() for k, v in mine.items() if "base_layer" not in k}
            shared = {k: state[f"{k}.default"].detach() for k in ("vera_A", "vera_B") if f"{k}.default" in state}
            self.parts[layer] |= shared
        self.fixed = {k: v.detach() for k, v in self.plain.state_dict().items()}
        self.head = {k: self.fixed.pop(k).clone() for k in ("classifier.weight", "classifier.bias")}

    def trained(self) -> dict[str, torch.Tensor]:
        frozen = ("vera_A", "vera_B")
        own = {f"{n}.{k}": v for n, p in self.parts.items() for k, v in p.items() if k not in frozen}
        return {**own, **self.head}

    def step(self) -> None:
        values = self.trained()
        for value in values.values():
            value.requires_grad_(True)
        weights = {**self.fixed, **self.head}
        for layer in self.layers:
            one = effective(self.kind, self.fixed[f"{layer}.weight"], self.fixed[f"{layer}.bias"], self.parts[layer])
            weights[f"{layer}.weight"], weights[f"{layer}.bias"] = one
        logits = functional_call(self.plain, weights, kwargs=BATCH.inputs).logits
        gradients = torch.autograd.grad(functional.cross_entropy(logits, BATCH.targets), list(values.values()))
        with torch.no_grad():
            for value, gradient in zip(values.values(), gradients, strict=True):
                value.requires_grad_(False).sub_(LR * gradient)


def trained(model: torch.nn.Module, layers: list[str]) -> dict[str, torch.Tensor]:
    found = {}
    for name, value in model.named_parameters():
        name = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
        layer = next((one for one in layers if name.startswith(f"{one}.")), None)
        if value.requires_grad:
            found[name if layer is None else f"{layer}.{name.removeprefix(f'{layer}.').split('.')[0]}"] = value.detach()
    return found


@pytest.mark.parametrize("name", METHODS)
def test_three_steps_are_those_of_the_formula(name: str) -> None:
    bench = set_up([copy.deepcopy(METHODS[name])], bert(dropout=0.0), BATCH, lr=LR)
    reference = Reference(name, bench.run.model)
    assert len(reference.layers) == 6
    for _ in range(3):
        bench.step([BATCH])
        reference.step()
        ours, plain = trained(bench.run.model, reference.layers), reference.trained()
        assert sorted(ours) == sorted(plain)
        assert apart(ours, plain) < EXACT
    merged = copy.deepcopy(bench.run.model).merge_and_unload().eval()
    with torch.no_grad():
        torch.testing.assert_close(
            merged(**BATCH.inputs).logits, bench.run.model.eval()(**BATCH.inputs).logits, rtol=1e-10, atol=1e-10
        )


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "method", [RsLoRA(r=2), DoRA(r=2), LoRAPlus(r=2), IA3(), VeRA(r=4), Peft(kind="lokr")], ids=lambda m: m.name
)
def test_starts_at_the_pretrained_function_and_a_saved_adapter_loads_with_peft_alone(method, model, tmp_path):
    base = MODELS[model]().double().eval()
    if (method.name, model) == ("peft", "gpt2"):
        with pytest.raises(ModelError, match="LOKR cannot adapt this model"):  # Conv1D
            set_up([copy.deepcopy(method)], base, BATCH)
        return
    plain = copy.deepcopy(base)
    with torch.no_grad():
        expected = plain(**BATCH.inputs).logits
        bench = set_up([copy.deepcopy(method)], base, BATCH, lr=0.5)
        # DoRA divides by the norm that it multiplies with; everything else starts exactly at the base.
        bound = 1e-12 if method.name == "dora" else 0.0
        torch.testing.assert_close(bench.run.model.eval()(**BATCH.inputs).logits, expected, rtol=bound, atol=bound)
    bench.run.model.train()
    for _ in range(2):
        bench.step([BATCH])
    with torch.no_grad():
        tuned = bench.run.model.eval()(**BATCH.inputs).logits
        assert float((tuned - expected).abs().max()) > 1e-4
        bench.run.model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(plain, tmp_path).eval()
        torch.testing.assert_close(again(**BATCH.inputs).logits, tuned, rtol=1e-12, atol=1e-12)


def test_the_root_of_the_rank_is_lora_at_rank_one():
    runs = [set_up([method(r=1, alpha=2.0)], bert(0.0), BATCH, lr=LR) for method in (LoRA, RsLoRA)]
    for run in runs:
        run.step([BATCH])
        run.step([BATCH])
    assert apart(*({k: v.detach() for k, v in run.run.may_optimise.items()} for run in runs)) == 0.0


def test_b_gets_its_own_rate():
    method = LoRAPlus(r=2, ratio=8.0)
    run = set_up([method], bert(0.0), BATCH).run
    run.config.train.lr = 0.25
    groups = method.transform_param_groups(run, [ParamGroup(dict(run.may_optimise)), ParamGroup({}, lr=0.5)])
    rates = {name: group.options.get("lr", 0.25) for group in groups for name in group.parameters}
    assert sorted(rates) == sorted(run.may_optimise)
    assert all(rate == (2.0 if ".lora_B." in name else 0.25) for name, rate in rates.items())
    assert {".lora_B." in name for name in rates} == {True, False}


def test_vera_draws_by_the_seed_alone_and_shares_its_matrices():
    def start(seed: int) -> torch.Tensor:
        torch.randn(seed + 1)
        drawn = {
            n: v for n, v in set_up([VeRA(r=4)], bert(0.0), BATCH, seed=seed).run.model.named_buffers() if "vera_A" in n
        }
        assert len({value.data_ptr() for value in drawn.values()}) == 1  # one matrix in all layers
        return next(iter(drawn.values()))

    first, same, other = start(0), start(0), start(1)
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_dropout_of_its_own_is_declared():
    assert VeRA(dropout=0.1).also_provides() == RsLoRA(dropout=0.1).also_provides() == ("dropout",)
    assert VeRA().also_provides() == RsLoRA().also_provides() == ()


@pytest.mark.parametrize("kind", ["OFT", "LoHa", "LoKr", "FourierFT", "HRA", "RANDLORA", "VBLORA", "LN_TUNING", "MISS"])
def test_any_adapter_of_peft_trains(kind):
    options = {
        "FourierFT": {"n_frequency": 20},
        "OFT": {"oft_block_size": 4},
        "MISS": {"r": 4},
        "VBLORA": {"vector_length": 4, "topk": 2, "num_vectors": 8},
    }
    bench = set_up([Peft(kind=kind, options=options.get(kind, {}))], tiny_bert(num_labels=3), BATCH, lr=0.1)
    before = {k: v.detach().clone() for k, v in bench.run.model.named_parameters()}
    for _ in range(2):
        bench.step([BATCH])
    moved = {k for k, v in bench.run.model.named_parameters() if not torch.equal(v, before[k])}
    assert moved <= set(bench.run.may_optimise) and any("classifier" not in k for k in moved)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "OFFT"}, "no kind 'OFFT'. Did you mean 'OFT'?"),
        ({"kind": "prefix_tuning"}, "is a prompt, not an adapter"),
        ({"kind": "AdaLoRA"}, "in calls after each step"),
        (
            {"kind": "oft", "options": {"blok_share": True}},
            "OFT has no option 'blok_share'. Did you mean 'block_share'?",
        ),
        ({"kind": "oft", "options": {"target_modules": ["query"]}}, "is set by the engine; remove it"),
    ],
)
def test_a_wrong_kind_or_option_is_told(options, said):
    (problem,) = Peft(**options).check_stack(None)
    assert said in problem
    with pytest.raises(ConfigError, match="peft: "):
        set_up([Peft(**options)], tiny_bert(num_labels=3), BATCH)


def test_what_peft_refuses_is_told_with_a_way_out():
    with pytest.raises(ModelError, match=r"OFT cannot adapt this model with .*; change `options`"):
        set_up([Peft(kind="OFT", options={"r": 7, "oft_block_size": 5})], tiny_bert(num_labels=3), BATCH)
    with pytest.raises(ModelError, match="no layer of this model is named 'quary'"):
        set_up([VeRA(targets=["quary"])], tiny_bert(num_labels=3), BATCH)


def test_ia3_needs_a_choice_of_layers():
    model = tiny_bert(num_labels=3)
    model.config.model_type = "unheard-of"
    with pytest.raises(ModelError, match=r"ia3: PEFT has no choice of layers .* give `targets` and `feedforward`"):
        set_up([IA3()], model, BATCH)
    with pytest.raises(ValueError, match="feedforward names 'dense', which is none of the targets"):
        IA3(targets=["query"], feedforward=["dense"])
