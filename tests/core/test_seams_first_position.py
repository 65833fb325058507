"""The last layer at its first position alone: the same logits and gradients, wherever they read no other position."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hybridengine.seams import View, first_position
from hybridengine.seams.first_position import FirstPosition
from hybridengine.testing import make_batch, set_up, tiny_bert, tiny_llama

SIZES = {
    "vocab_size": 100,
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
DISTILBERT = {"vocab_size": 100, "n_layers": 2, "dim": 32, "n_heads": 4, "hidden_dim": 64}
NEAR = {"rtol": 1e-9, "atol": 1e-12}  # another order of summation, in float64


def classifier(architecture: str, attention: str = "sdpa", **options: Any) -> Any:
    import transformers

    sizes = DISTILBERT if architecture == "DistilBert" else SIZES
    config = getattr(transformers, f"{architecture}Config")(**sizes, **options)
    model = getattr(transformers, f"{architecture}ForSequenceClassification")
    torch.manual_seed(0)
    return model._from_config(config, attn_implementation=attention)


def inputs(padded: bool = True) -> dict[str, Tensor]:
    ids = torch.randint(5, 90, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 6:] = 0
        mask[2, 2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def logits_and_gradients(model: Any, given: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logits = model(**given).logits
    logits.square().sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "architecture", ["Bert", "Roberta", "XLMRoberta", "Camembert", "Electra", "Ernie", "DistilBert"]
)
def test_logits_and_gradients_stay_what_they_were(architecture: str, attention: str) -> None:
    model = classifier(architecture, attention).eval()
    short = FirstPosition.find(model, inputs())
    assert short is not None
    model.double()
    for padded in (True, False):
        whole, gradients = logits_and_gradients(model, inputs(padded))
        with short.armed():
            first, shortened = logits_and_gradients(model, inputs(padded))
        torch.testing.assert_close(first, whole, **NEAR)
        assert gradients.keys() == shortened.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(shortened[name], gradient, **NEAR)


def test_less_is_computed() -> None:
    model = classifier("Bert")
    short = FirstPosition.find(model, inputs())
    assert short is not None
    rows: list[int] = []
    model.bert.encoder.layer[-1].output.dense.register_forward_hook(lambda m, args, out: rows.append(out.shape[1]))
    model(**inputs())
    with short.armed():
        model(**inputs())
    assert rows == [9, 1]


def test_dropout_of_the_attention_stays_on() -> None:
    model = classifier("Bert", attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0).train()
    short = FirstPosition.find(model, inputs())
    assert short is not None and model.training
    model.bert.encoder.layer[0].eval()  # what varies now comes from the last layer
    with short.armed():
        assert not torch.equal(model(**inputs()).logits, model(**inputs()).logits)


class Pooled(nn.Module):
    """An encoder under a head that sees every position, with weights of zero: its logits alone would not tell."""

    def __init__(self, mean: bool) -> None:
        super().__init__()
        self.encoder = tiny_bert("AutoModel")
        self.classifier = nn.Linear(32, 2)
        nn.init.zeros_(self.classifier.weight)
        self.mean = mean

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        hidden = self.encoder(input_ids, attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1) / attention_mask.sum(1)[:, None, None]
        pooled = (hidden * weights).sum(1) if self.mean else hidden[:, 0]
        return type("Output", (), {"logits": self.classifier(pooled)})


def test_a_head_that_reads_other_positions_is_found_out() -> None:
    assert FirstPosition.find(Pooled(mean=False), inputs()) is not None
    assert FirstPosition.find(Pooled(mean=True), inputs()) is None


@pytest.mark.parametrize("auto_class", ["AutoModelForTokenClassification", "AutoModelForMaskedLM"])
def test_scores_for_every_token_need_every_position(auto_class: str) -> None:
    model = tiny_bert(auto_class)
    kind = type(model.bert.encoder.layer[-1])
    assert FirstPosition.find(model, inputs()) is None
    assert type(model.bert.encoder.layer[-1]) is kind


def test_decoders_and_unknown_layers_are_left_alone() -> None:
    assert FirstPosition.find(tiny_llama("AutoModelForSequenceClassification", pad_token_id=0), inputs()) is None
    assert FirstPosition.find(classifier("RoFormer", "eager"), inputs()) is None  # BERT's names, another formula


def test_a_formula_that_is_not_the_layers_own_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer of a known name in another version of transformers."""

    def without_mask(layer: Any, hidden: Tensor, mask: Tensor | None) -> Tensor:
        return first_position._bert(layer, hidden, None)

    def renamed(layer: Any, hidden: Tensor, mask: Tensor | None) -> Tensor:
        return layer.no_such_part(hidden)

    model = classifier("Bert")
    for wrong in (without_mask, renamed):
        monkeypatch.setitem(first_position._SHORT, "BertLayer", wrong)
        assert FirstPosition.find(model, inputs()) is None
    monkeypatch.undo()
    assert FirstPosition.find(model, inputs()) is not None


def test_a_watched_model_is_left_alone() -> None:
    for path in ("bert.encoder.layer.1", "bert.encoder", "bert", ""):
        model = classifier("Bert")
        model.get_submodule(path).register_forward_hook(lambda module, args, output: None)
        assert FirstPosition.find(model, inputs()) is None, path


def test_a_copy_runs_its_own_weights() -> None:
    model = classifier("Bert").eval()
    short = FirstPosition.find(model, inputs())
    assert short is not None
    other = copy.deepcopy(model)
    nn.init.zeros_(other.bert.encoder.layer[-1].output.dense.weight)
    with short.armed():
        torch.testing.assert_close(other(**inputs()).logits, _whole(short, other), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(other(**inputs()).logits, model(**inputs()).logits, rtol=1e-3, atol=1e-4)


def _whole(short: FirstPosition, model: Any) -> Tensor:
    short._armed = False
    try:
        logits: Tensor = model(**inputs()).logits
        return logits
    finally:
        short._armed = True


# ---- in a run --------------------------------------------------------------------------------------------------------


def test_only_training_passes_of_the_runs_own_model_are_shortened() -> None:
    model = tiny_bert(num_labels=3)
    bench = set_up([], model, make_batch())
    bench.run.first_position = FirstPosition.find(model, dict(make_batch().inputs))
    assert bench.run.first_position is not None
    rows: list[int] = []
    model.bert.encoder.layer[-1].register_forward_hook(lambda module, args, output: rows.append(output.shape[1]))
    length = make_batch().inputs["input_ids"].shape[1]
    model.train()
    bench.ctx.outputs(make_batch(), [View()])
    bench.ctx.outputs(make_batch(), [View(params=dict(model.named_parameters()))])
    assert rows == [1, 1]
    rows.clear()
    hidden = bench.ctx.outputs(make_batch(), [View()], features=True)[0].features
    assert hidden is not None and hidden.shape[1] == length
    model.eval()
    bench.ctx.outputs(make_batch(), [View()])
    assert rows == [length, length]
