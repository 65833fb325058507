"""Tools for plugin authors: tiny models, made-up batches, and a bench that makes real steps."""

from hybridengine.testing.models import (
    WORDS,
    tiny_bert,
    tiny_checkpoint,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
    tiny_tokenizer,
)
from hybridengine.testing.steps import Bench, SimpleTask, make_batch, set_up, tiny_config

__all__ = [
    "WORDS",
    "Bench",
    "SimpleTask",
    "make_batch",
    "set_up",
    "tiny_bert",
    "tiny_checkpoint",
    "tiny_config",
    "tiny_gpt2",
    "tiny_llama",
    "tiny_t5",
    "tiny_tokenizer",
]
