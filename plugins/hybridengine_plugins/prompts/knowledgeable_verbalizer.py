"""Label words expanded from a list of related ones, sifted by the model, with learned weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hybridengine.errors import ConfigError
from hybridengine.plugin import ParamGroup, Run, StackView, Traits, hook, parameter, with_rate
from hybridengine.seams import Batch, Context, Out, View
from hybridengine.text import AtMask, Cloze, read_words, some_rows, survey

__all__ = ["KnowledgeableVerbalizer"]


class WordWeights(nn.Module):
    """What each word counts, the same for all at first, and the log of its prior: `[W]` each."""

    def __init__(self, prior: Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros_like(prior))
        self.register_buffer("prior", prior)


@dataclass(eq=False)
class KnowledgeableVerbalizer:
    """Classes speak through many related words: a list expands the template's, the model sifts it, training weighs it.

    Maths: P(v|x) is the model's probability of the word v at the mask of x, over `rows` training rows whose labels are
    not read; the template's first word of class y is its name v_y. A word goes if its prior P(v) = mean P(v|x) lies
    among the lowest `rare` share of the vocabulary's, or if it says more about other classes than about its own:

        R(v) = r(v, own) (C - 1) / Σ_{y other} r(v, y) < relevance,   r(v, y) = cosine of P(v|·) and P(v_y|·)

    Words of the template stay. The logit of a class is Σ_v a_v (log P(v|x) - log P(v)) over what is left of it, a the
    softmax of learned weights that start equal. Words that the tokenizer does not know, that two classes list, or that
    take more tokens than the template's longest are left out.

    Paper: Hu et al. 2022, "Knowledgeable Prompt-tuning" (KPT).
    Hooks: `check_stack`, `on_run_start`, `transform_param_groups`, `wrap_loss`. Cost: one forward pass over `rows` rows
    before training. Combines with everything that `template` combines with.
    """

    name: ClassVar[str] = "knowledgeable-verbalizer"
    traits: ClassVar[Traits] = Traits(
        family="prompts",
        slots=("verbalizer",),
        requires=("cloze", "labels"),
        effect="shift",
        cost="one forward over some training rows before the first step",
        paper="Hu et al. 2022, arXiv:2108.02035",
        combines="template (needed, with a word for each label) and what it combines with",
    )

    file: str = parameter(help="a YAML or JSON file of `label: [related word, ...]`", example="related.yaml")
    rows: int = parameter(200, "training rows on which the words are sifted; their labels are not read", ge=1)
    rare: float = parameter(0.5, "words as improbable as this share of the vocabulary go; 0 keeps all", ge=0, lt=1)
    relevance: float = parameter(1.0, "words that say less of their own class than of others go; 0 keeps all", ge=0)
    calibrate: bool = parameter(True, "divide a word's probability by its prior")
    learn: bool = parameter(True, "learn how much each word counts")
    lr: float = parameter(0.06, "learning rate of these weights", gt=0)
    _weights: WordWeights | None = field(default=None, init=False, repr=False)
    _named: Any = field(default=None, init=False, repr=False)  # the template's own words
    _words: Any = field(default=None, init=False, repr=False)
    _shift: Tensor | None = field(default=None, init=False, repr=False)

    @hook
    def check_stack(self, stack: StackView) -> list[str]:
        """The template names the classes, and the file each of them."""
        if "template" in stack.names and not stack.parameters("template")["verbalizer"]:
            return [f"{self.name}: template names no words to start from; add `verbalizer: {{label: word}}` to it"]
        if "episodes" not in stack.names:  # whose labels are no words; template refuses them
            read_words(self.file, stack.facts.get("labels") or [], self.name)
        return []

    @hook
    def on_run_start(self, run: Run) -> None:
        """Expand and sift the words, and read the classes from what is left."""
        if run.dry:
            return
        memory, self._named = run.memory(self.name), run.cloze.words
        if not memory:
            memory.update(self._sifted(run))
        run.cloze.use(memory["words"])
        self._words = run.cloze.words
        double = next(run.model.parameters()).dtype == torch.float64
        self._weights = WordWeights(torch.tensor(memory["prior"], dtype=torch.float64 if double else torch.float32))
        self._weights.requires_grad_(self.learn)
        run.add_module(self.name, self._weights)
        run.cloze.verbalizer = self

    def _sifted(self, run: Run) -> dict[str, Any]:
        """The words of each class that stay, and the logs of their priors, one class after the other."""
        own, listed = self._named.texts, read_words(self.file, run.labels, self.name)
        words = [group + more for group, more in zip(own, _usable(run.cloze, listed), strict=True)]
        run.cloze.use(words)
        scores, vocabulary = self._asked(run)
        prior = scores.logsumexp(0) - math.log(len(scores))
        least = vocabulary.logsumexp(0).quantile(self.rare) - math.log(len(scores))
        rare = (prior < least) & torch.tensor(self.rare > 0)
        sifted = ~rare & (_relevance(scores.exp(), [len(group) for group in words]) >= self.relevance)
        kept: list[list[str]] = []
        priors, place = [], 0
        for group, named in zip(words, own, strict=True):
            stay = [i for i in range(len(group)) if i < len(named) or sifted[place + i]]
            kept.append([group[i] for i in stay])
            priors += [float(prior[place + i]) for i in stay]
            place += len(group)
        listed_words, added = sum(map(len, listed)), sum(map(len, kept)) - sum(map(len, own))
        run.say(f"{self.name}: {added} of {listed_words} listed words join the template's; see memory in best/")
        return {"words": kept, "prior": priors}

    def _asked(self, run: Run) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the words `[N, W]` and of the vocabulary `[N, V]` on some training rows."""
        found = []
        for seen, _ in survey(run, some_rows(run, self.rows, self.name)):
            said = seen.log_probabilities.double()
            found.append((run.cloze.words.scores(said).cpu(), said[:, 0].cpu()))
        return torch.cat([scores for scores, _ in found]), torch.cat([vocabulary for _, vocabulary in found])

    def class_logits(self, seen: AtMask) -> Tensor:
        """Class logits `[B, C]`: the weighted mean of the words' calibrated scores."""
        assert self._weights is not None
        scores = self._words.scores(seen.log_probabilities)
        if self.calibrate:
            scores = scores - self._weights.prior.to(scores)
        weights = seen.value(f"{self.name}/weights", self._weights.weights).to(scores.dtype)
        logits: Tensor = (self._words.by_class(weights).softmax(-1) * self._words.by_class(scores, 0.0)).sum(-1)
        with torch.no_grad():
            named = self._named.class_logits(seen).softmax(-1)
            self._shift = (logits.softmax(-1) - named).abs().sum(-1).mean() / 2
        return logits

    @hook
    def transform_param_groups(self, run: Run, groups: list[ParamGroup]) -> list[ParamGroup]:
        """The weights at their own learning rate."""
        ratio = self.lr / run.config.train.lr
        return with_rate(run, groups, lambda name: name.startswith(f"{self.name}/"), ratio)

    @hook
    def wrap_loss(self, inner: Callable[..., Out], ctx: Context, batch: Batch, view: View) -> Out:
        """The inner loss; how far the added words shift the class probabilities from the template's is reported."""
        out = inner(ctx, batch, view)
        if self._shift is not None:
            ctx.report(self, shift=self._shift)
        return out


def _usable(cloze: Cloze, listed: Sequence[Sequence[str]]) -> list[list[str]]:
    """What of the listed words can be scored beside the template's own, each once."""
    assert cloze.words is not None
    named = {tokens for group in cloze.words.tokens for tokens in group}
    longest = max(map(len, named))
    groups: list[dict[tuple[int, ...], str]] = [{} for _ in listed]
    for spelt, words in zip(groups, listed, strict=True):
        for word in words:
            spelt.setdefault(_tokens(cloze, word), word)
    times = Counter(tokens for spelt in groups for tokens in spelt)
    return [
        [
            word
            for tokens, word in spelt.items()
            if 0 < len(tokens) <= longest and tokens not in named and times[tokens] == 1
        ]
        for spelt in groups
    ]


def _tokens(cloze: Cloze, word: str) -> tuple[int, ...]:
    try:
        return cloze.tokens_of(word)
    except ConfigError:
        return ()


def _relevance(probabilities: Tensor, sizes: Sequence[int]) -> Tensor:
    """R of every word `[W]`, from its probabilities on each row `[N, W]`; each class's first word is its name."""
    first = torch.tensor([sum(sizes[:c]) for c in range(len(sizes))])
    member = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))[:, None]
    unit = torch.nn.functional.normalize(probabilities, dim=0, eps=torch.finfo(probabilities.dtype).tiny)
    near = unit.T @ unit[:, first]  # [W, C]
    own = near.gather(1, member)[:, 0]
    return own * (len(sizes) - 1) / (near.sum(1) - own)
