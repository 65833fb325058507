"""Prompt learning: a template turns a row into a cloze, and words at the mask stand for the labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from hybridengine.errors import ConfigError, ModelError, did_you_mean
from hybridengine.model import load_model, load_model_config
from hybridengine.plugin import Run, StackView, Traits, hook, parameter
from hybridengine.seams import Batch, Context, Feature, Row
from hybridengine.text import Cloze, pieces_of

__all__ = ["Template"]


@dataclass(eq=False)
class Template:
    """Classifies by a language model: which label's word fits best at the template's mask.

    Maths: a word v of tokens v₁…v_n scores s(v) = (1/n) Σ_i log p(mask_i = v_i | template(x)) on a masked LM, which
    gets as many masks as the longest word has tokens, and s(v) = log p(v | text before the mask), the chain rule, on
    a causal LM, where longer words share the row as branches that do not see each other (one forward; words of one
    token cost nothing). The logit of a class is log of the mean of exp s(v) over its words: more words win nothing.
    The text is cut to fit, never the template or a mask; template tokens are not perturbable. The words may come from
    another method instead, and another may read classes from the mask in its own way (`verbalizer` and its kin).

    Paper: Schick and Schütze 2021, "Exploiting Cloze Questions" (PET); Gao et al. 2021 (LM-BFF).
    Hooks: `build_model`, `build_features`, `transform_outputs`, `check_stack`. Cost: a plain step with an LM head.
    Combines with `lora`, attacks, `rdrop`, `vat`: all see class logits `[B, C]`. Not with `episodes`.
    """

    traits: ClassVar[Traits] = Traits(
        family="prompts",
        requires=("labels",),
        provides=("cloze",),
        cost="a plain step with a language-model head",
        paper="Schick and Schütze 2021, arXiv:2001.07676",
        combines="lora, attacks, consistency terms; not episodes",
    )

    verbalizer: dict[str, str | list[str]] = parameter(
        dict,
        "label to its word or words at the mask, e.g. {negative: [bad, terrible], positive: great}; none where"
        " another method finds or learns them",
    )
    text: str = parameter("{text} It was [MASK].", "template: `{role}` is a column's text, `[MASK]` the label word")
    _cloze: Cloze | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self._pieces = pieces_of(self.text)
        empty = [
            label for label, words in self.verbalizer.items() if not all(w.strip() for w in _listed(words) or [""])
        ]
        if empty:
            raise ValueError(f"verbalizer: label {empty[0]!r} has an empty word or none")

    @hook
    def check_stack(self, stack: StackView) -> list[str]:
        """The verbalizer must name every label, and nothing else; or another method is there for it."""
        if not self.verbalizer:
            if any("verbalizer" in method.traits.slots for method in stack.methods):
                return []
            return [
                "template: there are no words for the labels; add `verbalizer: {label: word}` to it, or a method that"
                " finds or learns them: verbalizer, soft-verbalizer"
            ]
        return self._label_problems(list(stack.facts.get("labels") or self.verbalizer))

    def _label_problems(self, labels: list[str]) -> list[str]:
        lost = [label for label in labels if label not in self.verbalizer]
        unknown = [label for label in self.verbalizer if label not in labels]
        found = [f"template: verbalizer has no word for label {lab!r}; add `{lab}: a word`" for lab in lost]
        return found + [
            f"template: verbalizer names {x!r}, which is no label.{did_you_mean(x, labels)}" for x in unknown
        ]

    # ---- model and words -------------------------------------------------------------------------------------------

    @hook
    def build_model(self, run: Run) -> nn.Module:
        """The checkpoint with its language-model head.

        Raises:
            ConfigError: label words that this tokenizer cannot use.
            ModelError: a checkpoint without such a head.
        """
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

        if self.verbalizer and (problems := self._label_problems(run.labels)):
            raise ConfigError(problems)
        name = run.config.model.name
        kind = type(load_model_config(run.config.model))
        masked = kind in MODEL_FOR_MASKED_LM_MAPPING and run.tokenizer.mask_token is not None
        if not masked and kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ModelError(
                f"template: {name} is neither a masked nor a causal language model; use BERT's or GPT's kin"
            )
        words = [_listed(self.verbalizer[label]) for label in run.labels] if self.verbalizer else []
        run.cloze = self._cloze = Cloze(run.tokenizer, self._pieces, words, masked)
        model, missing = load_model("AutoModelForMaskedLM" if masked else "AutoModelForCausalLM", run.config.model, {})
        if missing:
            raise ModelError(
                f"template: {name} has no language-model head ({', '.join(missing[:3])} are not in the checkpoint), so"
                " its word predictions would be random; use the pretrained language model itself, train a head first"
                " with `task: masked-language-modeling`, or remove `template`"
            )
        self._cloze.install(model)
        return model

    # ---- rows ------------------------------------------------------------------------------------------------------

    @hook
    def build_features(self, run: Run, rows: Sequence[Row]) -> list[Feature]:
        """Rows in the template, cut so that template and masks stay; labels and the like as the task has them."""
        return self._ready().features(run, rows)

    # ---- outputs ---------------------------------------------------------------------------------------------------

    @hook
    def transform_outputs(self, ctx: Context, batch: Batch, outputs: Any) -> Any:
        """Vocabulary logits `[B, L, V]` to class logits `[B, C]`."""
        if not ctx.run.dry:  # the toy model of the plan has class logits already
            outputs.logits = self._ready().classify(outputs.logits, batch, ctx)
        return outputs

    def _ready(self) -> Cloze:
        if self._cloze is None:
            raise RuntimeError("template: the model was not built through `build_model`")
        return self._cloze


def _listed(words: str | list[str]) -> list[str]:
    return [words] if isinstance(words, str) else list(words)
