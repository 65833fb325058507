"""Back-translation: copies of the training texts that went into another language and back."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hybridengine.errors import ModelError
from hybridengine.model import load_frozen, quiet
from hybridengine.plugin import Run, Split, Traits, hook, parameter
from hybridengine.seams import mix
from hybridengine.text import add_copies, by_length, longest_input, sample_top_k

__all__ = ["BackTranslation"]

_SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s+")


@dataclass(eq=False)
class BackTranslation:
    """Add copies of each training text, under its label, that were translated into another language and back.

    Every sentence goes through both models, which draw each token y_t from

        softmax(z / temperature)    over the `top_k` likeliest tokens,    z the logits given the tokens before it,

    so that copies differ; temperature near 0 gives the likeliest tokens. Sentences end at `. ! ?` and white space, for
    translators are trained on sentences. One that is longer than a model takes, or that comes back empty, stays as it
    was; translations are cut at `max_new_tokens`.

    Any two encoder-decoders will do. T5 wants its task in front (`prefix_there: "translate English to German: "`);
    multilingual models want `forced_bos_token_id` in their generation_config.json. Draws are keyed by (seed, row, copy,
    sentence); the batch a sentence is in changes the logits by rounding alone.

    Only the role `text` of training rows is rewritten. Originals stay first and unchanged; a copy carries
    `augmented_from`, the position of its original, and that row's origin.

    Paper: Sennrich, Haddow, Birch 2016, "Improving Neural Machine Translation Models with Monolingual Data"; Edunov et
    al. 2018 (sampling); Xie et al. 2020, "Unsupervised Data Augmentation" (as augmentation, temperature 0.9). Hooks:
    `transform_data`. Cost: both models generate every copy before training, whenever the rows are read (also for
    `validate` and `plan`); (1 + copies) times the training rows per epoch. Combines with other augmentation, whose
    copies add up.
    """

    name: ClassVar[str] = "back-translation"
    traits: ClassVar[Traits] = Traits(
        family="data",
        requires=("text",),
        provides=("augmentation",),
        cost="two generations for each copy; (1 + copies) x the training rows per epoch",
        paper="Sennrich et al. 2016; Xie et al. 2020, arXiv:1904.12848",
        combines="classification of texts; eda, synonym, mask-infill; not token tags",
    )

    there: str = parameter(
        help="an encoder-decoder into the other language: a folder or a hub id", min_length=1, example="opus-mt-en-de"
    )
    back: str = parameter(help="one that leads back", min_length=1, example="opus-mt-de-en")
    copies: int = parameter(1, "copies per row; 0 where only `uda` or `self-training` needs them", ge=0)
    temperature: float = parameter(0.9, "above 1: freer translations, below: likelier ones", gt=0)
    top_k: int = parameter(50, "likeliest tokens that are drawn from", ge=1)
    prefix_there: str = parameter("", "text in front of each sentence on the way there")
    prefix_back: str = parameter("", "text in front of each sentence on the way back")
    max_new_tokens: int = parameter(128, "tokens of a sentence's translation", ge=1)
    batch_size: int = parameter(32, "sentences in one generation", ge=1)

    @hook
    def transform_data(self, run: Run, splits: dict[str, Split]) -> dict[str, Split] | None:
        """Append the copies to the training split.

        Raises:
            ModelError: a model cannot be loaded or is no encoder-decoder.
        """

        def rewrite(rows: Sequence[Mapping[str, Any]], keys: Sequence[int]) -> list[str]:
            pieces = [_SENTENCE_END.split(row["text"]) for row in rows]
            old = [piece for text in pieces for piece in text]
            numbered = [mix(key, index) for text, key in zip(pieces, keys, strict=True) for index in range(len(text))]
            made = old
            for way, name, prefix in (("there", self.there, self.prefix_there), ("back", self.back, self.prefix_back)):
                loaded = load_frozen("AutoModelForSeq2SeqLM", name, run.device, key=f"{self.name}.{way}", fast=False)
                made = self._translate(*loaded, made, prefix, [mix(key, way) for key in numbered])
            ready = iter(new if new.strip() else piece for new, piece in zip(made, old, strict=True))
            return [" ".join(next(ready) for _ in text) for text in pieces]

        return add_copies(run, splits, self.name, self.copies, rewrite)

    def _translate(
        self, model: nn.Module, tokenizer: Any, texts: Sequence[str], prefix: str, keys: Sequence[int]
    ) -> list[str]:
        """Each text in the model's other language, drawn by its key; texts that are too long stay."""
        if getattr(model.config, "decoder_start_token_id", None) is None:
            raise ModelError(
                f"{self.name}: the configuration of {model.config.name_or_path} has no decoder_start_token_id, so"
                " generation cannot start; set it in its config.json (T5, Marian: the padding token)"
            )
        out, longest = list(texts), longest_input(tokenizer, model)
        ids = tokenizer([prefix + text for text in texts])["input_ids"]
        short = [i for i in range(len(texts)) if longest is None or len(ids[i]) <= longest]
        for batch in by_length([texts[i] for i in short], self.batch_size):
            places = [short[j] for j in batch]
            inputs = tokenizer.pad({"input_ids": [ids[i] for i in places]}, return_tensors="pt").to(model.device)
            drawn = _Drawn([keys[i] for i in places], self)
            with torch.no_grad(), quiet():
                made = model.generate(
                    input_ids=inputs["input_ids"],
                    attention_mask=inputs["attention_mask"],
                    max_new_tokens=self.max_new_tokens,
                    num_beams=1,
                    do_sample=False,
                    logits_processor=[drawn],
                )
            for i, text in zip(places, tokenizer.batch_decode(made, skip_special_tokens=True), strict=True):
                out[i] = text.strip()
        return out


class _Drawn:
    """A logits processor that leaves one token of each row, drawn by the row's key: greedy search becomes sampling."""

    def __init__(self, keys: Sequence[int], method: BackTranslation) -> None:
        self._streams = [random.Random(key) for key in keys]
        self._method = method

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores `[B, V]` of the next token, -inf but for the one that was drawn."""
        uniform = torch.tensor([stream.random() for stream in self._streams], dtype=torch.float64, device=scores.device)
        drawn = sample_top_k(scores, uniform, self._method.top_k, temperature=self._method.temperature)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn[:, None], 0.0)
