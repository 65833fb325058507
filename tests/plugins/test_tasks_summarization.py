"""summarization: both embeddings are sites, losses are transformers' own, ROUGE is rouge-score's."""

from __future__ import annotations

import functools
import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from hybridengine.errors import ConfigError, DataError
from hybridengine.seams import View
from hybridengine.testing.models import WORDS, tiny_t5, tiny_tokenizer
from hybridengine.testing.tasks import TaskBench, set_up_task
from hybridengine_plugins.tasks.summarization import Summarization

ROWS = [
    {"text": "mary visited london with a good friend", "summary": "mary in london"},
    {"text": "the book was dull", "summary": "dull book"},
    {"text": "a cat", "summary": "the cat is happy and very funny"},
]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # fp32, sums of at most 64 terms of size ~1 in another order
pairs = st.tuples(*[st.lists(st.sampled_from(WORDS), min_size=1, max_size=8).map(" ".join)] * 2)


def bench(task: Summarization | None = None, side: str = "right", **options) -> TaskBench:
    task = task or Summarization(max_new_tokens=8)
    return set_up_task(task, tiny_t5(), tiny_tokenizer("seq2seq", padding_side=side), ROWS, **options)


shared = functools.lru_cache(bench)


def test_loss_is_transformers_own():
    made = bench()
    batch = made.batch(ROWS)
    inputs = {k: batch.inputs[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = made.run.model(**inputs, labels=batch.targets)
    assert made.loss(batch) == pytest.approx(float(expected.loss), rel=1e-5)
    (out,) = made.ctx.outputs(batch, [View()])
    torch.testing.assert_close(out.scores.detach(), expected.logits, **CLOSE)
    assert batch.counts["tokens"] == int((batch.targets != -100).sum())


@settings(max_examples=15, deadline=None)
@given(rows=st.lists(pairs, min_size=2, max_size=4))
def test_batch_loss_is_the_sum_of_row_losses(rows):
    made = shared()
    rows = [{"text": text, "summary": summary} for text, summary in rows]
    batch = made.batch(rows)
    (out,) = made.ctx.outputs(batch, [View()])
    together = made.run.task.terms(out.scores.detach(), batch)["loss"][0]
    alone = []
    for row in rows:
        single = made.batch([row])
        (out,) = made.ctx.outputs(single, [View()])
        alone.append(made.run.task.terms(out.scores.detach(), single)["loss"][0])
    torch.testing.assert_close(together, torch.stack(alone).sum(), **CLOSE)


def test_both_embeddings_are_sites_and_take_a_delta():
    made = bench()
    assert {site.input for site in made.run.sites.table.values()} == {"input_ids", "decoder_input_ids"}
    batch = made.batch(ROWS)
    clean = made.loss(batch)
    for site, zero in made.ctx.zeros(batch).items():
        mask = made.ctx.mask(batch, site)
        assert mask.shape == zero.shape[:2]
        moved = zero + 0.5 * mask[..., None]
        loss = made.ctx.loss(made.ctx, batch, View().plus({site: moved})).terms["loss"][0]
        assert abs(float(loss.detach()) / batch.counts["tokens"] - clean) > 1e-4


def test_start_and_end_tokens_of_the_decoder_are_not_perturbable():
    made = bench()
    batch = made.batch(ROWS)
    ids, on = batch.inputs["decoder_input_ids"], batch.masks["perturbable"]["decoder_input_ids"]
    real = batch.targets != -100
    special = torch.isin(ids, torch.tensor([made.run.tokenizer.pad_token_id, made.run.tokenizer.eos_token_id]))
    assert torch.equal(on == 1, real & ~special)
    assert (ids[:, 0] == made.run.model.config.decoder_start_token_id).all() and (on[:, 0] == 0).all()


def test_rouge_and_records_agree_with_rouge_score():
    made = bench()
    found, records = made.evaluate(ROWS, batch_size=2)
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    for name in ("rouge1", "rougeL"):
        each = [scorer.score(r["label"], r["prediction"])[name].fmeasure for r in records]
        assert found[name] == pytest.approx(sum(each) / 3)
    assert found["loss"] > 0 and found["rows"] == 3


def test_generation_is_greedy_search_with_or_without_neighbours():
    made = bench()
    batch = made.batch(ROWS)
    generated = made.predict(batch).generated
    for index, row in enumerate(ROWS):
        alone = made.predict(made.batch([row])).generated[0]
        assert torch.equal(generated[index, : len(alone)], alone)
    beams = bench(Summarization(num_beams=3, max_new_tokens=5)).predict(batch).generated
    assert beams.shape[1] <= 6


def test_rows_without_summary_are_summarised():
    made = bench()
    rows = [{"text": "a good movie"}, {"text": "cat"}]
    batch = made.batch(rows)
    prediction = made.predict(batch)
    records = list(made.run.task.records(made.run, batch, prediction, rows))
    assert batch.targets is None and prediction.terms == {} and set(records[0]) == {"text", "prediction"}
    with pytest.raises(DataError, match="no summary"):
        made.loss(batch)


def test_prefix_and_length_limits():
    made = bench(Summarization(prefix="good ", max_new_tokens=3), max_length=4)
    (feature,) = made.run.task.features(made.run, [{"text": "a b c d e", "summary": "a b c d e"}])
    tokens = made.run.tokenizer.convert_ids_to_tokens(feature["input_ids"])
    assert tokens[0] == "good" and len(tokens) == 4 and feature["truncated"]
    assert len(feature["label"]) == 3 and feature["label"][-1] == made.run.tokenizer.eos_token_id


def test_missing_rouge_is_a_clear_error(monkeypatch):
    run = bench().run
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'hybridengine\[summarization\]'"):
        Summarization().prepare(run, ROWS)
