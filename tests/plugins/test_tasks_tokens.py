"""token-classification: words align with first pieces, whatever the tokenizer makes of them; metrics as seqeval's."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval.metrics import f1_score, precision_score, recall_score
from tokenizers import normalizers
from torch.nn import functional

from hybridengine.seams import View
from hybridengine.testing.models import tiny_bert, tiny_llama, tiny_tokenizer
from hybridengine.testing.tasks import TaskBench, set_up_task
from hybridengine_plugins.tasks.token_classification import TokenClassification

AUTO = TokenClassification.auto_class
TAGS = ["B-LOC", "B-PER", "I-PER", "O"]
ROWS = [
    {"tokens": ["mary", "visited", "xanadu", "."], "tags": ["B-PER", "O", "B-LOC", "O"]},
    {"tokens": ["john", "smith", "lives"], "tags": ["B-PER", "I-PER", "O"]},
    {"tokens": ["good", "dog"], "tags": ["O", "O"]},
]
words = st.one_of(
    st.sampled_from(["mary", "paris", "zyx", "☃☃", "\u200b", "a.b"]), st.text("abcxyz", min_size=1, max_size=5)
)
sentences = st.lists(words, min_size=1, max_size=8)


def bench(side: str = "right", **train) -> TaskBench:
    return set_up_task(
        TokenClassification(), tiny_bert(AUTO, num_labels=4), tiny_tokenizer(padding_side=side), ROWS, **train
    )


shared = functools.lru_cache(bench)  # property tests look at it only


def test_tags_stand_at_first_pieces():
    made = bench()
    batch = made.batch(ROWS)
    tokens = [made.run.tokenizer.convert_ids_to_tokens(row) for row in batch.inputs["input_ids"].tolist()]
    for row, pieces, targets, scored in zip(
        ROWS, tokens, batch.targets.tolist(), batch.masks["scored"]["input_ids"].tolist(), strict=True
    ):
        tags = [made.run.labels[t] for t in targets if t != -100]
        assert tags == row["tags"]
        assert scored == [int(t != -100) for t in targets]
        firsts = [p for p, on in zip(pieces, scored, strict=True) if on]
        assert [f[0] for f in firsts] == [w[0] for w in row["tokens"]]
    assert batch.counts["tokens"] == 9


@pytest.mark.parametrize("side", ["right", "left"])
@settings(max_examples=25, deadline=None)
@given(rows=st.lists(sentences, min_size=1, max_size=3))
def test_every_word_is_scored_once_and_padding_changes_nothing(side, rows):
    made = shared(side)
    rows = [{"tokens": row, "tags": ["O"] * len(row)} for row in rows]
    batch = made.batch(rows)
    assert batch.masks["scored"]["input_ids"].sum(1).tolist() == [len(row["tokens"]) for row in rows]
    (together,) = made.ctx.outputs(batch, [View()])
    for index, row in enumerate(rows):
        alone = made.batch([row])
        (out,) = made.ctx.outputs(alone, [View()])
        # fp32, at most 64 summands in another order
        torch.testing.assert_close(
            together.scores[index][batch.masks["scored"]["input_ids"][index] == 1],
            out.scores[0][alone.masks["scored"]["input_ids"][0] == 1],
            rtol=1e-5,
            atol=1e-5,
        )


@pytest.mark.parametrize("max_length", [64, 4])
def test_words_that_the_tokenizer_drops_keep_their_place(max_length):
    tokenizer = tiny_tokenizer()
    drop = normalizers.Replace("~", "")
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), drop])
    model = tiny_bert(AUTO, num_labels=4)
    made = set_up_task(TokenClassification(), model, tokenizer, ROWS, max_length=max_length)
    row = {"tokens": ["mary", "~", "~~", "london"], "tags": ["B-PER", "O", "O", "B-LOC"]}
    batch = made.batch([row, ROWS[2]])
    targets = batch.targets[0][batch.masks["scored"]["input_ids"][0] == 1]
    assert [made.run.labels[t] for t in targets] == row["tags"][: max_length - 2]


def test_loss_is_summed_over_scored_tokens():
    made = bench()
    batch = made.batch(ROWS)
    (out,) = made.ctx.outputs(batch, [View()])
    expected = functional.cross_entropy(out.scores.flatten(0, 1), batch.targets.flatten())
    assert made.loss(batch) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_metrics_agree_with_seqeval_and_count_words_cut_off():
    made = bench(max_length=6)
    rows = [{**row, "tokens": row["tokens"] * 2, "tags": row["tags"] * 2} for row in ROWS]
    found, records = made.evaluate(rows, batch_size=2)
    truth, guess = [r["label"] for r in records], [r["prediction"] for r in records]
    assert found["f1"] == pytest.approx(f1_score(truth, guess))
    assert found["precision"] == pytest.approx(precision_score(truth, guess))
    assert found["recall"] == pytest.approx(recall_score(truth, guess))
    assert found["words"] == 18 and all(len(r["prediction"]) == len(r["tokens"]) for r in records)
    assert guess[0][-2:] == ["O", "O"]  # beyond six tokens


def test_untagged_rows_are_predicted():
    made = bench()
    rows = [{"tokens": ["a", "dog"]}]
    batch = made.batch(rows)
    prediction = made.predict(batch)
    (record,) = made.run.task.records(made.run, batch, prediction, rows)
    assert set(record) == {"tokens", "prediction"} and len(record["prediction"]) == 2


def test_decoders_tag_words_too():
    made = set_up_task(TokenClassification(), tiny_llama(AUTO, num_labels=4), tiny_tokenizer("decoder"), ROWS)
    assert made.evaluate(ROWS)[0]["rows"] == 3


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "2 tokens but 1 tags"),
        ({"tokens": ["a", 3], "tags": ["O", "O"]}, "strings"),
        ({"tokens": ["a", " "], "tags": ["O", "O"]}, "blank"),
        ({"tokens": ["a"]}, None),
    ],
)
def test_rows_are_checked(row, reason):
    found = TokenClassification().check_row(row)
    assert found is None if reason is None else reason in found
