"""Pattern-exploiting training: one model under several templates, which vote when it predicts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hybridengine import kernels
from hybridengine.errors import ConfigError
from hybridengine.plugin import Band, Run, Traits, hook, parameter
from hybridengine.seams import Batch, Context, Out, Prediction, View, wide
from hybridengine.text import hide_tokens, pieces_of, rewritten, some_rows, survey

__all__ = ["PET"]


@dataclass(eq=False)
class PET:
    """Writes each row in one of several patterns, keeps the model a language model, and lets all patterns predict.

    Maths: P patterns, the template's own text and `patterns`. At each step a row is written in one of them, drawn by
    seed, step and row: the paper trains a model for each pattern, this run one for all. The loss is

        (1 - α) CE + α MLM,    α = `mlm_weight`

    MLM being the cross-entropy of words hidden in the row's own text (15% of them, as BERT hides them), a mean over
    each row's, for a causal model that of each next word; unlabelled rows take part in it. A prediction is the softmax
    of Σ_p w_p s_p / Σ_p w_p, s_p the class logits under pattern p, w_p its accuracy on training rows before training
    (`combine: uniform`: 1). The paper's last step, a classifier that learns from these soft labels of unlabelled rows,
    is a second run: `distill: {teacher: THIS RUN'S FOLDER, alpha: 1, temperature: 2}` with `data.unlabelled`.

    Paper: Schick and Schütze 2021, "Exploiting Cloze Questions for Few Shot Text Classification" (PET), section 3.
    Hooks: `on_run_start`, `transform_batch`, `wrap_loss`, `wrap_predict`. Cost: a forward with backward for the hidden
    words (another for unlabelled rows); predicting takes P passes. Combines with what `template` combines with.
    """

    name: ClassVar[str] = "pet"
    traits: ClassVar[Traits] = Traits(
        family="prompts",
        order=Band.TERM + 1,  # after those that find the words
        requires=("cloze", "labels"),
        effect="mlm",
        cost="2x a plain step, 3x with unlabelled rows; predicting takes a pass for each pattern",
        paper="Schick and Schütze 2021, arXiv:2001.07676",
        combines="template (needed) and what it combines with, calibration; distill in a second run",
    )

    patterns: list[str] = parameter(
        help="more templates beside the template's own `text`", example=["[MASK]! {text}"], min_length=1
    )
    mlm_weight: float = parameter(1e-4, "weight of the hidden words' loss", gt=0, lt=1)
    combine: Literal["accuracy", "uniform"] = parameter("accuracy", "what weighs the patterns when predicting")
    rows: int = parameter(256, "at most so many training rows tell a pattern's accuracy", ge=1)
    _pieces: list[list[str]] = field(default_factory=list, init=False, repr=False)
    _weights: list[float] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        self._own = [pieces_of(text, "patterns") for text in self.patterns]

    @hook
    def on_run_start(self, run: Run) -> None:
        """Check the patterns, and weigh them by what the model knows already.

        Raises:
            ConfigError: a label word is written in other tokens in one of them.
        """
        if run.dry:
            return
        cloze = run.cloze
        self._pieces = [cloze.pieces, *self._own]
        for word in (word for group in cloze.words.texts for word in group) if cloze.words else ():
            for text, pieces in zip(self.patterns, self._own, strict=True):
                if cloze.tokens_of(word, pieces) != cloze.tokens_of(word):
                    raise ConfigError(
                        f"pet: the word {word!r} has other tokens in the pattern {text!r} than in template; put a space"
                        " before [MASK] in all of them or in none"
                    )
        memory = run.memory("pet")
        if not memory:
            memory["weights"] = self._accuracies(run)
        self._weights = memory["weights"]

    def _accuracies(self, run: Run) -> list[float]:
        if self.combine == "uniform":
            return [1.0] * len(self._pieces)
        rows = some_rows(run, self.rows, "pet")
        found = []
        for pieces in self._pieces:
            right = [
                (run.cloze.verbalizer.class_logits(seen).argmax(-1) == batch.targets).sum()
                for seen, batch in survey(run, rows, pieces)
            ]
            found.append(float(torch.stack(right).sum()) / len(rows))
        told = ", ".join(f"{accuracy:.2f}" for accuracy in found)
        run.say(f"pet: accuracy of the patterns before training, which weighs them: {told}")
        return found if any(found) else [1.0] * len(found)

    @hook
    def transform_batch(self, run: Run, batch: Batch) -> Batch:
        """Each row in one pattern; unlabelled rows likewise."""
        parts = {name: self._drawn(run, part) for name, part in batch.parts.items()}
        return replace(self._drawn(run, batch), parts=parts)

    def _drawn(self, run: Run, batch: Batch) -> Batch:
        chance = run.random("pet/pattern", batch.rows).uniform(1)[:, 0].tolist()
        return rewritten(run, batch, [self._pieces[int(u * len(self._pieces))] for u in chance])

    @hook
    def wrap_loss(self, inner: Callable[..., Out], ctx: Context, batch: Batch, view: View) -> Out:
        """The mixture of the inner terms and the loss of hidden words."""
        out = inner(ctx, batch, view)
        value, rows = self._language_loss(ctx, batch, view.clean().fork("pet")), batch.size
        if (part := batch.parts.get("unlabelled")) is not None:
            value = value + self._language_loss(ctx, part, view.clean().fork("pet", "unlabelled"))
            rows += part.size
        ctx.report(self, mlm=value / rows)
        terms = {name: ((1 - self.mlm_weight) * term, unit) for name, (term, unit) in out.terms.items()}
        return replace(out, terms={**terms, "mlm": (self.mlm_weight * value, "all_rows")})

    def _language_loss(self, ctx: Context, batch: Batch, view: View) -> Tensor:
        """The sum over rows of the mean loss of a row's hidden words, or (causal) of its words."""
        run, cloze = ctx.run, ctx.run.cloze
        if cloze is None:  # the toy run of the plan has no words
            return ctx.outputs(batch, [view], model=run.model)[0].scores.logsumexp(-1).sum()
        ids, attention = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        ordinary = batch.masks["perturbable"]["input_ids"] == 1
        asked, scored = batch, ordinary
        if cloze.masked:
            place = (attention.cumsum(1) - 1).clamp_min(0)  # a row's token j, wherever padding stands
            draws = ctx.rng("pet/hidden", batch.rows).uniform(ids.shape[1], 3).to(ids.device)
            draws = draws.gather(1, place[..., None].expand(-1, -1, 3))
            hidden, scored = hide_tokens(run.tokenizer, ids, ordinary, draws)
            asked = replace(batch, inputs={**batch.inputs, "input_ids": hidden})
        else:
            scored = ordinary[:, 1:] & (attention[:, :-1] == 1)
        with cloze.whole_logits():
            logits = ctx.outputs(asked, [view], model=run.model)[0].logits
        assert logits is not None
        logits, ids = (logits, ids) if cloze.masked else (logits[:, :-1], ids[:, 1:])
        each = wide(kernels.cross_entropy(logits[scored], ids[scored], reduction="none"))
        counts = scored.sum(1)
        return (each / counts.repeat_interleave(counts)).sum()

    @hook
    def wrap_predict(self, inner: Callable[..., Prediction], ctx: Context, batch: Batch, view: View) -> Prediction:
        """All patterns together, by their weights."""
        total, logits = sum(self._weights), torch.zeros(())
        for weight, pieces in zip(self._weights, self._pieces, strict=True):
            scores = inner(ctx, rewritten(ctx.run, batch, [pieces] * batch.size), view).scores
            assert scores is not None
            logits = logits + weight / total * scores.clamp_min(torch.finfo(scores.dtype).tiny).log()
        terms = {} if batch.targets is None else ctx.run.task.terms(logits, batch)
        return Prediction(logits.softmax(-1), terms=terms)
