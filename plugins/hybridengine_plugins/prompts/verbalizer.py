"""Label words that nobody wrote into the template: searched by the model's own predictions, or read from a file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hybridengine.errors import ConfigError
from hybridengine.plugin import Run, StackView, Traits, hook, parameter
from hybridengine.seams import Row
from hybridengine.text import read_words, some_rows, survey

__all__ = ["WordSearch"]


@dataclass(eq=False)
class WordSearch:
    """Gives a template its label words: those that tell the classes apart best, before any training.

    Maths: q(v|x) is the model's probability of the token v at the mask of x, N_c the training rows of class c, N all.
    Candidates of c are the tokens with the highest Σ_{x of c} log q(v|x); of them it takes those with the highest

        (N - N_c)/N_c · Σ_{x of c} log q/(1-q)  -  Σ_{other x} log q/(1-q)

    the likelihood ratio of "v stands for c" with both sides weighted alike. Only whole words of one token and at least
    two letters count; a word that two classes want goes to the one with the higher score. A class's probability is
    then the mean of its words', as the template has it. With `file` the words are read instead.

    Paper: Schick, Schmid, Schütze 2020, "Automatically Identifying Words That Can Serve as Labels" (PETAL), whose
    filter by the frequency of words in the domain is left out.
    Hooks: `check_stack`, `on_run_start`. Cost: one forward pass over at most `rows` rows before training. Combines
    with everything that `template` combines with.
    """

    name: ClassVar[str] = "verbalizer"
    traits: ClassVar[Traits] = Traits(
        family="prompts",
        slots=("verbalizer",),
        requires=("cloze", "labels"),
        cost="one forward over some training rows before the first step",
        paper="Schick, Schmid, Schütze 2020, arXiv:2010.13641",
        combines="template (needed, without words of its own) and what it combines with",
    )

    file: str | None = parameter(None, "a YAML or JSON file of `label: [word, ...]`; nothing is searched then")
    words: int = parameter(10, "words searched for each class", ge=1)
    candidates: int = parameter(1000, "tokens of each class that are considered, the likeliest ones", ge=1)
    rows: int = parameter(256, "at most so many training rows are asked", ge=2)

    @hook
    def check_stack(self, stack: StackView) -> list[str]:
        """The template must leave the words to this method."""
        if "template" in stack.names and stack.parameters("template")["verbalizer"]:
            return ["verbalizer: template names its words already; remove `verbalizer` from one of the two places"]
        if self.file is not None and "episodes" not in stack.names:  # whose labels are no words; template refuses them
            read_words(self.file, stack.facts.get("labels") or [], self.name)
        return []

    @hook
    def on_run_start(self, run: Run) -> None:
        """Find the words, and let the template use them.

        Raises:
            ConfigError: too few words of one token.
        """
        if run.dry:
            return
        memory = run.memory(self.name)
        if "words" not in memory:
            memory["words"] = self._search(run) if self.file is None else read_words(self.file, run.labels, self.name)
            told = (f"{label}: {', '.join(found)}" for label, found in zip(run.labels, memory["words"], strict=True))
            run.say(f"verbalizer: {'; '.join(told)}")
        run.cloze.use(memory["words"])

    def _search(self, run: Run) -> list[list[str]]:
        likelihood, odds, count = _sums(run, some_rows(run, self.rows, self.name))
        other = count.sum() - count
        if not bool((count > 0).all() and (other > 0).all()):
            label = run.labels[int(count.argmin())]
            raise ConfigError(f"verbalizer: no row of class {label!r} is among the {self.rows} asked; raise `rows`")
        scores = (other / count)[:, None] * odds - (odds.sum(0) - odds)
        found: list[list[str]] = [[] for _ in run.labels]
        taken: set[int] = set()
        for label, token in _ranked(scores, likelihood, self.candidates):
            if len(found[label]) < self.words and token not in taken and (text := _whole_word(run, token)):
                found[label].append(text)
                taken.add(token)
        for label, words in zip(run.labels, found, strict=True):
            if not words:
                raise ConfigError(
                    f"verbalizer: no candidate of class {label!r} is a whole word of one token; raise `candidates`, or"
                    " name words in template"
                )
        return found


def _sums(run: Run, rows: list[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """Σ log q and Σ log q/(1-q) over each class's rows, for every token `[C, V]`; and the rows of each class `[C]`."""
    likelihood = odds = torch.zeros(())
    count = torch.zeros(len(run.labels), dtype=torch.float64)
    for seen, batch in survey(run, rows):
        log_q = seen.log_probabilities[:, 0].double()
        member = torch.nn.functional.one_hot(batch.targets, len(run.labels)).double()
        # A token that is certain would have infinite odds, and one certain row outweigh all others.
        against = torch.log(-torch.expm1(log_q.clamp_max(-1e-12)))
        likelihood = likelihood + (member.T @ log_q).cpu()
        odds = odds + (member.T @ (log_q - against)).cpu()
        count += member.sum(0).cpu()
    return likelihood, odds, count


def _ranked(scores: Tensor, likelihood: Tensor, candidates: int) -> Iterator[tuple[int, int]]:
    """Class and token by falling score, of each class's likeliest tokens."""
    tokens = likelihood.topk(min(candidates, likelihood.shape[1])).indices
    values = scores.gather(1, tokens)
    for place in values.flatten().argsort(descending=True, stable=True).tolist():
        label = place // tokens.shape[1]
        yield label, int(tokens[label, place % tokens.shape[1]])


def _whole_word(run: Run, token: int) -> str | None:
    """The token as a word that the template can hold; None for parts of words, signs and single letters."""
    text = run.tokenizer.decode([token]).strip()
    if not text.isalpha() or (len(text) < 2 and text.isascii()):
        return None
    try:
        return text if run.cloze.tokens_of(text) == (token,) else None
    except ConfigError:
        return None
