"""The episodic sampler's invariants, and adaptation at test time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridengine.batches import Assembler
from hybridengine.errors import DataError
from hybridengine.plugin import Split
from hybridengine.seams import Prediction, View
from hybridengine.stack.compose import evaluation
from hybridengine.testing import make_batch, set_up, tiny_bert, tiny_tokenizer
from hybridengine_plugins.meta.episodes import Episodes
from hybridengine_plugins.meta.maml import MAML
from hybridengine_plugins.regularize.label_smoothing import LabelSmoothing
from hybridengine_plugins.tasks.text_classification import TextClassification

MODEL = tiny_bert(num_labels=3)


def _rows(sizes, prefix="class"):
    """`sizes[i]` rows of class i, interleaved."""
    labelled = [(position, f"{prefix} {i}") for i, size in enumerate(sizes) for position in range(size)]
    return [{"text": f"good {n} movie", "label": label} for n, (_, label) in enumerate(sorted(labelled))]


def _run(splits, method, seed=0):
    def prepare(run):
        run.tokenizer = tiny_tokenizer()
        run.splits = {name: Split(name, rows) for name, rows in splits.items()}
        run.task.prepare(run, run.splits["train"].rows)
        method.transform_data(run, run.splits)

    return set_up([], MODEL, make_batch(), task=TextClassification(), prepare=prepare, seed=seed).run


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=7),
    ways=st.integers(2, 4),
    shots=st.integers(1, 3),
    queries=st.integers(1, 3),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 2),
)
def test_sampler_invariants(sizes, ways, shots, queries, seed, epoch):
    method = Episodes(ways=ways, shots=shots, queries=queries, per_epoch=6)
    run = _run({"train": _rows(sizes)}, method, seed)
    labels = [row["label"] for row in run.splits["train"].rows]
    large = sum(size >= shots + queries for size in sizes)
    if large < ways:
        with pytest.raises(DataError, match=f"{len(sizes)} classes, {large} of them.*needs {ways}"):
            method.build_sampler(run, "train")
        return
    draws = method.build_sampler(run, "train")(epoch)
    assert len(draws) == 6
    assert draws == method.build_sampler(run, "train")(epoch)  # reproducible
    for draw in draws:
        split, support = draw.parts["support"]
        assert split == "train" and draw.parts["query"] == ("train", draw.rows)
        assert not set(support) & set(draw.rows)
        assert len(set(support)) == ways * shots and len(set(draw.rows)) == ways * queries
        chosen = [labels[i] for i in support]
        assert len(set(chosen)) == ways and set(chosen) == {labels[i] for i in draw.rows}
        assert all(chosen.count(label) == shots for label in chosen)
        assert sorted(draw.relabel.values()) == list(range(ways))
        assert {method._classes[c] for c in draw.relabel} == set(chosen)


def test_epochs_and_seeds_differ_in_training_but_evaluation_is_fixed():
    splits = {"train": _rows([8] * 6), "validation": _rows([8] * 6, "new"), "unlabelled": [{"text": "a"}]}
    method = Episodes(ways=3, per_epoch=20, evaluation_episodes=7)
    run = _run(splits, method)
    train, validation = method.build_sampler(run, "train"), method.build_sampler(run, "validation")
    assert train(0) != train(1)
    assert train(0) != method.build_sampler(_run(splits, method, seed=1), "train")(0)
    assert len(validation(0)) == 7 and validation(0) == validation(3)
    assert method.build_sampler(run, "unlabelled") is None
    numberings = {tuple(d.relabel[c] for c in sorted(d.relabel)) for d in train(0)}
    assert len(numberings) > 1  # a class has no number of its own


def test_unseen_classes_of_other_splits_get_numbers_and_the_head_has_ways():
    method = Episodes(ways=3, shots=2, queries=2, evaluation_episodes=2)
    run = _run({"train": _rows([6] * 4), "validation": _rows([6] * 5, "new"), "test": _rows([6] * 4)}, method)
    assert run.labels == ["way 0", "way 1", "way 2"]
    assert run.task.model_options(run)["num_labels"] == 3
    assert not any("validation split also" in note for note in run.notes)
    assert any("4 of 4 classes of the test split also" in note for note in run.notes)
    features = {name: run.task.features(run, split.rows) for name, split in run.splits.items()}
    for split in ("train", "validation"):
        for draw in method.build_sampler(run, split)(0):
            batch = Assembler(run, features).batch(split, draw, 0)
            assert sorted(batch.targets.tolist()) == [0, 0, 1, 1, 2, 2]
            assert sorted(batch.parts["support"].targets.tolist()) == [0, 0, 1, 1, 2, 2]
            assert batch.parts["query"].rows == batch.rows and batch.counts["episodes"] == 1
            by_row = {run.splits[split].rows[i]["label"]: int(t) for i, t in zip(draw.rows, batch.targets, strict=True)}
            support = draw.parts["support"][1]
            for i, target in zip(support, batch.parts["support"].targets, strict=True):
                assert by_row[run.splits[split].rows[i]["label"]] == int(target)


def test_small_classes_are_left_out_and_counted():
    method = Episodes(ways=2, shots=1, queries=2)
    run = _run({"train": _rows([5, 2, 5, 1])}, method)
    for draw in method.build_sampler(run, "train")(0):
        assert {method._classes[c] for c in draw.relabel} == {"class 0", "class 2"}
    assert any("2 classes of the train split have fewer than 3 rows" in note for note in run.notes)


def test_rows_with_several_labels_are_refused():
    method = Episodes(ways=2)
    with pytest.raises(DataError, match="one label"):
        _run({"train": [{"text": "a", "label": "x"}, {"text": "b", "label": ["x", "y"]}]}, method)


# ---- adaptation at test time -----------------------------------------------------------------------------------------


def _batch():
    query = make_batch(4, 7, seed=3)
    return replace(query, parts={"support": make_batch(6, 6, seed=4, first_row=40), "query": query})


def _support_loss(bench, view):
    support = _batch().parts["support"]
    with torch.no_grad():
        return float(bench.ctx.task_loss(support, view).terms["loss"][0]) / support.size


def test_adaptation_lowers_the_support_loss_and_leaves_the_model_alone():
    seen = []
    method = Episodes(ways=3, adapt_steps=5, adapt_lr=0.05)
    bench = set_up([method], tiny_bert(num_labels=3).double(), _batch())
    before = bench.parameters()
    view = View(key=7)
    with evaluation(bench.ctx, bench.hooks), torch.no_grad():
        plain = bench.ctx.outputs(_batch(), [view])[0].scores.softmax(-1)
        prediction = bench.ctx.predict(bench.ctx, _batch(), view)
        method.wrap_predict(lambda ctx, batch, view: seen.append(view), bench.ctx, _batch(), view)
        assert _support_loss(bench, seen[0]) < 0.9 * _support_loss(bench, view)
        reference = bench.ctx.outputs(_batch(), [seen[0]])[0].scores.softmax(-1)
    assert not torch.equal(prediction.scores, plain)
    assert torch.equal(prediction.scores, reference)
    assert not prediction.scores.requires_grad
    assert all(torch.equal(before[k], p) and p.grad is None for k, p in bench.run.may_optimise.items())


def test_adaptation_reports_no_effects_of_training():
    bench = set_up([Episodes(ways=3), LabelSmoothing()], tiny_bert(num_labels=3), _batch())
    bench.step([make_batch()])
    bench.run.step = 0  # the method measures in every tenth step

    def count():
        bench.effects.flush()
        return bench.effects.summary()["label-smoothing"]["loss_change"]["count"]

    assert count() == 1
    with evaluation(bench.ctx, bench.hooks), torch.no_grad():
        bench.ctx.predict(bench.ctx, _batch(), View(key=7))
    assert count() == 1
    bench.step([make_batch()])
    assert count() == 2


def test_adaptation_is_plain_gradient_descent():
    model = tiny_bert(num_labels=3).double().eval()
    optimizer = torch.optim.SGD(model.classifier.parameters(), lr=0.2)
    support = _batch().parts["support"]
    for _ in range(3):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(**support.inputs).logits, support.targets)
        loss.backward()
        optimizer.step()
    expected = model(**_batch().inputs).logits.softmax(-1)
    method = Episodes(ways=3, adapt_steps=3, adapt_lr=0.2, adapt_parameters=["classifier*"])
    bench = set_up([method], tiny_bert(num_labels=3).double(), _batch())
    with evaluation(bench.ctx, bench.hooks):
        prediction = bench.ctx.predict(bench.ctx, _batch(), View(key=0))
    torch.testing.assert_close(prediction.scores, expected.detach(), rtol=1e-9, atol=1e-12)


def test_rows_without_support_are_predicted_as_they_are():
    bench = set_up([Episodes(ways=3)], tiny_bert(num_labels=3), make_batch())
    with evaluation(bench.ctx, bench.hooks), torch.no_grad():
        scores = bench.ctx.predict(bench.ctx, make_batch(), View()).scores
        assert torch.equal(scores, bench.ctx.outputs(make_batch(), [View()])[0].scores.softmax(-1))


@pytest.mark.parametrize("main", ["accuracy", "loss"])
def test_the_interval_resamples_episodes(main):
    """Where every episode is all right or all wrong, it is that of so many coin throws, not of so many rows."""
    method = Episodes(ways=2, shots=1, queries=2, adapt_steps=0)
    bench = set_up([method], tiny_bert(num_labels=2), make_batch())
    values = [1.0] * 30 + [0.0] * 10
    for index, value in enumerate(values):
        query = make_batch(4, 6, classes=2, first_row=4 * index)
        hit = query.targets if value else 1 - query.targets
        batch = replace(query, parts={"support": make_batch(2, 6, first_row=1000 + 2 * index), "query": query})
        terms = {"loss": (torch.tensor(4 * value), "rows")}
        made = Prediction(torch.nn.functional.one_hot(hit, 2).float(), terms=terms)
        method.wrap_predict(lambda ctx, batch, view, made=made: made, bench.ctx, batch, View(key=0))
    result = method.transform_metrics(bench.run, {"main": main, main: 0.75, "rows": 160})
    assert result["episodes"] == 40
    low, high = result["ci95"]
    # 1.96 standard errors of 40 throws are 0.134; BCa's ends are skewed, by less than one episode's share each
    assert abs((0.75 - low) - 0.134) < 0.03 and abs((high - 0.75) - 0.134) < 0.03
    again = method.transform_metrics(bench.run, {"main": main, main: 0.75, "rows": 160})
    assert "ci95" not in again  # what was counted belongs to one evaluation


def test_metrics_that_are_no_mean_over_episodes_have_no_interval():
    method = Episodes(ways=3, queries=1, adapt_steps=0)
    bench = set_up([method], tiny_bert(num_labels=3), _batch())
    method._episodes = {(0,): {"accuracy": 1.0}, (1,): {"accuracy": 0.0}}
    result = method.transform_metrics(bench.run, {"main": "f1_macro", "f1_macro": 0.5, "rows": 6})
    assert result["ci95"] is None and any("no interval" in note for note in bench.run.notes)


WORDS = "good bad great awful fine poor happy sad love hate movie film book food phone plot cat dog man woman".split()


def test_meta_training_improves_adaptation_to_unseen_classes():
    """A class is the second word of a row. After meta-training on 14 words, adaptation separates 6 other words."""

    def rows(words):
        other = "a an the this that it is was".split()
        texts = [f"{other[i]} {word} {other[(i * 3 + 1) % 8]}" for word in words for i in range(6)]
        return [{"text": text, "label": text.split()[1]} for text in texts]

    head = ["classifier*"]
    method = Episodes(2, 3, 3, per_epoch=60, evaluation_episodes=20, adapt_steps=2, adapt_lr=0.5, adapt_parameters=head)

    def prepare(run):
        run.tokenizer = tiny_tokenizer()
        run.splits = {"train": Split("train", rows(WORDS[:14])), "test": Split("test", rows(WORDS[14:]))}
        run.task.prepare(run, run.splits["train"].rows)
        method.transform_data(run, run.splits)

    maml = MAML(inner_lr=0.5, inner_steps=2, inner_parameters=head)
    model = tiny_bert(num_labels=2, num_hidden_layers=1)
    bench = set_up([method, maml], model, make_batch(), task=TextClassification(), prepare=prepare)
    run = bench.run
    run.optimizer = torch.optim.Adam(list(run.may_optimise.values()), lr=3e-3)
    features = {name: run.task.features(run, split.rows) for name, split in run.splits.items()}
    assembler = Assembler(run, features)

    def loss():
        total = 0.0
        with evaluation(bench.ctx, bench.hooks), torch.no_grad():
            for draw in method.build_sampler(run, "test")(0):
                batch = assembler.batch("test", draw, 0)
                prediction = bench.ctx.predict(bench.ctx, batch, View(key=0))
                total += float(prediction.terms["loss"][0]) / batch.size / 20
        return total

    before = loss()
    draws = method.build_sampler(run, "train")(0)
    for start in range(0, 60, 3):
        bench.step([assembler.batch("train", draw, start) for draw in draws[start : start + 3]])
    assert loss() < 0.7 * before  # 0.69 is what guessing costs
