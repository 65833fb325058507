"""Soft prompts: learned vectors before the text of every row, by themselves or through a small encoder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hybridengine.errors import ConfigError
from hybridengine.model import freeze_pretrained, task_type
from hybridengine.plugin import Run, Traits, hook, parameter
from hybridengine.seams import Feature, Vectors, mix, seeded
from hybridengine.text import insert_tokens

__all__ = ["PTuning", "PromptTuning"]

_WITHOUT_HEAD = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


@dataclass(eq=False)
class PromptTuning:
    """Trains vectors that stand before every text, and new heads; the model keeps its pretrained values.

    Maths: the token embeddings e(x) ∈ R^{L×D} become [P; e(x)] with P ∈ R^{n×D} learned, started at rows of the
    vocabulary: those of `text`, repeated, or random ones. They stand behind a first `[CLS]`, by which encoders
    classify, else before everything, next to the text also where rows are padded on the left; mask, positions, labels
    and attacks' masks count them in.

    Paper: Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning".
    Hooks: `transform_model`, `on_run_start`, `transform_features`. Cost: n more tokens a row, no weight gradients of
    the model. Combines with `lora` and other adapters (trained together), `full`, attacks, consistency, `template`.
    Wants a high learning rate (the paper: 0.3 with Adafactor); with small models it lags behind full tuning.
    """

    name: ClassVar[str] = "prompt-tuning"
    traits: ClassVar[Traits] = Traits(
        family="prompts",
        slots=("soft_prompt",),
        requires=("embeddings",),
        cost="n more tokens a row; about 2 of 3 of a plain step on the longer rows",
        paper="Lester et al. 2021, arXiv:2104.08691",
        combines="lora, full, attacks, consistency terms, template, meta-learning",
    )

    n: int = parameter(20, "vectors before each text", ge=1)
    text: str | None = parameter(None, "words whose embeddings the vectors start from; by default random ones")
    attacked: bool = parameter(False, "whether embedding attacks move the vectors too")

    @hook
    def transform_model(self, run: Run, model: nn.Module) -> nn.Module:
        """Freeze all but new heads, unless an adapter or `full` says what is trained."""
        return freeze_pretrained(run, model)

    @hook
    def on_run_start(self, run: Run) -> None:
        """Add the vectors.

        Raises:
            ConfigError: `text` has no token.
        """
        assert run.sites is not None
        module = self._module(self._start(run), mix(run.seed, self.name, "network"))
        module.about = {
            # For PEFT's classes with a head the adapter must bring one; here the base model has it.
            "task_type": kind if (kind := task_type(run.model)) in _WITHOUT_HEAD else "FEATURE_EXTRACTION",
            "base_model_name_or_path": run.config.model.name,
            "num_virtual_tokens": self.n,
        }
        run.add_soft_tokens(self.name, module, self.n)
        run.say(
            f"{self.name}: predict with hybridengine; `best/` by itself is the model without its prompt, which stands"
            f" in `best/{self.name}/` for PEFT"
        )

    def _start(self, run: Run) -> Tensor:
        """Rows of the vocabulary `[n, D]`."""
        assert run.sites is not None
        vocabulary = run.sites.vocabulary(run.model)
        vocabulary = vocabulary.to(torch.promote_types(vocabulary.dtype, torch.float32))
        if self.text is not None and run.tokenizer is not None:
            ids = run.tokenizer(self.text, add_special_tokens=False)["input_ids"]
            if not ids:
                raise ConfigError(f"{self.name}: text {self.text!r} has no token; give some words, or remove `text`")
            chosen = torch.tensor([ids[i % len(ids)] for i in range(self.n)])
        else:
            generator = torch.Generator().manual_seed(mix(run.seed, self.name) % 2**63)
            chosen = torch.randint(len(vocabulary), (self.n,), generator=generator)
        return vocabulary[chosen.to(vocabulary.device)].clone()

    def _module(self, start: Tensor, seed: int) -> _Prompt:
        return _Prompt(start)

    @hook
    def transform_features(self, run: Run, features: list[Feature]) -> list[Feature]:
        """Place the vectors in each row."""
        ids, first = run.soft_tokens.ids(self.name), run.tokenizer.cls_token_id
        return [
            insert_tokens(f, int(first is not None and f["input_ids"][0] == first), ids, perturbable=self.attacked)
            for f in features
        ]


@dataclass(eq=False)
class PTuning(PromptTuning):
    """Soft prompts that a small network makes of learned ones, which couples them and eases their training.

    Maths: P = P₀ + g(P₀) with P₀ ∈ R^{n×D} learned and g an MLP (two layers of `hidden` units), over the states of a
    bidirectional LSTM where `encoder: lstm`. The last layer of g starts at 0, so that P starts at rows of the
    vocabulary. Only P is needed to predict, and PEFT's format holds P alone.

    Paper: Liu et al. 2021, "GPT Understands, Too" (P-tuning); the residual road as in Razdaibiedina et al. 2023.
    Hooks, cost and combinations: as `prompt-tuning`.
    """

    name: ClassVar[str] = "p-tuning"
    traits: ClassVar[Traits] = replace(PromptTuning.traits, paper="Liu et al. 2021, arXiv:2103.10385")

    encoder: Literal["mlp", "lstm"] = parameter("mlp", "the network: an MLP, or an LSTM before it")
    hidden: int = parameter(128, "width of the network", ge=1)

    def _module(self, start: Tensor, seed: int) -> _Prompt:
        with seeded(torch.default_generator, seed):
            return _Encoded(start, self.encoder, self.hidden)


class _Prompt(Vectors):
    """Vectors `[n, D]`, with what PEFT wants to know of them."""

    about: dict[str, Any]

    def save_pretrained(self, folder: Path) -> None:
        """Write the vectors as a PEFT adapter of their own, to put on a base model or a merged one."""
        from peft import PromptTuningConfig

        vectors = self().detach().cpu().float().contiguous()
        folder.mkdir()
        PromptTuningConfig(
            token_dim=vectors.shape[1], num_transformer_submodules=1, inference_mode=True, **self.about
        ).save_pretrained(str(folder))
        save_file({"prompt_embeddings": vectors}, str(folder / "adapter_model.safetensors"))


class _Encoded(_Prompt):
    """Vectors `[n, D]` behind a network."""

    def __init__(self, start: Tensor, kind: str, hidden: int) -> None:
        super().__init__(start)
        width = start.shape[1]
        self.lstm = nn.LSTM(width, hidden, bidirectional=True) if kind == "lstm" else None
        self.inner = nn.Linear(2 * hidden if self.lstm else width, hidden)
        self.outer = nn.Linear(hidden, width)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self) -> Tensor:
        states = self.lstm(self.vectors)[0] if self.lstm else self.vectors
        change: Tensor = self.outer(torch.relu(self.inner(states)))
        return self.vectors + change
