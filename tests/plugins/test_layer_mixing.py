"""Layer mixing against a mixture made by hand, its own rate, and that a loaded run predicts with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from plain import EXACT, LR, Plain, apart, bert, check_accumulation, check_loss_scale, check_padding, gradients, key
from torch import Tensor, nn
from torch.nn import functional

import hybridengine
from hybridengine.engine import Engine
from hybridengine.errors import ModelError, StackError
from hybridengine.plugin import ParamGroup
from hybridengine.seams import View
from hybridengine.testing import make_batch, set_up, tiny_checkpoint, tiny_gpt2, tiny_llama
from hybridengine_plugins.regularize.layer_mixing import LayerMixing
from hybridengine_plugins.regularize.multi_sample_dropout import MultiSampleDropout
from hybridengine_plugins.regularize.supcon import SupCon

OWN = ("layer-mixing/scores", "layer-mixing/scale")


def logits_of(model: Any, scores: Tensor, scale: Tensor, inputs: dict[str, Tensor], seed: int) -> Tensor:
    """Peters et al., equation 1, with BERT's pooler and head above."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        states = model.bert(**inputs, output_hidden_states=True).hidden_states
        weights = scores.exp() / scores.exp().sum()
        mixed = scale * torch.stack([w * h for w, h in zip(weights, states, strict=True)]).sum(0)
        logits: Tensor = model.classifier(model.dropout(model.bert.pooler(mixed)))
        return logits


def test_three_steps_match_the_paper() -> None:
    bench, plain = set_up([LayerMixing(last=1.0)], bert(), make_batch(), lr=LR), Plain(bert())
    plain.parameters[OWN[0]] = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64, requires_grad=True)
    plain.parameters[OWN[1]] = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    for step in range(3):
        batch = make_batch(seed=step)
        bench.step([batch])
        own = (plain.parameters[name] for name in OWN)
        logits = logits_of(plain.model, *own, dict(batch.inputs), key(step))
        plain.descend(plain.gradient(functional.cross_entropy(logits, batch.targets)))
        assert apart(bench.parameters(), {k: x.detach() for k, x in plain.parameters.items()}) < EXACT
    scores = bench.run.may_optimise[OWN[0]]
    assert (scores.detach() - torch.tensor([0.0, 0.0, 1.0])).abs().min() > 1e-4


def test_the_last_layer_alone_is_plain_training() -> None:
    """A score of 1000 leaves the others a share of exactly 0."""
    batch = make_batch()
    found = gradients(lambda: [LayerMixing(last=1000.0)], [batch], bert())
    assert apart({k: g for k, g in found.items() if k not in OWN}, gradients(list, [batch], bert())) < EXACT


def test_invariants() -> None:
    for check in (check_accumulation, check_padding, check_loss_scale):
        check(lambda: [LayerMixing()])


def test_it_has_its_own_rate_and_no_decay() -> None:
    run = set_up([LayerMixing()], bert(), make_batch()).run
    groups = LayerMixing(lr=0.5).transform_param_groups(run, [ParamGroup(run.may_optimise, lr=0.1)])
    assert [sorted(g.parameters) for g in groups[1:]] == [sorted(OWN)]
    assert groups[1].options == {"lr": 0.5, "weight_decay": 0.0} and groups[0].options == {"lr": 0.1}
    assert len(groups[0].parameters) + 2 == len(run.may_optimise)


def test_the_effect_is_the_share_below_the_last_layer() -> None:
    bench = set_up([LayerMixing()], bert(), make_batch())
    bench.step([make_batch()])
    assert abs(bench.effect("layer-mixing", "below") - 2 / 3) < 1e-6
    assert bench.ctx.trace.text() == "F4 B S"


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama], ids=["gpt2", "llama"])
def test_decoders_normalise_the_mixture(make: Any) -> None:
    model = make("AutoModelForSequenceClassification", num_labels=3, pad_token_id=0).double()
    bench = set_up([LayerMixing()], model, batch := make_batch())
    norm = model.transformer.ln_f if make is tiny_gpt2 else model.model.norm
    read: list[Tensor] = []
    norm.register_forward_pre_hook(lambda m, args: read.append(args[0]))
    out = bench.ctx.outputs(batch, [View(key=1)], features=True)[0]
    hidden = model(**batch.inputs, output_hidden_states=True).hidden_states
    assert torch.allclose(out.features, hidden[-1]) and torch.allclose(read[0], read[1])
    assert not torch.allclose(read[0], hidden[1])


def test_other_methods_read_the_mixture() -> None:
    bench = set_up([LayerMixing(), SupCon(), MultiSampleDropout()], bert(), make_batch())
    bench.step([make_batch()])
    assert bench.effect("supcon", "contrast") > 0 and bench.effect("multi-sample-dropout", "spread") > 0
    assert bench.ctx.trace.text() == "F4 B S"


def run_of(folder: Path, **train: Any) -> dict[str, Any]:
    rows = [{"text": f"{word} movie {i}", "label": word} for i in range(8) for word in ("good", "bad")]
    return {
        "task": "text-classification",
        "model": {"name": str(tiny_checkpoint(folder / "model"))},
        "data": {"train": rows, "validation": rows[:8], "carve": {}},
        "train": {"max_steps": 4, "batch_size": 4, "lr": 1e-3, "precision": "fp32", **train},
        "methods": [{"layer-mixing": {"lr": 0.3}}],
        "output": str(folder / "run"),
    }


def test_a_loaded_run_predicts_with_its_mixture(tmp_path: Path) -> None:
    engine = Engine(run_of(tmp_path))
    engine.train()
    run = engine._run
    predictor = hybridengine.load(tmp_path / "run")
    mixture, trained = predictor.run.module("layer-mixing"), run.module("layer-mixing")
    assert isinstance(mixture, nn.Module)
    assert (mixture.scores.detach() - torch.zeros(3)).abs().max() > 0.1
    assert torch.equal(mixture.scores, trained.scores)
    (record,) = predictor.predict(["good movie 3"])
    inputs = dict(run.task.collate(run, run.task.features(run, [{"text": "good movie 3"}]), (0,), run.random).inputs)
    with torch.no_grad():
        wanted = run.model.eval()(**inputs).logits.softmax(-1)[0]
    assert abs(record["probabilities"][record["prediction"]] - float(wanted.max())) < 1e-5


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(StackError, match=r"layer-mixing: layers are recomputed.*set `train.checkpointing: false`"):
        Engine(run_of(tmp_path, checkpointing=True)).validate()
    model = bert()
    model.bert.encoder.layer = nn.ModuleList([model.bert.encoder.layer[0]] * 2)
    with pytest.raises(ModelError, match=r"no list of layers that hand.*remove layer-mixing"):
        set_up([LayerMixing()], model, make_batch())
