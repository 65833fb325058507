"""language-modeling and masked-language-modeling: shifts, masks keyed by row, losses equal transformers' own."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridengine.errors import ConfigError, ModelError
from hybridengine.plugin import Split
from hybridengine.seams import View
from hybridengine.testing.models import WORDS, tiny_bert, tiny_gpt2, tiny_llama, tiny_tokenizer
from hybridengine.testing.tasks import TaskBench, set_up_task
from hybridengine_plugins.tasks.language_modeling import LanguageModeling, split_rows
from hybridengine_plugins.tasks.masked_language_modeling import MaskedLanguageModeling

ROWS = [{"text": "a good movie about london"}, {"text": "dull"}, {"text": "the cat and the dog visited mary in berlin"}]
CAUSAL = {"gpt2": tiny_gpt2, "llama": tiny_llama}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # fp32, sums of at most 64 terms of size ~1 in another order

texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=10).map(" ".join)


def causal(name: str = "llama", side: str = "right", **options) -> TaskBench:
    return set_up_task(
        LanguageModeling(), CAUSAL[name](), tiny_tokenizer("decoder", padding_side=side), ROWS, **options
    )


def masked(side: str = "right", task: MaskedLanguageModeling | None = None, **options) -> TaskBench:
    model = tiny_bert(MaskedLanguageModeling.auto_class)
    return set_up_task(task or MaskedLanguageModeling(), model, tiny_tokenizer(padding_side=side), ROWS, **options)


shared_causal = functools.lru_cache(causal)
shared_masked = functools.lru_cache(masked)


# ---- causal ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CAUSAL)
def test_loss_of_one_row_is_transformers_own(name):
    made = causal(name)
    batch = made.batch(ROWS[:1])
    with torch.no_grad():
        expected = made.run.model(**batch.inputs, labels=batch.inputs["input_ids"]).loss
    assert made.loss(batch) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("side", ["right", "left"])
@settings(max_examples=10, deadline=None)
@given(rows=st.lists(texts, min_size=2, max_size=4))
def test_batch_loss_is_the_sum_of_row_losses(name, side, rows):
    made = shared_causal(name, side)
    rows = [{"text": text} for text in rows]
    together = made.predict(made.batch(rows))
    alone = [made.predict(made.batch([row])) for row in rows]
    torch.testing.assert_close(together.per_row["loss"], torch.cat([p.per_row["loss"] for p in alone]), **CLOSE)
    assert torch.equal(together.per_row["tokens"], torch.cat([p.per_row["tokens"] for p in alone]))
    assert int(together.per_row["tokens"].sum()) == made.batch(rows).counts["tokens"]


@pytest.mark.parametrize("side", ["right", "left"])
def test_targets_are_the_next_tokens(side):
    made = causal(side=side)
    batch = made.batch(ROWS)
    ids, scored = batch.inputs["input_ids"], batch.masks["scored"]["input_ids"]
    for row in range(len(ROWS)):
        at = scored[row].nonzero().flatten()
        assert torch.equal(batch.targets[row, at], ids[row, at + 1])
        real = int(batch.inputs["attention_mask"][row].sum())
        assert len(at) == real - 1
    assert torch.equal(scored == 1, batch.targets != -100)


def test_perplexity_is_exp_of_the_mean_token_loss():
    made = causal()
    found, records = made.evaluate(ROWS, batch_size=2)
    total = sum(r["loss"] * r["tokens"] for r in records)
    tokens = sum(r["tokens"] for r in records)
    assert found["loss"] == pytest.approx(total / tokens, rel=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["tokens"] == tokens


def test_a_row_of_one_token_has_no_loss_and_breaks_nothing():
    tokenizer = tiny_tokenizer("decoder")
    made = set_up_task(LanguageModeling(), tiny_gpt2(), tokenizer, ROWS)
    feature = {"input_ids": [5], "length": 1, "truncated": False}
    batch = made.run.task.collate(made.run, [feature], (0,), None)
    assert batch.counts["tokens"] == 0
    out = made.ctx.loss(made.ctx, batch, View())
    assert float(out.terms["loss"][0].detach()) == 0.0


@settings(max_examples=50, deadline=None)
@given(text=st.text(st.sampled_from("ab \n\t"), min_size=1, max_size=40), words=st.integers(1, 5))
def test_blocks_lose_nothing(text, words):
    split = split_rows(Split("train", [{"text": text, "source": 1}], "f"), words)
    assert "".join(row["text"] for row in split.rows) == text
    assert all(len(row["text"].split()) <= words and row["source"] == 1 for row in split.rows)
    assert set(split.lines) == {1}


def test_blocks_are_made_in_every_split_when_asked():
    splits = {"train": Split("train", [{"text": "a b c d e"}]), "validation": Split("validation", [{"text": "a b"}])}
    made = LanguageModeling(block=2).transform_data(None, splits)
    assert {name: len(split) for name, split in made.items()} == {"train": 3, "validation": 1}
    assert LanguageModeling().transform_data(None, splits) is None


# ---- masked ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@settings(max_examples=20, deadline=None)
@given(rows=st.lists(texts, min_size=1, max_size=5), first=st.integers(0, 1000))
def test_masks_follow_the_row_alone(side, rows, first):
    made, other = shared_masked(side), shared_masked("left" if side == "right" else "right")
    rows = [{"text": text} for text in rows]
    ids = range(first, first + len(rows))
    batch = made.batch(rows, ids)
    for index, row in enumerate(rows):
        for bench_ in (made, other):
            alone = bench_.batch([row], [ids[index]])
            real = batch.inputs["attention_mask"][index] == 1
            assert torch.equal(batch.inputs["input_ids"][index][real], alone.inputs["input_ids"][0])
            assert torch.equal(batch.targets[index][real], alone.targets[0])
        assert (batch.targets[index][batch.inputs["attention_mask"][index] == 0] == -100).all()


def test_masks_use_no_global_stream_and_differ_by_step_and_row():
    made = masked()
    text = {"text": " ".join(WORDS[:40])}
    state = torch.random.get_rng_state()
    first = made.batch([text], [3])
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(7)
    assert torch.equal(first.targets, made.batch([text], [3]).targets)
    assert not torch.equal(first.targets, made.batch([text], [4]).targets)
    assert not torch.equal(first.targets, made.batch([text], [3], step=1).targets)


def test_shares_are_fifteen_percent_and_eighty_ten_ten():
    made = masked()
    rows = [{"text": " ".join(WORDS[:40])} for _ in range(400)]
    original = torch.tensor([made.run.task.features(made.run, rows[:1])[0]["input_ids"]]).expand(400, -1)
    batch = made.batch(rows)
    ids, chosen = batch.inputs["input_ids"], batch.targets != -100
    mask = made.run.tokenizer.mask_token_id
    count = int(chosen.sum())
    # 16,000 ordinary tokens: five standard deviations of each share.
    assert count / (400 * 40) == pytest.approx(0.15, abs=5 * math.sqrt(0.15 * 0.85 / 16000))
    for share, where in ((0.8, ids == mask), (0.1, (ids != mask) & (ids != original))):
        # A random token is a special one 5 times in 203 (then the mask is used) and the original once.
        slack = 5 * math.sqrt(share * (1 - share) / count) + 0.1 * 6 / 203
        assert int((where & chosen).sum()) / count == pytest.approx(share, abs=slack)
    assert torch.equal(ids[~chosen], original[~chosen])
    assert torch.equal(batch.targets[chosen], original[chosen])
    special = torch.tensor(made.run.tokenizer.all_special_ids)
    assert not (torch.isin(original, special) & chosen).any()
    assert not torch.isin(ids[chosen & (ids != mask)], special).any()
    assert batch.counts["tokens"] == count


def test_every_row_hides_at_least_one_token_and_none_is_perturbable():
    made = masked()
    batch = made.batch([{"text": word} for word in WORDS])
    assert ((batch.targets != -100).sum(1) == 1).all()
    hidden = batch.inputs["input_ids"] == made.run.tokenizer.mask_token_id
    assert not (hidden & (batch.masks["perturbable"]["input_ids"] == 1)).any()


def test_masked_loss_and_accuracy_are_over_hidden_tokens():
    made = masked()
    batch = made.batch(ROWS)
    with torch.no_grad():
        expected = made.run.model(**batch.inputs, labels=batch.targets).loss
    assert made.loss(batch) == pytest.approx(float(expected), rel=1e-5)
    found, _ = made.evaluate(ROWS)
    with torch.no_grad():
        guess = made.run.model(**batch.inputs).logits.argmax(-1)
    hidden = batch.targets != -100
    assert found["accuracy"] == pytest.approx(float((guess == batch.targets)[hidden].float().mean()))


def test_what_a_masked_model_needs_is_checked():
    with pytest.raises(ModelError, match="no mask token"):
        set_up_task(MaskedLanguageModeling(), tiny_bert("AutoModelForMaskedLM"), tiny_tokenizer("decoder"), ROWS)
    with pytest.raises(ValueError, match="must not exceed 1"):
        MaskedLanguageModeling(masked=0.8, replaced=0.3)
    with pytest.raises(ConfigError, match="perplexity"):
        causal(metric="accuracy")
    assert masked(metric="accuracy").evaluate(ROWS)[0]["rows"] == 3


def test_a_missing_head_is_told():
    made = masked()
    made.run.missing_parameters = ["cls.predictions.bias"]
    made.run.task.configure(made.run, made.run.model)
    assert any("has no masked-language-model head" in note for note in made.run.notes)


def test_a_batch_without_hidden_tokens_has_loss_zero():
    made = masked()
    batch = made.batch(ROWS)
    empty = replace(batch, targets=torch.full_like(batch.targets, -100))
    loss = made.ctx.loss(made.ctx, empty, View()).terms["loss"][0]
    loss.backward()
    assert float(loss.detach()) == 0.0
    gradients = [p.grad for p in made.run.model.parameters() if p.grad is not None]
    assert gradients and all((g == 0).all() for g in gradients)
