"""Mask infilling against a reference that masks by writing `[MASK]` into the text, and its invariants."""

from __future__ import annotations

import random
import string
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from texts import check_alone_and_keyed, check_copies, check_refusals, make_run, splits_of, transform

from hybridengine.errors import ModelError
from hybridengine.seams import mix
from hybridengine.testing import WORDS, tiny_checkpoint, tiny_tokenizer
from hybridengine.text import STOP_WORDS
from hybridengine_plugins.data.mask_infill import MaskInfill

TEXT = "Good movie, but the ACTOR was (very) boring  and  qwertz."
# What the tiny tokenizer has to write: whole words, and letters that stand alone.
CONTENT = [word for word in (*WORDS, *string.ascii_lowercase) if word not in STOP_WORDS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_checkpoint(tmp_path_factory.mktemp("mlm"), "bert", "AutoModelForMaskedLM"))


@torch.no_grad()
def reference(folder: str, text: str, key: int, share: float, top_k: int, temperature: float, head: str = "") -> str:
    """Which words are masked and what is drawn, one text and one word at a time, from the description."""
    from transformers import AutoModelForMaskedLM

    model, tokenizer = AutoModelForMaskedLM.from_pretrained(folder).double().eval(), tiny_tokenizer()
    rng, words = random.Random(key), text.split(" ")
    cores = [word.strip("(),.") for word in words]
    known = [i for i, core in enumerate(cores) if core and core.lower() not in STOP_WORDS]
    filled = [word for word in words if word]
    count = min(max(1, int(share * len(filled))), len(known))
    chosen = sorted(known.pop(int(rng.random() * len(known))) for _ in range(count))
    masked = [word.replace(cores[i], "[MASK]") if i in chosen else word for i, word in enumerate(words)]
    inputs = tokenizer(head + " ".join(masked), return_tensors="pt")
    logits = model(**inputs).logits[0][inputs["input_ids"][0] == tokenizer.mask_token_id]
    for place, i in enumerate(chosen):
        scores = {word: float(logits[place, tokenizer.convert_tokens_to_ids(word)]) for word in CONTENT}
        scores.pop(cores[i].lower(), None)
        best = sorted(scores, key=lambda word: -scores[word])[:top_k]
        weights = torch.tensor([scores[word] / temperature for word in best]).softmax(0).tolist()
        left = rng.random()
        new = next((w for j, w in enumerate(best) if sum(weights[: j + 1]) > left), best[-1])
        shaped = new.upper() if cores[i].isupper() else new.title() if cores[i].istitle() else new
        words[i] = words[i].replace(cores[i], shaped)
    return " ".join(words)


@pytest.mark.parametrize(("share", "top_k", "temperature"), [(0.2, 5, 1.0), (1.0, 60, 2.0), (0.5, 1, 0.1)])
def test_matches_the_description(folder: str, share: float, top_k: int, temperature: float) -> None:
    method = MaskInfill(folder, share, 8, top_k, temperature, batch_size=3)
    made = [row["text"] for row in transform(method, [TEXT, "nice film", "it was"])["train"].rows[3:]]
    for position, text in enumerate([TEXT, "nice film", "it was"]):
        for copy in range(8):
            key = mix(0, "mask-infill", position, copy)
            wanted = reference(folder, text, key, share, top_k, temperature)
            assert made[8 * position + copy] == wanted
    assert made[16:] == ["it was"] * 8  # stop words alone


@torch.no_grad()
def test_words_come_by_their_probability(folder: str) -> None:
    from transformers import AutoModelForMaskedLM

    method = MaskInfill(folder, copies=2000, top_k=4, batch_size=500)
    drawn = Counter(row["text"].split()[0] for row in transform(method, ["film was"])["train"].rows[1:])
    tokenizer = tiny_tokenizer()
    logits = AutoModelForMaskedLM.from_pretrained(folder).eval()(**tokenizer("[MASK] was", return_tensors="pt")).logits
    scores = {word: float(logits[0, 1, tokenizer.convert_tokens_to_ids(word)]) for word in CONTENT if word != "film"}
    best = sorted(scores, key=lambda word: -scores[word])[:4]
    assert set(drawn) == set(best)
    for word, p in zip(best, torch.tensor([scores[w] for w in best]).softmax(0).tolist(), strict=True):
        # binomial(2000, p); five standard deviations
        assert abs(drawn[word] - 2000 * p) < 5 * (2000 * p * (1 - p)) ** 0.5


def test_invariants_and_keys(folder: str) -> None:
    check_copies(lambda copies: MaskInfill(folder, 0.5, copies), [TEXT, "nice film", "it was"], 3, 1)
    check_alone_and_keyed(lambda copies: MaskInfill(folder, 0.5, copies), TEXT)
    check_refusals(lambda copies: MaskInfill(folder, copies=copies), "mask-infill")


def test_alpha_zero_changes_nothing(folder: str) -> None:
    assert check_copies(lambda copies: MaskInfill(folder, 0.0, copies), [TEXT], 2, 0) == [TEXT] * 2


def test_only_whole_words_are_written_and_never_the_old_one(folder: str) -> None:
    """Neither special tokens nor pieces nor stop words, whatever the model likes best."""
    made = check_copies(lambda copies: MaskInfill(folder, 1.0, copies, top_k=500), ["Movie zzz film"], 60, 0)
    for text in made:
        first, second, third = text.split(" ")
        assert first.lower() in set(CONTENT) - {"movie"} and first.istitle()
        assert second in CONTENT and third in set(CONTENT) - {"film"}


def test_the_label_is_read_before_the_text_and_not_written_into_it(folder: str) -> None:
    plain, told = (
        transform(MaskInfill(folder, 0.3, 6, prepend_label=label), [TEXT, TEXT])["train"].rows[2:]
        for label in (False, True)
    )
    assert [row["text"] for row in plain] != [row["text"] for row in told]
    for index, row in enumerate(told):
        key = mix(0, "mask-infill", index // 6, index % 6)
        assert row["text"] == reference(folder, TEXT, key, 0.3, 10, 1.0, head=f"{row['label']} ")


def test_words_beyond_the_models_length_stay(folder: str) -> None:
    text = " ".join(["movie"] * 100)  # the tiny model takes 64 tokens, two of them special
    (made,) = check_copies(lambda copies: MaskInfill(folder, 1.0, copies), [text], 1, 0)
    changed = [word != "movie" for word in made.split(" ")]
    assert changed == [True] * 62 + [False] * 38


def bpe_checkpoint(folder: Path) -> str:
    """A tiny RoBERTa with byte-level pieces, where a word's first piece carries the space before it."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaConfig, RobertaForMaskedLM, RobertaTokenizerFast

    trained = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained.train_from_iterator([f"{a} {b} {a}{b}" for a in CONTENT[:20] for b in CONTENT[:20]], 700, 2, False, special)
    trained.save_model(str(folder))
    tokenizer = RobertaTokenizerFast.from_pretrained(str(folder), model_max_length=10**30)
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=34, pad_token_id=1, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    RobertaForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_byte_level_pieces_within_a_word_are_not_written(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    method: Any = MaskInfill(bpe_checkpoint(tmp_path), 1.0, 40, top_k=10**6)
    texts = [row["text"] for row in transform(method, ["Movie, food " + "film " * 60])["train"].rows[1:]]
    written = {word.strip(",").lower() for text in texts for word in text.split(" ")[:20]}
    pieces = AutoTokenizer.from_pretrained(tmp_path).get_vocab().keys()
    assert len(written) > 10 and {f"Ġ{word}" for word in written} <= pieces
    assert any(piece.isalpha() and f"Ġ{piece}" not in pieces for piece in pieces)  # others are there to be drawn
    assert all(text.split(" ")[0].istitle() and text.split(" ")[0].endswith(",") for text in texts)
    assert all(
        text.endswith("film film film film ") for text in texts
    )  # 32 tokens at most: positions start past padding


def test_refuses_what_is_no_masked_model(tmp_path: Path, folder: str) -> None:
    def error(path: Any) -> str:
        with pytest.raises(ModelError) as caught:
            MaskInfill(str(path)).transform_data(make_run(), splits_of(["a film"]))
        return str(caught.value)

    assert "mask-infill.model: the folder" in error(tmp_path / "none")
    assert "has no weights for" in error(tiny_checkpoint(tmp_path / "classifier"))
    assert "masked language" in error(tiny_checkpoint(tmp_path / "decoder", "gpt2"))
    tiny_checkpoint(tmp_path / "unmasked", "bert", "AutoModelForMaskedLM")
    tiny_tokenizer("seq2seq").save_pretrained(tmp_path / "unmasked")
    assert "no mask token; give a masked language model" in error(tmp_path / "unmasked")
