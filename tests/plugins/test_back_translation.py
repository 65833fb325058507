"""Back-translation against token-by-token decoding without batches or caches, and its invariants."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from texts import check_alone_and_keyed, check_copies, check_refusals, make_run, splits_of, transform

from hybridengine.errors import ModelError
from hybridengine.seams import mix
from hybridengine.testing import tiny_checkpoint, tiny_tokenizer
from hybridengine_plugins.data.back_translation import BackTranslation

TEXTS = ["good movie. boring plot! was it", "nice food", "the actor"]


def marian(folder: Path) -> Path:
    from transformers import MarianConfig, MarianMTModel

    tokenizer = tiny_tokenizer("seq2seq")
    config = MarianConfig(
        vocab_size=len(tokenizer), d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=40, init_std=0.3,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        decoder_start_token_id=tokenizer.pad_token_id, forced_eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(3)
    MarianMTModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("translators")
    return {"there": str(tiny_checkpoint(folder / "t5", "t5")), "back": str(marian(folder / "marian"))}


@torch.no_grad()
def reference(pair: dict[str, str], text: str, key: int, method: BackTranslation) -> str:
    """Both ways for one text: all tokens read again for each new one."""
    from transformers import AutoModelForSeq2SeqLM

    tokenizer, out = tiny_tokenizer("seq2seq"), []
    sentences = text.replace("! ", "!|").replace(". ", ".|").split("|")
    for index, sentence in enumerate(sentences):
        said = sentence
        for way, prefix in (("there", method.prefix_there), ("back", method.prefix_back)):
            model = AutoModelForSeq2SeqLM.from_pretrained(pair[way]).eval()
            rng = random.Random(mix(mix(key, index), way))
            inputs = tokenizer(prefix + said, return_tensors="pt")
            tokens = [tokenizer.pad_token_id]
            for _ in range(method.max_new_tokens):
                logits = model(input_ids=inputs["input_ids"], decoder_input_ids=torch.tensor([tokens])).logits[0, -1]
                order = logits.double().argsort(descending=True)[: method.top_k]
                chances = (logits.double()[order] / method.temperature).softmax(0).cumsum(0)
                tokens.append(int(order[int((chances <= rng.random()).sum())]))
                if tokens[-1] == tokenizer.eos_token_id:
                    break
            said = tokenizer.decode(tokens, skip_special_tokens=True).strip()
        out.append(said or sentence)
    return " ".join(out)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_matches_decoding_by_hand(pair: dict[str, str], batch_size: int) -> None:
    options: dict[str, Any] = {"prefix_there": "say: ", "prefix_back": "b ", "max_new_tokens": 6, "temperature": 1.2}
    method = BackTranslation(**pair, copies=2, top_k=20, batch_size=batch_size, **options)
    made = transform(method, TEXTS)["train"].rows[3:]
    for index, row in enumerate(made):
        text, key = TEXTS[index // 2], mix(0, "back-translation", index // 2, index % 2)
        assert row["text"] == reference(pair, text, key, method)


def test_invariants_and_keys(pair: dict[str, str]) -> None:
    def make(copies: int) -> BackTranslation:
        return BackTranslation(**pair, copies=copies, max_new_tokens=6)

    made = check_copies(make, TEXTS, 3, 1)
    assert len(set(made)) > len(TEXTS)
    check_alone_and_keyed(make, TEXTS[0])
    check_refusals(make, "back-translation")


def test_near_temperature_zero_all_copies_are_the_likeliest(pair: dict[str, str]) -> None:
    made = check_copies(lambda n: BackTranslation(**pair, copies=n, max_new_tokens=6, temperature=1e-4), TEXTS, 3, 0)
    assert all(len(set(made[i : i + 3])) == 1 for i in (0, 3, 6))


def test_sentences_that_are_too_long_stay(pair: dict[str, str]) -> None:
    long = "good " * 70 + "movie."  # more than the 64 tokens of the tokenizer; the models would take 40
    (made,) = check_copies(lambda n: BackTranslation(**pair, copies=n, max_new_tokens=4), [f"{long} nice food."], 1, 0)
    assert made.startswith(f"{long} ") and not made.endswith("nice food.")


def test_a_tokenizer_without_tokenizer_json_will_do(tmp_path: Path) -> None:
    """ByT5's reads bytes and has no files at all."""
    from transformers import ByT5Tokenizer

    folder = tiny_checkpoint(tmp_path / "byt5", "t5", vocab_size=384, pad_token_id=0, eos_token_id=1)
    for file in folder.glob("*token*.json"):
        file.unlink()
    ByT5Tokenizer().save_pretrained(folder)
    check_copies(lambda n: BackTranslation(str(folder), str(folder), n, max_new_tokens=9), TEXTS, 2, 0)


def test_refuses_what_is_no_translator(tmp_path: Path, pair: dict[str, str]) -> None:
    def error(**folders: str) -> str:
        with pytest.raises(ModelError) as caught:
            BackTranslation(**{**pair, **folders}).transform_data(make_run(), splits_of(["a film"]))
        return str(caught.value)

    assert "back-translation.back: the folder" in error(back=str(tmp_path / "none"))
    assert "encoder-decoder" in error(there=str(tiny_checkpoint(tmp_path / "bert")))
    silent = tiny_checkpoint(tmp_path / "silent", "t5", decoder_start_token_id=None)
    assert "has no decoder_start_token_id" in error(back=str(silent))
