"""Padding, sides, positions and word blocks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybridengine.data import label_order
from hybridengine.testing.models import tiny_tokenizer
from hybridengine.text.tokens import blocks, padded, special_ids, to_side, tokenise

rows = st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=6), min_size=1, max_size=4)


@given(values=rows)
def test_sides_hold_the_same_tokens(values):
    right, left = padded(values, 0), padded(values, 0, "left")
    lengths = torch.tensor([len(row) for row in values])
    assert torch.equal(to_side(right, lengths, "left"), left)
    assert right.dtype == torch.int64
    assert [r[r != 0].tolist() for r in right] == [r[r != 0].tolist() for r in left] == values


def test_a_text_without_tokens_keeps_one_position():
    (feature,), _ = tokenise(tiny_tokenizer("decoder", words=("a",)), [""], max_length=4)
    assert feature["length"] == 1
    tokenizer = tiny_tokenizer("decoder")
    tokenizer.backend_tokenizer.post_processor = None
    (feature,), _ = tokenise(tokenizer, [""], max_length=4)
    assert feature["input_ids"] == [tokenizer.unk_token_id] and feature["perturbable"] == [0]
    assert tokenise(tokenizer, [], max_length=4) == ([], None)


def test_unknown_is_special_only_where_it_has_another_role():
    tokenizer = tiny_tokenizer()
    assert tokenizer.unk_token_id not in special_ids(tokenizer)
    gpt = tiny_tokenizer("decoder")
    gpt.unk_token = gpt.eos_token
    assert gpt.eos_token_id in special_ids(gpt)


def test_positions_that_a_model_counts_itself_are_left_to_it():
    from transformers import AutoModelForTokenClassification, RobertaConfig

    from hybridengine.testing.tasks import set_up_task
    from hybridengine_plugins.tasks.token_classification import TokenClassification

    data = [{"tokens": ["mary", "visited", "london"], "tags": ["B", "O", "B"]}, {"tokens": ["a"], "tags": ["O"]}]
    found = []
    for side in ("right", "left"):
        tokenizer = tiny_tokenizer(padding_side=side)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = RobertaConfig(
                vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                intermediate_size=32, max_position_embeddings=20, pad_token_id=0, type_vocab_size=2,
            )  # fmt: skip
            model = AutoModelForTokenClassification.from_config(config)
        made = set_up_task(TokenClassification(), model, tokenizer, data, max_length=64)
        batch = made.batch(data)
        assert "position_ids" not in batch.inputs
        found.append(made.loss(batch))
        (long,) = made.run.task.features(made.run, [{"tokens": ["a"] * 40}])
        assert long["length"] == 19  # positions start behind the padding id
        made.predict(made.batch([{"tokens": ["a"] * 40}]))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@given(text=st.text(max_size=60), words=st.integers(1, 4))
def test_blocks_join_to_the_text(text, words):
    assert "".join(blocks(text, words)) == text


def test_label_order():
    assert label_order(["10", "9", "-1"]) == ["-1", "9", "10"]
    assert label_order(["b", "a", "10"]) == ["10", "a", "b"]
    assert label_order(["b", "a"], ["b", "a", "c"]) == ["b", "a", "c"]
