"""SupCon against a double loop written from the paper, its pooling, and where it has nothing to say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain import EXACT, Plain, apart, bert, check_loss_scale, check_padding, gradients, match
from torch import Tensor
from torch.nn import functional

from hybridengine.errors import StackError
from hybridengine.seams import Batch
from hybridengine.testing import make_batch, set_up, tiny_llama
from hybridengine_plugins.regularize.rdrop import RDrop
from hybridengine_plugins.regularize.supcon import SupCon, _contrast
from hybridengine_plugins.tasks.text_classification import TextClassification
from hybridengine_plugins.tasks.token_classification import TokenClassification


def double_loop(z: Tensor, labels: list[int], temperature: float) -> Tensor:
    """Gunel et al., equation 3, row by row."""
    total: Any = 0.0
    z = z / z.norm(dim=-1, keepdim=True)
    for i, label in enumerate(labels):
        partners = [p for p, other in enumerate(labels) if other == label and p != i]
        if partners:
            below = sum(torch.exp(z[i] @ z[a] / temperature) for a in range(len(labels)) if a != i)
            total = total - sum(torch.log(torch.exp(z[i] @ z[p] / temperature) / below) for p in partners) / len(
                partners
            )
    return total


def reference(weight: float, temperature: float, pool: str) -> Any:
    def gradient(plain: Plain, batch: Batch, seed: int) -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            out = plain.model(**batch.inputs, output_hidden_states=True)
        states, mask = out.hidden_states[-1], batch.inputs["attention_mask"].double()
        z = states[:, 0] if pool == "first" else (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        contrast = double_loop(z, batch.targets.tolist(), temperature) / batch.size
        return plain.gradient(functional.cross_entropy(out.logits, batch.targets) + weight * contrast)

    return gradient


@pytest.mark.parametrize(("weight", "temperature", "pool"), [(1.0, 0.3, "mean"), (0.5, 0.1, "first")])
def test_three_steps_match_the_paper(weight: float, temperature: float, pool: Any) -> None:
    match(SupCon(weight=weight, temperature=temperature, pool=pool), reference(weight, temperature, pool))


def test_weight_zero_is_plain_training() -> None:
    batch = make_batch()
    assert apart(gradients(lambda: [SupCon(weight=0.0)], [batch], bert()), gradients(list, [batch], bert())) < EXACT


def test_padding_and_loss_scale() -> None:
    check_padding(lambda: [SupCon()])
    check_loss_scale(lambda: [SupCon()])


@pytest.mark.parametrize("labels", [[0, 0, 1, 1, 2], [0, 0, 0, 0, 0], [0, 1, 2, 3, 4], [3, 3, 3, 1, 0]])
def test_partners_of_every_number(labels: list[int]) -> None:
    z = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    ours = _contrast(z, torch.tensor(labels), 0.2)
    torch.testing.assert_close(ours, torch.as_tensor(double_loop(z, labels, 0.2)).double(), rtol=1e-12, atol=1e-12)
    assert torch.autograd.grad(ours, z)[0].isfinite().all()


def test_one_row_alone_adds_nothing() -> None:
    z = torch.randn(1, 8, requires_grad=True)
    value = _contrast(z, torch.tensor([0]), 0.2)
    assert float(value) == 0.0 and torch.autograd.grad(value, z)[0].isfinite().all()


def test_with_rdrop_each_view_is_contrasted_and_passes_stay() -> None:
    bench = set_up([SupCon(), RDrop()], bert(), make_batch())
    bench.step([make_batch()])
    plain = set_up([RDrop()], bert(), make_batch())
    plain.step([make_batch()])
    assert bench.ctx.trace.text() == plain.ctx.trace.text()


def test_a_decoder_padded_on_the_left_trains() -> None:
    model = tiny_llama("AutoModelForSequenceClassification", num_labels=3, pad_token_id=0).double()
    set_up([SupCon(pool="first")], model, make_batch()).step([make_batch()])


@pytest.mark.parametrize(
    "task", [TokenClassification(), TextClassification(multi_label=True)], ids=["tokens", "labels"]
)
def test_tasks_without_one_label_a_row_are_refused(task: Any) -> None:
    run = set_up([], bert(), make_batch()).run
    run.task = task
    with pytest.raises(StackError, match=r"needs one label for each row.*remove supcon"):
        SupCon().transform_data(run, {})
