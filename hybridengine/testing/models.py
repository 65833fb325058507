"""Tiny random models and tokenizers, built in milliseconds without any download, for tests of tasks and methods."""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hybridengine.model import quiet
from hybridengine.seams.randomness import seeded

__all__ = ["WORDS", "tiny_bert", "tiny_checkpoint", "tiny_gpt2", "tiny_llama", "tiny_t5", "tiny_tokenizer"]

WORDS: tuple[str, ...] = tuple(
    "a an the this that it is was not very and or but of to in on with for good bad great awful fine poor happy sad"
    " love hate like enjoy movie film book food phone plot actor story service price quality excellent terrible boring"
    " funny dull bright cat dog man woman paris london berlin john mary visited works lives yes no maybe".split()
)
"""Whole words that `tiny_tokenizer` knows; anything else falls apart into characters."""

_SPECIAL = {
    "encoder": {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    },
    "decoder": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "seq2seq": {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"},
}


def tiny_tokenizer(
    family: str = "encoder", *, words: Sequence[str] = WORDS, padding_side: str = "right", max_length: int = 64
) -> Any:
    """A fast lower-casing word-piece tokenizer: known words whole, others as pieces of one character.

    Args:
        family: `encoder` (`[CLS] a [SEP] b [SEP]`, token types, `[MASK]`), `decoder` (`<s> a`, as Llama has it, and no
            pad token) or `seq2seq` (`a </s>`).
        words: whole words of the vocabulary.
        padding_side: `right` or `left`.
        max_length: its `model_max_length`.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    special = _SPECIAL[family]
    characters = string.ascii_lowercase + string.digits + string.punctuation
    pieces = [*special.values(), *words, *characters, *(f"##{c}" for c in characters)]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=special["unk_token"]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    single, pair, used = {
        "encoder": ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ("[CLS]", "[SEP]")),
        "decoder": ("<s> $A", "<s> $A $B", ("<s>",)),
        "seq2seq": ("$A </s>", "$A </s> $B </s>", ("</s>",)),
    }[family]
    tokenizer.post_processor = TemplateProcessing(
        single=single, pair=pair, special_tokens=[(token, vocabulary[token]) for token in used]
    )
    names = (
        ["input_ids", "token_type_ids", "attention_mask"] if family == "encoder" else ["input_ids", "attention_mask"]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side=padding_side,
        model_max_length=max_length,
        model_input_names=names,
        **special,
    )


def tiny_bert(auto_class: str = "AutoModelForSequenceClassification", *, seed: int = 0, **config: Any) -> Any:
    """A random BERT of 2 layers, width 32, dropout 0, for `tiny_tokenizer("encoder")`.

    Args:
        auto_class: name of the transformers class that gives it its head.
        seed: seed of the weights; the global random state is left alone.
        config: further or other entries of its configuration, e.g. `num_labels=3`, `hidden_dropout_prob=0.1`.
    """
    from transformers import BertConfig

    sizes: dict[str, Any] = {
        "vocab_size": len(tiny_tokenizer("encoder")),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.1,
        "pad_token_id": 0,
    }
    return _build(auto_class, BertConfig(**{**sizes, **config}), seed)


def tiny_gpt2(auto_class: str = "AutoModelForCausalLM", *, seed: int = 0, **config: Any) -> Any:
    """A random GPT2 (learned positions) of 2 layers, width 32, dropout 0, for `tiny_tokenizer("decoder")`."""
    from transformers import GPT2Config

    tokenizer = tiny_tokenizer("decoder")
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 64,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "initializer_range": 0.1,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return _build(auto_class, GPT2Config(**{**sizes, **config}), seed)


def tiny_llama(auto_class: str = "AutoModelForCausalLM", *, seed: int = 0, **config: Any) -> Any:
    """A random Llama (rotary positions, no dropout) of 2 layers, width 32, for `tiny_tokenizer("decoder")`."""
    from transformers import LlamaConfig

    tokenizer = tiny_tokenizer("decoder")
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return _build(auto_class, LlamaConfig(**{**sizes, **config}), seed)


def tiny_t5(auto_class: str = "AutoModelForSeq2SeqLM", *, seed: int = 0, **config: Any) -> Any:
    """A random T5 of 2 + 2 layers, width 32, dropout 0, for `tiny_tokenizer("seq2seq")`."""
    from transformers import T5Config

    tokenizer = tiny_tokenizer("seq2seq")
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "d_model": 32,
        "d_kv": 16,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 2,
        "dropout_rate": 0.0,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": tokenizer.pad_token_id,
    }
    return _build(auto_class, T5Config(**{**sizes, **config}), seed)


_FAMILIES = {
    "bert": (tiny_bert, "encoder"),
    "gpt2": (tiny_gpt2, "decoder"),
    "llama": (tiny_llama, "decoder"),
    "t5": (tiny_t5, "seq2seq"),
}


def tiny_checkpoint(folder: Path, architecture: str = "bert", auto_class: str | None = None, **config: Any) -> Path:
    """Save a tiny model and its tokenizer in `folder`, which then serves as `model.name`; returns the folder.

    Args:
        architecture: `bert`, `gpt2`, `llama` or `t5`.
        auto_class: its head; each architecture's own by default.
        config: entries of the model's configuration, or `seed`.
    """
    build, family = _FAMILIES[architecture]
    model = build(auto_class, **config) if auto_class else build(**config)
    with quiet():
        model.save_pretrained(folder)
    tiny_tokenizer(family).save_pretrained(folder)
    return folder


def _build(auto_class: str, config: Any, seed: int) -> Any:
    import transformers

    with seeded(torch.default_generator, seed):
        return getattr(transformers, auto_class).from_config(config).eval()
