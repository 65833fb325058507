"""Class weights against their definition, and what they do with labels that do not fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from plain import EXACT, Plain, apart, bert, check_accumulation, check_loss_scale, check_padding, gradients, match
from torch import Tensor
from torch.nn import functional

from hybridengine.errors import ConfigError
from hybridengine.plugin import Run, Split
from hybridengine.seams import Batch
from hybridengine.testing import SimpleTask, make_batch, set_up, tiny_bert
from hybridengine_plugins.regularize.class_weights import ClassWeights
from hybridengine_plugins.regularize.label_smoothing import LabelSmoothing


def trained_on(labels: Sequence[Any], role: str = "label") -> Any:
    def prepare(run: Run) -> None:
        run.splits = {"train": Split("train", [{role: label} for label in labels])}

    return prepare


def reference(weights: list[float], smoothing: float = 0.0) -> Any:
    """sum_i w[y_i] CE_i / n."""

    def gradient(plain: Plain, batch: Batch, seed: int) -> dict[str, Tensor]:
        log_p = plain.logits(batch, seed).log_softmax(-1)
        target = (1 - smoothing) * functional.one_hot(batch.targets, 3).double() + smoothing / 3
        return plain.gradient(-(target * torch.tensor(weights) * log_p).sum(-1).mean())

    return gradient


def test_given_weights() -> None:
    match(ClassWeights(weights={"a": 2.0, "c": 0.5}), reference([2.0, 1.0, 0.5]))


def test_balanced_weights() -> None:
    # 6 rows, 3 classes: 6 / (3 n_c)
    match(ClassWeights(), reference([2 / 3, 1.0, 2.0]), prepare=trained_on("aaabbc"))


def test_smoothing_inside() -> None:
    match(ClassWeights(weights={"a": 2.0}, label_smoothing=0.2), reference([2.0, 1.0, 1.0], 0.2))


def test_balanced_weights_average_to_one_and_even_out_the_classes() -> None:
    labels = "aaaaaaabbc"
    method = ClassWeights()
    set_up([method], bert(), make_batch(), prepare=trained_on(labels))
    weight = dict(zip("abc", method._weight.tolist(), strict=True))
    assert sum(weight[label] for label in labels) / len(labels) == pytest.approx(1)
    assert len({round(weight[c] * labels.count(c), 5) for c in "abc"}) == 1


def test_a_class_that_training_lacks_weighs_one() -> None:
    method = ClassWeights()
    set_up([method], bert(), make_batch(), prepare=trained_on("aab"))
    assert method._weight.tolist() == pytest.approx([0.75, 1.5, 1.0])


def test_tags_of_tokens_are_counted() -> None:
    method, batch = ClassWeights(), make_batch(kind="tokens")
    model = tiny_bert("AutoModelForTokenClassification", num_labels=3).double()
    prepare = trained_on([["a", "a"], ["a", "b", "c", "c"]], role="tags")
    bench = set_up([method], model, batch, task=SimpleTask("tokens"), prepare=prepare)
    assert method._weight.tolist() == pytest.approx([6 / 9, 6 / 3, 6 / 6])
    bench.step([batch])
    assert bench.effect("class-weights", "loss_change") > 0


def test_equal_weights_are_plain_training() -> None:
    batch = make_batch()
    weighted = gradients(lambda: [ClassWeights()], [batch], bert(), prepare=trained_on("abc"))
    assert apart(weighted, gradients(list, [batch], bert())) < EXACT


def test_unknown_label_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no label is named 'positiv'.*positive"):
        set_up([ClassWeights(weights={"positiv": 2.0})], bert(), make_batch(), labels=["negative", "positive", "mixed"])


def test_weights_must_be_positive() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        ClassWeights(weights={"a": 0.0})


def test_rows_without_labels_cannot_be_balanced() -> None:
    with pytest.raises(ConfigError, match="carry no label"):
        set_up([ClassWeights()], bert(), make_batch(), prepare=trained_on([None, None]))


def test_on_the_dry_run_all_classes_weigh_one() -> None:
    method = ClassWeights(weights={"mine": 3.0})

    def dry(run: Run) -> None:
        run.dry = True

    set_up([method], bert(), make_batch(), prepare=dry)
    assert method._weight.tolist() == [1.0, 1.0, 1.0]


def test_weight_and_smoothing_agree_with_label_smoothing() -> None:
    batch = make_batch()
    one = gradients(lambda: [ClassWeights(label_smoothing=0.1)], [batch], bert(), prepare=trained_on("abc"))
    assert apart(one, gradients(lambda: [LabelSmoothing(smoothing=0.1)], [batch], bert())) < EXACT


def test_invariants() -> None:
    for check in (check_accumulation, check_padding, check_loss_scale):
        check(lambda: [ClassWeights(weights={"a": 3.0})])
