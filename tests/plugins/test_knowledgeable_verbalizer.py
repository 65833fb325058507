"""Expanded label words: sifted and weighed as in the paper, by a reference that goes word by word."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from plain import EXACT, LR, apart, key
from prompted import MORE_ROWS, VERBALIZER, Ready, checkpoints, loaded_as_it_said, run_config
from torch import Tensor
from torch.nn import functional

from hybridengine import Engine
from hybridengine.errors import ConfigError
from hybridengine.plugin import ParamGroup
from hybridengine.seams import View
from hybridengine.testing import WORDS
from hybridengine_plugins.adapters.lora import LoRA
from hybridengine_plugins.prompts.knowledgeable_verbalizer import KnowledgeableVerbalizer
from hybridengine_plugins.prompts.template import Template

RELATED = {
    "bad": ["awful", "poor", "Boring", "sad", "hate", "dull", "terrible", "boring"],
    "good": ["excellent", "happy", "qx", "¤", "love", "bright", "enjoy", "film"],
    "mixed": ["maybe", "film", "but", "movie", "phone", "price", "story"],
}
USABLE = {
    "bad": ["awful", "poor", "Boring", "sad", "hate", "dull"],
    "good": ["excellent", "happy", "love", "bright", "enjoy"],
    "mixed": ["maybe", "but", "movie", "phone", "price", "story"],
}
SIFTS_NOTHING = {"rare": 0.0, "relevance": 0.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return checkpoints(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def related(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("words") / "related.json"
    path.write_text(json.dumps(RELATED), encoding="utf-8")
    return str(path)


def said(model: Any, ready: Ready, rows: list[int]) -> Tensor:
    """Log-probabilities of the vocabulary at the mask of some rows, `[N, V]`."""
    batch = ready.collate(rows)
    logits = model(**batch.inputs).logits
    mask = ready.run.tokenizer.mask_token_id
    if mask is None:
        last = batch.inputs["attention_mask"].sum(1) - 1
        return logits[torch.arange(len(rows)), last].log_softmax(-1)
    at = (batch.inputs["input_ids"] == mask).nonzero()
    return logits[at[:, 0], at[:, 1]].log_softmax(-1)


def sifted(ready: Ready, rare: float, relevance: float) -> tuple[list[list[str]], dict[str, float]]:
    """Hu et al., section 3.3: frequency refinement, then relevance refinement; and the prior of every word."""
    tokenizer, labels = ready.run.tokenizer, ready.run.labels
    with torch.no_grad():
        p = said(ready.base.eval(), ready, list(range(len(ready.rows)))).exp()
    column = {word: p[:, tokenizer.convert_tokens_to_ids(word)].tolist() for word in WORDS}
    least = sorted(p.mean(0).tolist())

    def cosine(a: list[float], b: list[float]) -> float:
        return math.fsum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))

    words = []
    for label in labels:
        kept = [VERBALIZER[label]]
        for word in USABLE[label]:
            q = column[word.lower()]
            often = sum(value < math.fsum(q) / len(q) for value in least) >= rare * (len(least) - 1)
            near = {y: cosine(q, column[VERBALIZER[y]]) for y in labels}
            others = math.fsum(near[y] for y in labels if y != label)
            if often and near[label] * (len(labels) - 1) / others >= relevance:
                kept.append(word)
        words.append(kept)
    return words, {word: math.fsum(q) / len(q) for word, q in column.items()}


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize(("rare", "relevance"), [(0.0, 0.0), (0.5, 0.0), (0.0, 1.0), (0.3, 0.98)])
def test_words_are_sifted_as_in_the_paper(
    folders: dict[str, Path], related: str, name: str, rare: float, relevance: float
) -> None:
    method = KnowledgeableVerbalizer(related, rare=rare, relevance=relevance)
    ready = Ready(Template(VERBALIZER), folders[name], method, rows=MORE_ROWS)
    words, prior = sifted(Ready(Template(VERBALIZER), folders[name], rows=MORE_ROWS), rare, relevance)
    assert ready.run.cloze.words.texts == words
    flat = [prior[word.lower()] for group in words for word in group]
    priors = ready.run.module("knowledgeable-verbalizer").prior
    torch.testing.assert_close(priors, torch.tensor(flat).double().log(), rtol=0, atol=1e-6)  # `flat` is fp32
    dropped = sum(map(len, USABLE.values())) + 3 - len(flat)
    assert (dropped == 0) == (rare == relevance == 0)


@pytest.mark.parametrize("calibrate", [True, False])
def test_three_steps_match_the_paper(folders: dict[str, Path], related: str, calibrate: bool) -> None:
    """Sections 3.3 (contextualized calibration, learnable refinement) and 3.4: weighted sums of log-probabilities."""
    method = KnowledgeableVerbalizer(related, calibrate=calibrate, **SIFTS_NOTHING)
    ready = Ready(Template(VERBALIZER), folders["dropout"], method, rows=MORE_ROWS, lr=LR)
    plain = Ready(Template(VERBALIZER), folders["dropout"], rows=MORE_ROWS)
    model, tokenizer = plain.base, plain.run.tokenizer
    groups = [[VERBALIZER[label], *map(str.lower, USABLE[label])] for label in plain.run.labels]
    with torch.no_grad():
        prior = said(model.eval(), plain, list(range(len(MORE_ROWS)))).exp().mean(0).log()
    weights = [torch.zeros(len(group), dtype=torch.float64, requires_grad=True) for group in groups]
    parameters = [*model.train().parameters(), *weights]
    start = ready.bench.parameters()
    for step in range(3):
        rows = list(range(3 * step, 3 * step + 3))
        ready.bench.step([ready.collate(rows)])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key(step))
            log_p = said(model, plain, rows)
        log_p = log_p - prior if calibrate else log_p
        ids = [tokenizer.convert_tokens_to_ids(group) for group in groups]
        logits = torch.stack([log_p[:, i] @ w.softmax(0) for i, w in zip(ids, weights, strict=True)], 1)
        loss = functional.cross_entropy(logits, plain.collate(rows).targets)
        gradient = torch.autograd.grad(loss, parameters, allow_unused=True)
        with torch.no_grad():
            for value, g in zip(parameters, gradient, strict=True):
                value.sub_(0 if g is None else LR * g)
        theirs = {k: p.detach() for k, p in model.named_parameters()}
        theirs["knowledgeable-verbalizer/weights"] = torch.cat(weights).detach()
        assert apart(ready.bench.parameters(), theirs) < EXACT, step
    assert apart(ready.bench.parameters(), start) > 1e-3
    assert ready.bench.effect("knowledgeable-verbalizer", "shift") > 0


def test_a_list_without_new_words_is_the_template(folders: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "related.yaml"
    path.write_text("bad: terrible\ngood: great\nmixed: [fine, ¤]\n", encoding="utf-8")
    method = KnowledgeableVerbalizer(str(path), calibrate=False)
    ready = Ready(Template(VERBALIZER), folders["bert"], method)
    plain = Ready(Template(VERBALIZER), folders["bert"])
    torch.testing.assert_close(ready.logits(), plain.logits(), rtol=1e-12, atol=1e-12)
    ready.bench.step([ready.batch])
    assert ready.bench.effect("knowledgeable-verbalizer", "shift") < 1e-12


def test_relabelling_classes_permutes_logits(folders: dict[str, Path], related: str, tmp_path: Path) -> None:
    turn = {"bad": "good", "good": "mixed", "mixed": "bad"}
    path = tmp_path / "turned.json"
    path.write_text(json.dumps({label: RELATED[turn[label]] for label in turn}), encoding="utf-8")
    first = Ready(Template(VERBALIZER), folders["bert"], KnowledgeableVerbalizer(related)).logits()
    template = Template({label: VERBALIZER[turn[label]] for label in turn})
    second = Ready(template, folders["bert"], KnowledgeableVerbalizer(str(path))).logits()
    torch.testing.assert_close(first[:, [1, 2, 0]], second, rtol=1e-12, atol=1e-12)


def test_splits_loss_scale_and_padding_change_nothing(folders: dict[str, Path], related: str) -> None:
    def gradients(sizes: list[list[int]], **options: Any) -> dict[str, Tensor]:
        method = KnowledgeableVerbalizer(related, **SIFTS_NOTHING)
        ready = Ready(Template(VERBALIZER), folders["gpt2"], method, rows=MORE_ROWS, **options)
        return ready.bench.gradients([ready.collate(part) for part in sizes])

    whole = gradients([list(range(8))])
    assert "knowledgeable-verbalizer/weights" in whole
    assert apart(gradients([[i] for i in range(8)]), whole) < EXACT
    assert apart(gradients([[0, 1], [2, 3], [4, 5], [6, 7]]), whole) < EXACT
    assert apart(gradients([list(range(8))], loss_scale=1024.0), whole) < EXACT
    assert apart(gradients([list(range(8))], side="left"), whole) < 1e-9  # other positions in the row: rotated sums


def test_weights_that_do_not_learn_and_their_rate(folders: dict[str, Path], related: str) -> None:
    fixed = Ready(Template(VERBALIZER), folders["bert"], KnowledgeableVerbalizer(related, learn=False))
    assert not any(name.startswith("knowledgeable") for name in fixed.run.may_optimise)
    method = KnowledgeableVerbalizer(related, lr=0.5)
    run = Ready(Template(VERBALIZER), folders["bert"], method).run
    run.config.train.lr = 0.25
    groups = method.transform_param_groups(run, [ParamGroup(dict(run.may_optimise))])
    rates = {name: group.options.get("lr", 0.25) for group in groups for name in group.parameters}
    assert rates.pop("knowledgeable-verbalizer/weights") == 0.5 and set(rates.values()) == {0.25}


def test_functional_weights_are_read(folders: dict[str, Path], related: str) -> None:
    ready = Ready(Template(VERBALIZER), folders["bert"], KnowledgeableVerbalizer(related, **SIFTS_NOTHING))
    own = ready.run.module("knowledgeable-verbalizer").weights
    one = torch.full_like(own, -1e4)
    for start, size in zip((0, 7, 13), (7, 6, 7), strict=True):
        one[start + size - 1] = 1e4  # all weight on each class's last word
    ready.run.model.eval()
    view = View().with_params({"knowledgeable-verbalizer/weights": one})
    with torch.no_grad():
        logits = ready.bench.ctx.outputs(ready.batch, [view])[0].logits
        log_p = said(ready.base, ready, [0, 1, 2, 3])
    last = ready.run.tokenizer.convert_tokens_to_ids(["dull", "enjoy", "story"])
    prior = ready.run.module("knowledgeable-verbalizer").prior[[6, 12, 19]]
    torch.testing.assert_close(logits, log_p[:, last] - prior, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_learns_beside_lora(folders: dict[str, Path], related: str, name: str) -> None:
    method = KnowledgeableVerbalizer(related)
    ready = Ready(Template(VERBALIZER), folders[name], LoRA(r=4), method, fp64=False)
    ready.run.optimizer = torch.optim.Adam(list(ready.run.may_optimise.values()), lr=2e-2)
    for _ in range(30):
        ready.run.model.train()
        ready.bench.step([ready.batch])
    assert ready.logits().argmax(-1).tolist() == ready.batch.targets.tolist()


@pytest.mark.parametrize(
    ("template", "words", "message"),
    [
        ({}, RELATED, "names no words to start from; add `verbalizer: {label: word}`"),
        ({"verbalizer": VERBALIZER}, {"bad": ["awful"]}, "no words for label 'good'; add them"),
        ({"verbalizer": VERBALIZER}, {**RELATED, "goood": ["a"]}, "Did you mean 'good'"),
    ],
)
def test_refusals(
    folders: dict[str, Path], tmp_path: Path, template: dict[str, Any], words: dict[str, Any], message: str
) -> None:
    path = tmp_path / "related.json"
    path.write_text(json.dumps(words), encoding="utf-8")
    methods = [{"template": template}, {"knowledgeable-verbalizer": {"file": str(path)}}]
    with pytest.raises(ConfigError, match=message):
        Engine(run_config(folders["bert"], methods, tmp_path / "run")).validate()


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_finished_run_predicts_without_the_list(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    path = tmp_path / "related.json"
    path.write_text(json.dumps(RELATED), encoding="utf-8")
    methods = [{"template": {"verbalizer": VERBALIZER}}, {"knowledgeable-verbalizer": {"file": str(path)}}]
    engine = Engine(run_config(folders[name], methods, tmp_path / "run"))
    engine.train()
    path.unlink()
    model = loaded_as_it_said(tmp_path / "run")
    mine, theirs = (run.module("knowledgeable-verbalizer") for run in (model.run, engine._run))
    assert torch.equal(mine.weights, theirs.weights) and torch.equal(mine.prior, theirs.prior)
    assert mine.weights.abs().max() > 0
