"""Rows of a run by their ids, the cloze that methods share, and what a language model's output layer reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hybridengine.data.rows import Split
from hybridengine.errors import ModelError
from hybridengine.seams import Batch
from hybridengine.testing import make_batch, set_up, tiny_bert, tiny_gpt2, tiny_llama, tiny_tokenizer
from hybridengine.text import AtMask, Cloze, WordSimilarity, pieces_of
from hybridengine.text.head_input import HeadInput

MODELS = {"bert": (tiny_bert, "encoder"), "gpt2": (tiny_gpt2, "decoder"), "llama": (tiny_llama, "decoder")}


def language_model(name: str) -> tuple[Any, Any]:
    build, family = MODELS[name]
    model = build("AutoModelForMaskedLM") if name == "bert" else build()
    return model.double(), tiny_tokenizer(family)


def test_rows_by_their_ids() -> None:
    run = set_up([], tiny_bert(num_labels=3), make_batch()).run
    train = Split("train", [{"text": "a"}, {"text": "b"}])
    test = Split("test", [{"text": "c"}])
    run.splits = {"train": train, "test": test}
    ids = (*train.ids([1, 0]), *test.ids([0]))
    assert [row["text"] for row in run.rows_of(ids)] == ["b", "a", "c"]
    first = run.make_up([{"text": "x"}, {"text": "y"}])
    second = run.make_up([{"text": "z"}])
    assert [row["text"] for row in run.rows_of((*second, *ids[:1], *first))] == ["z", "b", "x", "y"]
    with pytest.raises(KeyError, match="no split holds the row"):
        run.rows_of(train.ids([2]))


@pytest.mark.parametrize("name", MODELS)
def test_the_states_give_the_logits_that_are_spared(name: str) -> None:
    model, tokenizer = language_model(name)
    batch = make_batch()
    whole = model(**batch.inputs).logits
    kept = HeadInput(model, tokenizer)
    with kept.whole():
        assert torch.equal(model(**batch.inputs).logits, whole)
    spared = model(**batch.inputs).logits
    assert spared.shape == (4, 1, whole.shape[2])
    made = nn.functional.linear(kept.take(), kept.layer.weight, kept.layer.bias)
    # one product over fewer rows sums in another order
    torch.testing.assert_close(made, whole, rtol=1e-12, atol=1e-12)
    with pytest.raises(AssertionError, match="no forward"):
        kept.take()


def test_a_model_without_such_a_layer_is_refused() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = tiny_llama(), nn.Linear(32, 60)

        def get_output_embeddings(self) -> nn.Module:
            return self.head

        def forward(self, **inputs: Any) -> Any:
            return self.inner(**inputs)

    for model in (tiny_bert(num_labels=3), Unused()):
        with pytest.raises(ModelError, match=r"has no output layer .*; use a template"):
            HeadInput(model, tiny_tokenizer("encoder"))


def test_a_cloze_takes_other_words_and_another_verbalizer() -> None:
    model, tokenizer = language_model("llama")
    cloze = Cloze(tokenizer, pieces_of("{text} it was [MASK]."), [["great"], ["qx"]], masked=False)
    cloze.install(model)
    assert len(model._forward_pre_hooks) == 1  # for `qx`, which is two tokens
    cloze.use([["good"], ["bad"]])
    assert not model._forward_pre_hooks
    (feature,) = cloze.encode([{"text": "a book"}], 20)
    ids = torch.tensor([feature["input_ids"]])
    batch = Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    logits = model(**batch.inputs).logits
    words = tokenizer.convert_tokens_to_ids(["good", "bad"])
    torch.testing.assert_close(cloze.classify(logits, batch), logits[:, -1].log_softmax(-1)[:, words])

    class First:
        def class_logits(self, seen: AtMask) -> torch.Tensor:
            return seen.logits[:, 0, :2]

    cloze.verbalizer = First()
    assert torch.equal(cloze.classify(logits, batch), logits[:, -1, :2])


@pytest.mark.parametrize("masked", [True, False])
def test_rows_may_have_templates_of_their_own(masked: bool) -> None:
    tokenizer = tiny_tokenizer("encoder" if masked else "decoder")
    cloze = Cloze(tokenizer, pieces_of("{text} it was [MASK]."), [["good"], ["bad"]], masked)
    rows = [{"text": "a book", "also": "fine"}] * 2
    other = pieces_of("{also} and {text} is [MASK]!")
    mine, theirs = cloze.encode(rows, 20, [cloze.pieces, other])
    assert mine == cloze.encode(rows[:1], 20)[0]
    said = tokenizer.convert_ids_to_tokens(theirs["input_ids"])
    ends = ["[MASK]", "!", "[SEP]"] if masked else []
    assert said == ["[CLS]" if masked else "<s>", "fine", "and", "a", "book", "is", *ends]
    assert theirs["perturbable"] == [0, 1, 0, 1, 1, 0, *[0] * len(ends)]


def test_similarity_is_that_of_scikit_learn() -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = ["A good film, a GOOD one", "the plot was bad", "", "film of the year 1999", "好 电 影"]
    vectors = TfidfVectorizer(token_pattern=r"\w+").fit(texts)
    known = WordSimilarity(texts)
    for query in [*texts, "a film unheard of", "nothing shared"]:
        expected = (vectors.transform([query]) @ vectors.transform(texts).T).toarray()[0]
        assert known.to(query) == pytest.approx(list(expected), abs=1e-12)
    assert WordSimilarity(["好电影", "坏书"]).to("一部电影")[0] > 0  # no spaces between words
