"""Terms that compare predictions, where each label of a row may apply or not: they move labels, not shares."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hybridengine.plugin import Run
from hybridengine.seams import Batch, View
from hybridengine.testing import Bench, make_batch, set_up, tiny_bert
from hybridengine_plugins.adversarial.vat import VAT
from hybridengine_plugins.regularize.distill import Distill
from hybridengine_plugins.regularize.rdrop import RDrop
from hybridengine_plugins.tasks.text_classification import TextClassification


class Shared(nn.Module):
    """One logit for all labels, so that a softmax over them says the same whatever the text."""

    def __init__(self, inner: Any, shift: float = 0.0) -> None:
        super().__init__()
        self.inner, self.shift = inner, shift

    def forward(self, **inputs: Tensor) -> Any:
        out = self.inner(**inputs)
        out.logits = out.logits[:, :1].expand(-1, 3) + self.shift
        return out


def model(shift: float = 0.0) -> Shared:
    return Shared(tiny_bert(num_labels=3, hidden_dropout_prob=0.3).double(), shift)


def bench_of(method: object, **options: Any) -> tuple[Bench, Batch]:
    batch = make_batch()
    batch = Batch(**{**vars(batch), "targets": functional.one_hot(batch.targets, 3)})
    return set_up([method], model(), batch, task=TextClassification(multi_label=True), **options), batch


def taught(run: Run) -> None:
    run.load_model = lambda name: model(shift=2.0)


@pytest.mark.parametrize(
    ("method", "prepare"),
    [(RDrop(), None), (VAT(), None), (Distill("teacher"), taught)],
    ids=["rdrop", "vat", "distill"],
)
def test_a_shift_of_all_labels_counts(method: object, prepare: Any) -> None:
    bench, batch = bench_of(method, prepare=prepare)
    terms = bench.step([batch])
    assert float(terms[type(method).__name__.lower()]) > 1e-5


def test_distill_is_the_binary_divergence_at_its_temperature() -> None:
    bench, batch = bench_of(Distill("teacher", alpha=1.0, temperature=2.0), prepare=taught)
    bench.run.model.eval()
    with torch.no_grad():
        student = bench.ctx.outputs(batch, [View()])[0].scores
        s, t = (student / 2).sigmoid(), ((student + 2) / 2).sigmoid()
        wanted = 4 * (t * (t / s).log() + (1 - t) * ((1 - t) / (1 - s)).log()).sum() / batch.size
    torch.testing.assert_close(bench.step([batch])["distill"], wanted)
