"""Soft templates: the words of a template become vectors that are trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from hybridengine.errors import ConfigError
from hybridengine.plugin import Run, Traits, hook, parameter
from hybridengine.seams import Feature, Vectors

__all__ = ["SoftTemplate"]


@dataclass(eq=False)
class SoftTemplate:
    """Trains the words of the template as vectors, from their embeddings on; texts and masks stay as they are.

    Maths: template token j becomes a vector v_j ∈ R^D that starts at the token's embedding, so that training starts at
    the written template exactly. `hard` lists words that stay written (mixed templates). The model itself is trained
    as the rest of the stack says; with a frozen model the vectors alone learn.

    Paper: Liu et al. 2021, "GPT Understands, Too" (mixed templates); Zhong et al. 2021, "Factual Probing Is [MASK]"
    (OptiPrompt), whose vectors start at a written template.
    Hooks: `on_run_start`, `transform_features`. Cost: a plain step. Combines with what `template` combines with, and
    `prompt-tuning`; not with methods that write rows into several templates (`demonstrations`, `pet`).
    """

    traits: ClassVar[Traits] = Traits(
        family="prompts",
        slots=("soft_template",),
        requires=("cloze", "embeddings"),
        conflicts={
            "demonstrations": "its solved rows hold the template's words too; use one of the two",
            "pet": "it writes rows into several templates; use one of the two",
        },
        cost="a plain step",
        paper="Liu et al. 2021, arXiv:2103.10385; Zhong et al. 2021, arXiv:2104.05240",
        combines="template (needed) and what it combines with; not demonstrations or pet",
    )

    hard: list[str] = parameter(list, "words of the template that stay written")
    _written: list[int] = field(default_factory=list, init=False, repr=False)
    _tokens: list[int] = field(default_factory=list, init=False, repr=False)

    @hook
    def on_run_start(self, run: Run) -> None:
        """Add a vector for each token of the template.

        Raises:
            ConfigError: every word is listed in `hard`, or one that the template does not have.
        """
        if run.dry:  # the toy run of the plan has no template
            return
        assert run.sites is not None
        (feature,) = run.cloze.encode([dict.fromkeys(run.cloze.columns, "a")], run.config.train.max_length)
        self._written = [i for i, here in zip(feature["input_ids"], feature["template"], strict=True) if here]
        stays = self._hard_tokens(run, self._written)
        self._tokens = [token for token in self._written if token not in stays]
        if not self._tokens:
            raise ConfigError(
                "soft-template: the template has no word that could be trained; remove words from `hard`, or"
                " add some to `template: {text: ...}`"
            )
        start = run.sites.vocabulary(run.model)[self._tokens].clone()
        run.add_soft_tokens("soft-template", Vectors(start), len(self._tokens))

    def _hard_tokens(self, run: Run, written: list[int]) -> set[int]:
        stays: set[int] = set()
        for word in self.hard:
            # As a tokenizer writes it at the start of a text, and behind other words.
            forms = [run.tokenizer(form, add_special_tokens=False)["input_ids"] for form in (word, f"a {word}")]
            tokens = {*forms[0], *forms[1][1:]} & set(written)
            if not tokens:
                raise ConfigError(f"soft-template: hard names {word!r}, which is no word of the template")
            stays |= tokens
        return stays

    @hook
    def transform_features(self, run: Run, features: list[Feature]) -> list[Feature]:
        """Put the vectors in the words' places.

        Raises:
            ConfigError: the template's words melt into the texts beside them.
        """
        return [self._softened(run.soft_tokens.ids("soft-template"), feature) for feature in features]

    def _softened(self, ids: list[int], feature: Feature) -> Feature:
        places = [i for i, here in enumerate(feature["template"]) if here]
        if len(places) != len(self._written):
            raise ConfigError(
                "soft-template: words of the template melt into the texts beside them, so that rows have different"
                " tokens of the template; put spaces around {columns}"
            )
        left, tokens = iter(ids), list(feature["input_ids"])
        for place, word in zip(places, self._written, strict=True):
            if word in self._tokens:
                tokens[place] = next(left)
        return {**feature, "input_ids": tokens}
