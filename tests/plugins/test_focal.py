"""`focal` and `poly` against their definitions, in units of every kind, and at the ends of the scale."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain import EXACT, Plain, apart, bert, check_accumulation, check_loss_scale, check_padding, gradients, match
from torch import Tensor
from torch.nn import functional

from hybridengine.seams import Batch, log_likelihoods
from hybridengine.testing import SimpleTask, make_batch, tiny_bert
from hybridengine_plugins.regularize.focal import Focal, Poly
from hybridengine_plugins.tasks.text_classification import TextClassification


def reference(method: Focal | Poly) -> Any:
    """Lin et al., equation 4; Leng et al., equation 5; written with the softmax itself."""

    def gradient(plain: Plain, batch: Batch, seed: int) -> dict[str, Tensor]:
        p = plain.logits(batch, seed).softmax(-1).gather(1, batch.targets[:, None]).squeeze(1)
        if isinstance(method, Focal):
            return plain.gradient((-((1 - p) ** method.gamma) * p.log()).mean())
        return plain.gradient((-p.log() + method.epsilon * (1 - p)).mean())

    return gradient


@pytest.mark.parametrize("method", [Focal(), Focal(gamma=0.5), Poly(), Poly(epsilon=-1.0)], ids=repr)
def test_three_steps_match_the_paper(method: Focal | Poly) -> None:
    match(method, reference(method))


@pytest.mark.parametrize("kind", ["rows", "tokens"])
@pytest.mark.parametrize("method", [Focal(gamma=0.0), Poly(epsilon=0.0)], ids=repr)
def test_zero_is_plain_training(method: Any, kind: str) -> None:
    batch, task = make_batch(kind=kind), SimpleTask(kind)

    def model() -> Any:
        return bert() if kind == "rows" else tiny_bert("AutoModelForTokenClassification", num_labels=3).double()

    ours = gradients(lambda: [method], [batch], model(), task=task)
    assert apart(ours, gradients(list, [batch], model(), task=task)) < EXACT


@pytest.mark.parametrize("method", [Focal, Poly])
def test_invariants(method: Any) -> None:
    check_accumulation(lambda: [method()])
    check_padding(lambda: [method()])
    check_loss_scale(lambda: [method()])


def test_likelihoods_of_labels_and_of_tokens() -> None:
    logits = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    many = Batch({}, torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]]), (0, 1, 2, 3))
    found, unit = log_likelihoods(logits, many, TextClassification(multi_label=True))
    wanted = -functional.binary_cross_entropy_with_logits(logits, many.targets.double(), reduction="none")
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert unit == "rows"
    tokens = Batch({}, torch.tensor([[0, -100], [2, 1]]), (0, 1))
    found, unit = log_likelihoods(logits.view(2, 2, 3), tokens)
    each = logits.log_softmax(-1)
    torch.testing.assert_close(
        found, torch.stack([each[0, 0], 0 * each[1, 0], each[2, 2], each[3, 1]]), rtol=1e-12, atol=1e-12
    )
    assert unit == "tokens"


@pytest.mark.parametrize("method", [Focal(gamma=0.5), Focal(gamma=2.0), Poly()], ids=repr)
@pytest.mark.parametrize("size", [0.0, -1e-30, -1e-9, -200.0])
def test_gradients_are_finite_where_the_truth_is_certain_or_impossible(method: Any, size: float) -> None:
    log_p = torch.tensor([size], requires_grad=True)
    (gradient,) = torch.autograd.grad(method._values(log_p).sum(), log_p)
    assert gradient.isfinite().all()
    assert gradient <= 0  # more of the truth is never worse


def test_what_is_sure_counts_less_by_the_factor() -> None:
    log_p = torch.tensor([0.9, 0.5], dtype=torch.float64).log()
    torch.testing.assert_close(
        Focal(gamma=2.0)._values(log_p), torch.tensor([0.01, 0.25], dtype=torch.float64) * -log_p
    )
