"""text-classification: padding and side change nothing, losses and metrics equal independent ones."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk
from torch.nn import functional

from hybridengine.errors import ConfigError, DataError, ModelError
from hybridengine.seams import View
from hybridengine.testing.models import WORDS, tiny_bert, tiny_gpt2, tiny_llama, tiny_tokenizer
from hybridengine.testing.tasks import TaskBench, set_up_task
from hybridengine_plugins.tasks.text_classification import TextClassification

AUTO = TextClassification.auto_class
ROWS = [
    {"text": "a good movie", "label": "pos"},
    {"text": "this book was very dull and not funny at all", "label": "neg"},
    {"text": "great", "label": "pos"},
    {"text": "it is fine but not great", "label": "mixed"},
]
MODELS = {"bert": (tiny_bert, "encoder"), "gpt2": (tiny_gpt2, "decoder"), "llama": (tiny_llama, "decoder")}
# fp32 sums over at most 64 terms of size ~1 in another order: a few units of 6e-8 x 64.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map(" ".join)


def bench(name: str = "bert", side: str = "right", rows=ROWS, task=None, **options) -> TaskBench:
    build, family = MODELS[name]
    task = task or TextClassification()
    classes = len({label for row in rows for label in _as_list(row["label"])})
    model = build(AUTO, num_labels=classes)
    return set_up_task(task, model, tiny_tokenizer(family, padding_side=side), rows, **options)


shared = functools.lru_cache(bench)  # property tests look at it only


def _as_list(label):
    return label if isinstance(label, list) else [label]


def logits(made: TaskBench, rows) -> torch.Tensor:
    (out,) = made.ctx.outputs(made.batch(rows), [View()])
    return out.scores.detach()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("side", ["right", "left"])
@settings(max_examples=10, deadline=None)
@given(rows=st.lists(texts, min_size=2, max_size=4))
def test_neighbours_and_padding_side_change_no_logits(name, side, rows):
    made = shared(name, side)
    rows = [{"text": text} for text in rows]
    together = logits(made, rows)
    alone = torch.cat([logits(made, [row]) for row in rows])
    other = logits(shared(name, "left" if side == "right" else "right"), rows)
    torch.testing.assert_close(together, alone, **CLOSE)
    torch.testing.assert_close(together, other, **CLOSE)


def test_plain_transformers_would_be_wrong_on_the_left():
    # The test above only means something if positions matter: without position_ids GPT2 gives other logits.
    made = bench("gpt2", "left")
    batch = made.batch(ROWS)
    inputs = {k: v for k, v in batch.inputs.items() if k != "position_ids"}
    with torch.no_grad():
        wrong = made.run.model(**inputs).logits
    assert (wrong - logits(made, ROWS)).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_decoder_without_pad_token_takes_the_end_token_and_says_so(name):
    made = bench(name)
    assert made.run.tokenizer.pad_token == "</s>"
    assert made.run.model.config.pad_token_id == made.run.tokenizer.eos_token_id
    assert any("no padding token" in note for note in made.run.notes)


def test_no_token_can_stand_in_for_padding():
    tokenizer = tiny_tokenizer("decoder")
    tokenizer.eos_token = tokenizer.unk_token = None
    with pytest.raises(ModelError, match="pad_token"):
        set_up_task(TextClassification(), tiny_gpt2(AUTO, num_labels=3), tokenizer, ROWS)


def test_special_tokens_are_not_perturbable():
    made = bench()
    tokenizer = made.run.tokenizer
    batch = made.batch([{"text": "a [SEP] b", "text_pair": "good dog"}, {"text": "x y z a b c", "text_pair": "cat"}])
    ids, on = batch.inputs["input_ids"], batch.masks["perturbable"]["input_ids"]
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    assert torch.equal(on == 0, special)
    assert (ids == tokenizer.sep_token_id).sum() == 5  # two per pair, and one typed into the text
    assert torch.equal(batch.masks["attention"]["input_ids"], (ids != tokenizer.pad_token_id).long())
    assert set(batch.inputs["token_type_ids"].unique().tolist()) == {0, 1}


def test_unknown_words_are_perturbable():
    made = bench()
    batch = made.batch([{"text": "a ☃ b"}])
    unknown = batch.inputs["input_ids"] == made.run.tokenizer.unk_token_id
    assert unknown.sum() == 1 and batch.masks["perturbable"]["input_ids"][unknown].item() == 1


def test_pairs_and_single_texts_in_one_batch_are_as_alone():
    made = bench()
    rows = [{"text": "good", "text_pair": "a bad book"}, {"text": "good"}]
    torch.testing.assert_close(logits(made, rows), torch.cat([logits(made, [row]) for row in rows]), **CLOSE)


def test_truncation_is_recorded_and_keeps_the_end_token():
    made = bench(max_length=8)
    long, short = made.run.task.features(made.run, [{"text": "good " * 30}, {"text": "good"}])
    assert (long["length"], long["truncated"]) == (8, True)
    assert (short["length"], short["truncated"]) == (3, False)
    assert long["input_ids"][-1] == made.run.tokenizer.sep_token_id


def test_length_never_exceeds_the_models_positions():
    tokenizer = tiny_tokenizer("encoder", max_length=10**9)
    model = tiny_bert(AUTO, num_labels=3, max_position_embeddings=16)
    made = set_up_task(TextClassification(), model, tokenizer, ROWS, max_length=512)
    assert made.run.task.features(made.run, [{"text": "good " * 50}])[0]["length"] == 16
    assert any("cut at 16" in note for note in made.run.notes)
    logits(made, [{"text": "good " * 50}])


def test_loss_is_summed_cross_entropy_over_rows():
    made = bench()
    batch = made.batch(ROWS)
    expected = functional.cross_entropy(logits(made, ROWS), torch.tensor([2, 1, 2, 0]))
    assert made.run.labels == ["mixed", "neg", "pos"]
    assert made.loss(batch) == pytest.approx(float(expected), rel=1e-5)
    assert batch.counts == {"rows": 4, "all_rows": 4, "episodes": 1}
    weight = torch.tensor([1.0, 2.0, 3.0])
    got = made.run.task.terms(logits(made, ROWS), batch, weight=weight, label_smoothing=0.2)["loss"][0]
    wanted = functional.cross_entropy(
        logits(made, ROWS), batch.targets, weight=weight, label_smoothing=0.2, reduction="sum"
    )
    torch.testing.assert_close(got, wanted, **CLOSE)


def test_whole_numbers_are_ordered_by_value_and_config_orders_names():
    rows = [{"text": "a", "label": label} for label in (10, 2, 1.0, "2")]
    assert bench(rows=rows, task=TextClassification()).run.labels == ["1", "2", "10"]
    assert bench(task=TextClassification(labels=["pos", "neg", "mixed"])).run.labels == ["pos", "neg", "mixed"]
    mapped = {"data": {"labels": {"p": "pos", "m": "mixed", "n": "neg"}}}
    assert bench(**mapped).run.labels == ["pos", "mixed", "neg"]
    with pytest.raises(DataError, match="lacks"):
        bench(task=TextClassification(labels=["pos", "neg"]))


def test_one_class_is_refused_and_so_is_an_unknown_label():
    with pytest.raises(DataError, match="two classes"):
        bench(rows=[{"text": "a", "label": "x"}] * 3)
    with pytest.raises(DataError, match=r"'poss'.*Did you mean 'pos'"):
        bench().batch([{"text": "a", "label": "poss"}])


@pytest.mark.parametrize(
    ("multi", "label", "reason"),
    [
        (False, ["a"], "multi_label: true"),
        (True, "a", "must be a list"),
        (False, 0.5, "between classes"),
        (False, 1.0, None),
        (False, None, None),
        (True, ["a", 1], None),
    ],
)
def test_labels_of_rows_are_checked(multi, label, reason):
    found = TextClassification(multi_label=multi).check_row({"text": "x", "label": label})
    assert found is None if reason is None else reason in found


def test_unknown_metric_is_refused_before_a_model_is_loaded():
    with pytest.raises(ConfigError, match=r"'acuracy'.*Did you mean 'accuracy'"):
        bench(metric="acuracy")
    with pytest.raises(ConfigError, match="mcc"):
        bench(rows=MULTI, task=TextClassification(multi_label=True), metric="mcc")


def test_metrics_and_records_agree_with_scikit_learn():
    rows = [{"text": " ".join(WORDS[i : i + 3]), "label": ["pos", "neg", "mixed"][i % 3]} for i in range(20)]
    made = bench(rows=rows)
    found, records = made.evaluate(rows)
    truth, guess = [r["label"] for r in records], [r["prediction"] for r in records]
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(truth, guess))
    assert found["f1_macro"] == pytest.approx(sk.f1_score(truth, guess, average="macro"))
    probabilities = [[r["probabilities"][label] for label in made.run.labels] for r in records]
    assert found["loss"] == pytest.approx(sk.log_loss(truth, probabilities, labels=made.run.labels), rel=1e-4)
    assert [r["correct"] for r in records] == [a == b for a, b in zip(truth, guess, strict=True)]
    assert all(math.isclose(sum(p), 1, abs_tol=1e-5) for p in probabilities)
    assert records[0]["text"] == rows[0]["text"]


def test_unlabelled_rows_are_predicted_and_have_no_loss():
    made = bench()
    rows = [{"text": "good"}, {"text": "a dull book"}]
    batch = made.batch(rows)
    prediction = made.predict(batch)
    records = list(made.run.task.records(made.run, batch, prediction, rows))
    assert batch.targets is None and prediction.terms == {}
    assert all(set(r) == {"text", "prediction", "probabilities"} for r in records)
    with pytest.raises(DataError, match="no label"):
        made.loss(batch)


MULTI = [
    {"text": "a good movie", "label": ["good", "movie"]},
    {"text": "dull book", "label": ["book"]},
    {"text": "the cat", "label": []},
    {"text": "a good book of a movie", "label": ["good", "movie", "book"]},
]


def test_multi_label_is_binary_cross_entropy_summed_over_classes():
    made = bench(rows=MULTI, task=TextClassification(multi_label=True))
    assert made.run.labels == ["book", "good", "movie"]
    batch = made.batch(MULTI)
    target = torch.tensor([[0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]])
    assert torch.equal(batch.targets, target)
    expected = functional.binary_cross_entropy_with_logits(logits(made, MULTI), target.float(), reduction="sum") / 4
    assert made.loss(batch) == pytest.approx(float(expected), rel=1e-5)
    found, records = made.evaluate(MULTI, batch_size=3)
    guess = [[int(label in r["prediction"]) for label in made.run.labels] for r in records]
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(target, guess))
    assert found["f1_micro"] == pytest.approx(sk.f1_score(target, guess, average="micro", zero_division=0))
    assert [r["correct"] for r in records] == [g == t for g, t in zip(guess, target.tolist(), strict=True)]


def test_head_patterns_name_the_head_and_nothing_else():
    import fnmatch

    for name, (build, _) in MODELS.items():
        names = [n for n, _ in build(AUTO, num_labels=3).named_parameters()]
        for prefix in ("", "base_model.model."):
            head = {n for n in names if any(fnmatch.fnmatchcase(prefix + n, p) for p in TextClassification.head)}
            assert head == {n for n in names if n.split(".")[0] in ("classifier", "score")}, name
            assert head
