"""Metrics against scikit-learn, seqeval and torchmetrics; and that row scores give the same number as the metric."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import seqeval.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval.metrics.sequence_labeling import get_entities
from sklearn import metrics as sk

from hybridengine.errors import ConfigError
from hybridengine.evaluate.classification import ClassificationMetrics
from hybridengine.evaluate.metrics import LossMetrics, check_metric, greater_is_better
from hybridengine.evaluate.spans import SpanMetrics, spans, word_tags
from hybridengine.seams import Batch, Prediction

LABELS = ["a", "b", "c"]
seeds = st.integers(0, 10_000)


def made_up(seed: int, n: int = 40, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(n, classes, generator=generator).mul(2).softmax(-1)
    return scores, torch.randint(0, classes, (n,), generator=generator)


def filled(metrics, scores, targets, order=None, size=7):
    """Metrics after batches of `size`, rows visited in `order`."""
    order = list(range(len(scores))) if order is None else order
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        loss = -scores[rows].gather(1, targets[rows][:, None]).log().sum() if targets.dim() == 1 else torch.tensor(0.0)
        batch = Batch({"input_ids": scores[rows]}, targets[rows], tuple(rows), counts={"rows": len(rows)})
        metrics.update(batch, Prediction(scores[rows], terms={"loss": (loss, "rows")}), [{}] * len(rows))
    return metrics


@settings(max_examples=25, deadline=None)
@given(seed=seeds, n=st.integers(2, 40))
def test_rates_agree_with_scikit_learn(seed, n):
    scores, targets = made_up(seed, n)
    found = filled(ClassificationMetrics(LABELS), scores, targets).compute()
    truth, guess = targets.numpy(), scores.argmax(-1).numpy()
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(truth, guess))
    assert found["mcc"] == pytest.approx(sk.matthews_corrcoef(truth, guess), abs=1e-9)
    assert found["loss"] == pytest.approx(
        sk.log_loss(truth, scores.double().div(scores.double().sum(1, keepdim=True)).numpy(), labels=[0, 1, 2]),
        rel=1e-4,
    )
    for average in ("micro", "macro"):
        parts = sk.precision_recall_fscore_support(truth, guess, average=average, zero_division=0)
        for name, value in zip(("precision", "recall", "f1"), parts, strict=False):
            assert found[f"{name}_{average}"] == pytest.approx(value), name
    parts = sk.precision_recall_fscore_support(truth, guess, labels=[0, 1, 2], zero_division=0)
    for index, label in enumerate(LABELS):
        row = found["per_class"][label]
        assert [row[k] for k in ("precision", "recall", "f1", "support")] == pytest.approx([p[index] for p in parts])
    assert found["confusion"]["matrix"] == sk.confusion_matrix(truth, guess, labels=[0, 1, 2]).tolist()


@settings(max_examples=25, deadline=None)
@given(seed=seeds, classes=st.integers(2, 4))
def test_auroc_agrees_with_scikit_learn_and_is_none_where_undefined(seed, classes):
    scores, targets = made_up(seed, 30, classes)
    scores = scores.mul(8).round().div(8)  # ties
    found = filled(ClassificationMetrics([*"abcd"][:classes]), scores, targets).compute()
    areas = [
        sk.roc_auc_score(targets.numpy() == c, scores[:, c].numpy()) if 0 < (targets == c).sum() < 30 else None
        for c in range(classes)
    ]
    defined = [a for a in areas if a is not None]
    # torchmetrics computes in fp32
    assert found["auroc"] == pytest.approx(np.mean(defined), abs=1e-5)
    one_class = filled(ClassificationMetrics(LABELS), scores[:5, :1].expand(5, 3) / 3, torch.zeros(5).long()).compute()
    assert one_class["auroc"] is None


@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_ece_is_the_weighted_gap_of_fifteen_bins(seed):
    scores, targets = made_up(seed)
    found = filled(ClassificationMetrics(LABELS), scores, targets).compute()
    confidence, right = scores.max(1).values.numpy(), (scores.argmax(1) == targets).numpy()
    bins = np.floor(confidence * 15).astype(int)
    expected = sum(
        abs(confidence[bins == b].mean() - right[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)
    )
    assert found["ece"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("main", ClassificationMetrics.NAMES)
@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_row_scores_give_the_metric_in_any_order(main, seed):
    scores, targets = made_up(seed)
    metrics = filled(ClassificationMetrics(LABELS, main), scores, targets)
    rows = metrics.row_scores()
    value = metrics.statistic()(rows.mean(0, keepdims=True))
    assert value.shape == (1,)
    assert float(value[0]) == pytest.approx(metrics.compute()[main], abs=1e-5)
    order = np.random.default_rng(seed).permutation(40).tolist()
    shuffled = filled(ClassificationMetrics(LABELS, main), scores, targets, order, size=9)
    np.testing.assert_allclose(shuffled.row_scores(), rows)


@pytest.mark.parametrize("main", [name for name in ClassificationMetrics.NAMES if name != "auroc"])
def test_statistic_of_resampled_means_is_the_metric_of_the_resampled_rows(main):
    scores, targets = made_up(1)
    metrics = filled(ClassificationMetrics(LABELS, main), scores, targets)
    rows, statistic = metrics.row_scores(), metrics.statistic()
    for seed in range(5):
        picks = np.random.default_rng(seed).integers(0, 40, 40)
        again = filled(ClassificationMetrics(LABELS, main), scores[picks], targets[picks]).compute()[main]
        assert float(statistic(rows[picks].mean(0, keepdims=True))[0]) == pytest.approx(again, abs=1e-5)


def test_resampled_auroc_is_close_to_the_auroc_of_the_resampled_rows():
    # Its row scores are a linearisation: the error is of second order, far below the spread itself.
    scores, targets = made_up(3, 400, 2)
    metrics = filled(ClassificationMetrics(["n", "p"], "auroc"), scores, targets)
    rows, statistic = metrics.row_scores(), metrics.statistic()
    exact, linear = [], []
    for seed in range(200):
        picks = np.random.default_rng(seed).integers(0, 400, 400)
        exact.append(sk.roc_auc_score(targets[picks].numpy(), scores[picks, 1].numpy()))
        linear.append(float(statistic(rows[picks].mean(0, keepdims=True))[0]))
    assert np.corrcoef(exact, linear)[0, 1] > 0.99
    assert np.std(linear) == pytest.approx(np.std(exact), rel=0.05)


@pytest.mark.parametrize("main", ClassificationMetrics.MULTI_LABEL_NAMES)
@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_multi_label_agrees_with_scikit_learn(main, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(30, 3, generator=generator)
    targets = (torch.rand(30, 3, generator=generator) < 0.4).long()
    metrics = filled(ClassificationMetrics(LABELS, main, multi_label=True), scores, targets)
    found = metrics.compute()
    truth, guess = targets.numpy(), (scores >= 0.5).numpy()
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(truth, guess))
    for average in ("micro", "macro"):
        assert found[f"f1_{average}"] == pytest.approx(sk.f1_score(truth, guess, average=average, zero_division=0))
    assert found["auroc"] == pytest.approx(sk.roc_auc_score(truth, scores.numpy(), average="macro"), abs=1e-5)
    assert "confusion" not in found
    value = float(metrics.statistic()(metrics.row_scores().mean(0, keepdims=True))[0])
    if main == "loss":
        expected = torch.nn.functional.binary_cross_entropy(scores, targets.float(), reduction="sum") / 30
        assert value == pytest.approx(float(expected), rel=1e-4)
    else:
        assert value == pytest.approx(found[main], abs=1e-5)


def test_no_rows_and_no_warnings():
    assert ClassificationMetrics(LABELS).compute() == {"rows": 0}
    scores, targets = made_up(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        filled(ClassificationMetrics([*LABELS, "never"]), torch.cat([scores, scores[:, :1] * 0], 1), targets).compute()


def test_names_and_directions():
    with pytest.raises(ConfigError, match=r"no metric 'f1_macr'. Did you mean 'f1_macro'"):
        check_metric("f1_macr", ClassificationMetrics.NAMES, "text-classification")
    with pytest.raises(ConfigError, match=r"Did you mean 'accuracy'"):
        ClassificationMetrics(LABELS, "acuracy")
    assert [n for n in (*ClassificationMetrics.NAMES, "perplexity", "rougeL") if not greater_is_better(n)] == [
        "ece",
        "loss",
        "perplexity",
    ]


# ---- language models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("main", ["loss", "perplexity", "accuracy"])
def test_loss_metrics_are_ratios_of_sums(main):
    metrics = LossMetrics(main)
    parts = [([6.0, 1.0], [3, 1], [2, 0]), ([0.0], [0], [0])]
    for start, (loss, tokens, correct) in zip((0, 2), parts, strict=True):
        batch = Batch({"input_ids": torch.zeros(len(loss), 1)}, rows=tuple(range(start, start + len(loss))))
        numbers = {"loss": loss, "tokens": tokens, "correct": correct}
        metrics.update(batch, Prediction(per_row={k: torch.tensor(v) for k, v in numbers.items()}), [])
    found = metrics.compute()
    assert found == {"loss": 7 / 4, "perplexity": math.exp(7 / 4), "accuracy": 2 / 4, "tokens": 4, "rows": 3}
    assert float(metrics.statistic()(metrics.row_scores().mean(0, keepdims=True))[0]) == pytest.approx(found[main])
    assert LossMetrics().compute() == {"loss": None, "perplexity": None, "tokens": 0, "rows": 0}


# ---- spans -----------------------------------------------------------------------------------------------------------

tags = st.sampled_from(["O", "B-X", "I-X", "B-Y", "I-Y", "E-X", "S-Y"])
sentences = st.lists(st.lists(tags, min_size=1, max_size=8), min_size=1, max_size=5)


@settings(max_examples=300, deadline=None)
@given(sentence=st.lists(tags, max_size=10))
def test_spans_agree_with_seqeval(sentence):
    assert spans(sentence) == set(get_entities(sentence))


@settings(max_examples=40, deadline=None)
@given(data=st.data(), truth=sentences)
def test_span_metrics_agree_with_seqeval(data, truth):
    labels = ["O", "B-X", "I-X", "B-Y", "I-Y", "E-X", "S-Y"]
    guess = [[data.draw(tags) for _ in sentence] for sentence in truth]
    metrics = SpanMetrics(labels)
    for index, (true, said) in enumerate(zip(truth, guess, strict=True)):
        scores = torch.nn.functional.one_hot(torch.tensor([[labels.index(tag) for tag in said]]), len(labels)).float()
        masks = {"scored": {"input_ids": torch.ones(1, len(said)).long()}}
        batch = Batch({"input_ids": scores}, rows=(index,), masks=masks, counts={"tokens": len(said)})
        metrics.update(batch, Prediction(scores), [{"tags": true}])
    found = metrics.compute()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert found["f1"] == pytest.approx(seqeval.metrics.f1_score(truth, guess, zero_division=0))
        assert found["precision"] == pytest.approx(seqeval.metrics.precision_score(truth, guess, zero_division=0))
        assert found["recall"] == pytest.approx(seqeval.metrics.recall_score(truth, guess, zero_division=0))
        assert found["accuracy"] == pytest.approx(seqeval.metrics.accuracy_score(truth, guess))
    value = float(metrics.statistic()(metrics.row_scores().mean(0, keepdims=True))[0])
    assert value == pytest.approx(found["f1"])


def test_words_cut_off_are_outside():
    ids, scored = torch.tensor([[2, 1, 2, 0]]), torch.tensor([[0, 1, 0, 1]])
    assert word_tags(ids, scored, ["O", "B-X", "I-X"], [3]) == [["B-X", "O", "O"]]
