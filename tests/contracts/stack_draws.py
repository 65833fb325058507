"""Every shipped method with parameters that make sense on a tiny model, and a probe that watches a run from inside."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from hypothesis import strategies as st
from tiny_runs import LABELS, checkpoint, synonyms
from torch import Tensor

from hybridengine.plugin import Catalogue, Run, Traits, hook
from hybridengine.seams import Context, Work
from hybridengine.seams.trace import summarise

_DROPOUT = {
    "bert": {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
    "gpt2": {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1},
    "llama": {},
    "t5": {"dropout_rate": 0.1},
}
_TAGS = ("B-LOC", "B-PER", "O")


@dataclass(frozen=True)
class Ground:
    """A task on a tiny model of one family."""

    task: str
    architecture: str
    head: str | None = None
    dropout: bool = True

    def __str__(self) -> str:
        return f"{self.task} on {self.architecture}{'' if self.dropout else ' without dropout'}"

    def model(self) -> str:
        """The checkpoint to tune: a language model, whose classification heads are new."""
        head = "AutoModelForMaskedLM" if self.architecture == "bert" else None  # `template` needs one
        return checkpoint(self.architecture, head, **(_DROPOUT[self.architecture] if self.dropout else {}))

    def teacher(self) -> str:
        """A checkpoint that was `trained` on this task."""
        labels = {"text-classification": tuple(sorted(LABELS)), "token-classification": _TAGS}.get(self.task, ())
        return checkpoint(self.architecture, self.head, labels, seed=1)


SEQUENCE, TOKEN = "AutoModelForSequenceClassification", "AutoModelForTokenClassification"
GROUNDS = (
    Ground("text-classification", "bert", SEQUENCE),
    Ground("text-classification", "bert", SEQUENCE, dropout=False),
    Ground("text-classification", "llama", SEQUENCE),
    Ground("text-classification", "gpt2", SEQUENCE),
    Ground("token-classification", "bert", TOKEN),
    Ground("masked-language-modeling", "bert", "AutoModelForMaskedLM"),
    Ground("language-modeling", "gpt2", "AutoModelForCausalLM"),
    Ground("summarization", "t5", "AutoModelForSeq2SeqLM"),
)

Parameters = Callable[[Ground], st.SearchStrategy[dict[str, Any]]]


def _some(**choices: Sequence[Any]) -> Parameters:
    """Each parameter from its choices."""
    return lambda ground: st.fixed_dictionaries({k: st.sampled_from(list(v)) for k, v in choices.items()})


def _attack(**choices: Sequence[Any]) -> Parameters:
    """`_some`, with a target where the task has classes; the first of each is the default."""

    def drawn(ground: Ground) -> st.SearchStrategy[dict[str, Any]]:
        targets = (None, "least-likely", "random") if ground.task.endswith("classification") else (None,)
        return _some(**choices, targeted=targets, per=("sequence", "token"), ramp=(0, 3))(ground)

    return drawn


def _weights(ground: Ground) -> st.SearchStrategy[dict[str, Any]]:
    labels = _TAGS if ground.task == "token-classification" else LABELS
    return st.just({"weights": {label: 0.5 + index for index, label in enumerate(labels)}})


def _teacher(ground: Ground) -> st.SearchStrategy[dict[str, Any]]:
    inside = (0.0,) if ground.architecture == "t5" else (0.0, 1.0)
    choices = {"teacher": (ground.teacher(), "ema"), "alpha": (0.3, 0.7), "hidden": inside, "attention": inside}
    return _some(**choices)(ground)


@functools.cache
def _related_words() -> str:
    path = Path(tempfile.mkdtemp(prefix="hybridengine-words-")) / "related.json"
    words = {"poor": ["bad", "awful"], "fine": ["maybe", "dull"], "good": ["bright", "love"], "great": ["excellent"]}
    path.write_text(json.dumps(words), encoding="utf-8")
    return str(path)


def _related(ground: Ground) -> st.SearchStrategy[dict[str, Any]]:
    return st.sampled_from([0.0, 0.2]).map(lambda rare: {"file": _related_words(), "rare": rare, "relevance": 0.0})


PARAMETERS: dict[str, Parameters] = {
    "adafactor": _some(clip=(1.0, 2.0)),
    "adamw": _some(weight_decay=(0.0, 0.01)),
    "alum": _some(steps=(1, 2)),
    "adapter": _some(size=(4,), placement=("houlsby", "pfeiffer")),
    "anil": _some(inner_steps=(1, 2), first_order=(False, True)),
    "asam": _some(rho=(0.5,)),
    "awp": _some(rho=(0.01,)),
    "back-translation": lambda ground: st.just(
        {"there": checkpoint("t5"), "back": checkpoint("t5", seed=1), "max_new_tokens": 4}
    ),
    "balanced-sampling": _some(power=(0.0, 0.5)),
    "bitfit": _some(),
    "calibration": _some(content=(["N/A"], ["", "N/A"])),
    "class-weights": _weights,
    "constant": _some(warmup=(0.0, 1)),
    "cosine": _some(floor=(0.0, 0.1)),
    "curriculum": _some(by=("length", "rarity"), share=(0.5, 1.0)),
    "demonstrations": _some(contexts=(1, 2), share=(0.8,)),
    "cutoff": _some(kind=("span", "token", "feature"), ratio=(0.2, 0.4)),
    "distill": _teacher,
    "dora": _some(r=(2,), dropout=(0.0, 0.1)),
    "dropout": _some(p=(0.2, 0.4)),
    "early-stopping": _some(patience=(5,)),
    "eda": _some(alpha=(0.2,), copies=(1, 2)),
    "ema": _some(decay=(0.5, 0.99)),
    "episodes": _some(ways=(2, 3), shots=(1,), queries=(2,), per_epoch=(12,), evaluation_episodes=(2,)),
    "few-shot": _some(shots=(6, 8)),
    "fgm": _attack(epsilon=(0.1, 1.0), weight=(0.5, 1.0)),
    "fgsm": _attack(epsilon=(0.01, 0.05)),
    "focal": _some(gamma=(1.0, 2.0)),
    "fomaml": _some(inner_steps=(1, 2), inner_loss=("task", "full")),
    "freeat": _some(steps=(2, 3), epsilon=(None, 0.15), norm=("l2", "linf"), start=(0, 1)),
    "freelb": _some(
        steps=(2, 3), init=(0.0, 0.5), epsilon=(None, 0.3), norm=("l2", "linf"), per=("sequence", "token"), ramp=(0, 2)
    ),
    "freeze": _some(layers=(0, 1)),
    "full": _some(),
    "galore": _some(rank=(2, 4), refresh=(1, 2)),
    "gradual-unfreeze": _some(steps=(1, 2)),
    "gsam": _some(rho=(0.05,), alpha=(0.2,)),
    "ia3": _some(),
    "knowledgeable-verbalizer": _related,
    "l2-sp": _some(alpha=(0.01, 0.1)),
    "label-smoothing": _some(smoothing=(0.1, 0.3)),
    "layer-drop": _some(p=(0.2, 0.5), keep=(1, 2)),
    "layer-mixing": _some(last=(0.0, 2.0)),
    "linear": _some(warmup=(0.0, 1)),
    "lisa": _some(layers=(1,), every=(1, 2), state=("drop", "keep")),
    "lion": _some(beta2=(0.99,)),
    "llrd": _some(decay=(0.5, 0.9)),
    "look-sam": _some(every=(2, 3, 1)),
    "lookahead": _some(steps=(1, 2), alpha=(0.5,)),
    "lora": _some(r=(2,), dropout=(0.0, 0.1)),
    "lora-plus": _some(r=(2,), ratio=(4.0,)),
    "lp-ft": _some(steps=(1, 5)),
    "maml": _some(inner_steps=(1, 2), first_order=(False, True), inner_loss=("task", "full")),
    "maml-plus-plus": _some(inner_steps=(1, 2), multi_step=(0, 2), first_order_steps=(0, 1)),
    "mask-infill": lambda ground: st.just({"model": checkpoint("bert", "AutoModelForMaskedLM"), "alpha": 0.3}),
    "meta-sgd": _some(inner_steps=(1, 2), first_order=(False, True)),
    "mixout": _some(p=(0.5, 0.8)),
    "mixup": _some(alpha=(0.4, 2.0)),
    "multi-sample-dropout": _some(samples=(2, 4), p=(0.3, 0.5)),
    "muon": _some(momentum=(0.9,)),
    "neftune": _some(alpha=(0.3,)),
    "peft": _some(kind=("OFT", "LoHa", "HRA"), options=({},)),
    "pet": _some(patterns=(["a {text} was [MASK]"],), combine=("accuracy", "uniform")),
    "pgd": _attack(steps=(1, 2), norm=("l2", "linf"), start=(0, 1)),
    "poly": _some(epsilon=(1.0, -0.5)),
    "prototypical": _some(metric=("euclidean", "cosine"), pooling=("mean", "first")),
    "r3f": _some(sigma=(0.02,), noise=("normal", "uniform")),
    "rdrop": _some(alpha=(0.5, 1.0)),
    "reptile": _some(inner_steps=(2, 3)),
    "rslora": _some(r=(2,), dropout=(0.0, 0.1)),
    "sam": _some(rho=(0.05,)),
    "schedule-free": _some(warmup=(0.0, 1)),
    "self-training": _some(threshold=(None, 0.2), balance=(True, False)),
    "sgd": _some(momentum=(0.0, 0.9)),
    "soft-verbalizer": _some(ratio=(1.0, 10.0)),
    "smart": _some(steps=(1, 2), proximal=(0.5, 0.0)),
    "supcon": _some(weight=(0.5,), temperature=(0.3,), pool=("mean", "first")),
    "swa": _some(start=(0,), every=(1, 2)),
    "soft-template": _some(hard=([],)),
    "prompt-tuning": _some(n=(1, 3), text=(None, "good bad"), attacked=(False, True)),
    "p-tuning": _some(n=(2,), encoder=("mlp", "lstm"), hidden=(4,)),
    "prefix-tuning": _some(n=(2,), hidden=(4,)),
    "p-tuning-v2": _some(n=(1, 3)),
    "synonym": lambda ground: st.just({"path": synonyms(), "alpha": 0.5}),
    "template": lambda ground: st.just({"text": "{text} [MASK]", "verbalizer": {label: label for label in LABELS}}),
    "uda": _some(temperature=(0.5,), threshold=(0.0, 0.26), annealing=("none", "linear")),
    "tavat": _some(steps=(2, 1), init=(0.3, 0.5), start=(0, 1)),
    "vat": _some(steps=(1, 2), per=("sequence", "token"), ramp=(0, 2)),
    "verbalizer": _some(words=(2, 3)),
    "vera": _some(r=(4,), dropout=(0.0, 0.1)),
    "weight-decay": _some(value=(0.1,)),
    "wsd": _some(shape=("linear", "sqrt")),
}


PARTNERS = {"episodes": "episodes", "augmentation": "eda", "cloze": "template"}
"""What methods require of others, and the method that is added to provide it."""


def partners(names: Sequence[str]) -> list[str]:
    """The methods that these ones need beside them and lack."""
    needs = {need for name in names for need in traits_of(name).requires}
    have = {found for name in names for found in traits_of(name).provides}
    return [partner for need, partner in PARTNERS.items() if need in needs - have and partner not in names]


@functools.cache
def traits_of(name: str) -> Traits:
    found = getattr(Catalogue().find(name).load(), "traits", Traits())
    assert isinstance(found, Traits)
    return found


def without_words(methods: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same methods; beside one that finds words, `template` names none."""
    found = any("verbalizer" in method for method in methods)
    return [{"template": {"text": "{text} [MASK]"}} if found and "template" in method else method for method in methods]


@st.composite
def stacks(draw: st.DrawFn, least: int = 1) -> tuple[Ground, list[dict[str, Any]], dict[str, Any]]:
    """A ground, `least` to 4 methods with parameters, and options of the `train` section."""
    ground = draw(st.sampled_from(GROUNDS))
    names = draw(st.lists(st.sampled_from(sorted(PARAMETERS)), min_size=least, max_size=4, unique=True))
    # Without these, methods that build on them would nearly always be refused.
    names += [name for name in partners(names) if draw(st.booleans())]
    methods = without_words([{name: draw(PARAMETERS[name](ground))} for name in names])
    return ground, methods, {"accumulate": draw(st.sampled_from([1, 2])), "seed": draw(st.integers(0, 3))}


@dataclass(eq=False)
class Probe:
    """Outermost in every step: which weights moved, which passes were made, and whether evaluation left them alone."""

    name: ClassVar[str] = "probe"
    traits: ClassVar[Traits] = Traits(order=1000)

    passes: list[dict[str, int]] = field(default_factory=list, init=False)
    moved: set[str] = field(default_factory=set, init=False)
    problems: list[str] = field(default_factory=list, init=False)
    _after: dict[str, Tensor] = field(default_factory=dict, init=False)

    @hook
    def wrap_step(
        self, inner: Callable[..., Mapping[str, Tensor]], ctx: Context, works: Sequence[Work]
    ) -> Mapping[str, Tensor]:
        if ctx.run.dry:  # type: ignore[attr-defined]
            return inner(ctx, works)
        before = _copied(ctx.run)
        if self._after and (changed := _different(self._after, before)):
            self.problems.append(f"between two steps, {changed} changed")
        ctx.trace.clear()
        ctx.trace.recording = True
        try:
            terms = inner(ctx, works)
        finally:
            ctx.trace.recording = False
        self.passes.append(summarise(ctx.trace.events))
        self._after = _copied(ctx.run)
        changed = _different(before, self._after)
        if wrong := changed - set(ctx.run.may_optimise):  # type: ignore[attr-defined]
            self.problems.append(f"{wrong} moved, but is not optimised")
        self.moved |= changed
        if bad := [name for name, value in terms.items() if not torch.isfinite(torch.as_tensor(value)).all()]:
            self.problems.append(f"terms {bad} are not finite")
        return terms


def _copied(run: Any) -> dict[str, Tensor]:
    model: Run = run
    parts = {f"{part}/{name}": p for part in model.model_parts for name, p in model.modules[part].named_parameters()}
    return {name: p.detach().clone() for name, p in (*model.model.named_parameters(), *parts.items())}


def _different(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> set[str]:
    return {name for name, value in one.items() if not torch.equal(value, other[name])}
