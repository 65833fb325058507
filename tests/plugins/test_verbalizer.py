"""Words that tell the classes apart, found by the model's own predictions or read from a file."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from prompted import MORE_ROWS, VERBALIZER, Ready, checkpoints, loaded_as_it_said, run_config
from torch import Tensor

from hybridengine import Engine
from hybridengine.errors import ConfigError
from hybridengine.testing import WORDS
from hybridengine_plugins.prompts.template import Template
from hybridengine_plugins.prompts.verbalizer import WordSearch


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return checkpoints(tmp_path_factory.mktemp("models"))


def at_the_mask(ready: Ready, text: str) -> Tensor:
    """Probabilities of the whole vocabulary for one text, from the model itself."""
    tokenizer = ready.run.tokenizer
    if tokenizer.mask_token_id is None:
        ids = tokenizer(f"{text} It was", return_tensors="pt")["input_ids"]
        at = -1
    else:
        # a mask that a row brings along is no place for a word
        ids = tokenizer(f"{text.replace('[MASK]', '[UNK]')} It was [MASK].", return_tensors="pt")["input_ids"]
        at = int((ids[0] == tokenizer.mask_token_id).nonzero())
    with torch.no_grad():
        return ready.base.eval()(input_ids=ids).logits[0, at].softmax(-1)


def reference(ready: Ready, words: int, candidates: int) -> list[list[str]]:
    """PETAL, sections 4.1 and 4.3: candidates by likelihood, then the balanced log-likelihood ratio, token by token."""
    tokenizer = ready.run.tokenizer
    allowed = {i for w in WORDS if len(w) > 1 for i in tokenizer(w, add_special_tokens=False)["input_ids"]}
    q = [(at_the_mask(ready, row["text"]), row["label"]) for row in ready.rows]
    scores: list[tuple[float, int, int]] = []
    for c, label in enumerate(ready.run.labels):
        own = [p for p, other in q if other == label]
        rest = [p for p, other in q if other != label]
        likely = sorted(range(len(q[0][0])), key=lambda v: -sum(math.log(p[v]) for p in own))[:candidates]
        for v in likely:
            positive = sum(math.log(p[v]) - math.log(1 - p[v]) for p in own)
            negative = sum(math.log(1 - p[v]) - math.log(p[v]) for p in rest)
            scores.append((len(rest) / len(own) * positive + negative, c, v))
    found: list[list[str]] = [[] for _ in ready.run.labels]
    taken: set[int] = set()
    for _, c, v in sorted(scores, reverse=True):
        if v in allowed and v not in taken and len(found[c]) < words:
            found[c].append(tokenizer.convert_ids_to_tokens(v))
            taken.add(v)
    return found


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize(("words", "candidates"), [(3, 1000), (2, 60), (40, 1000)])
def test_the_words_are_those_of_the_paper(folders: dict[str, Path], name: str, words: int, candidates: int) -> None:
    method = WordSearch(words=words, candidates=candidates)
    ready = Ready(Template(), folders[name], method, rows=MORE_ROWS)
    assert ready.run.cloze.words.texts == reference(ready, words, candidates)
    assert any("verbalizer: bad: " in note for note in ready.run.notes)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_training_is_that_of_a_template_with_these_words(folders: dict[str, Path], name: str, side: str) -> None:
    """Three steps, parameter by parameter; the search leaves no trace but the words."""
    found = Ready(Template(), folders[name], WordSearch(words=3), rows=MORE_ROWS, side=side, lr=0.1)
    words = dict(zip(found.run.labels, found.run.cloze.words.texts, strict=True))
    named = Ready(Template(words), folders[name], rows=MORE_ROWS, side=side, lr=0.1)
    start = found.bench.parameters()
    for _ in range(3):
        found.bench.step([found.batch])
        named.bench.step([named.batch])
    ours, theirs = found.bench.parameters(), named.bench.parameters()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert not all(torch.equal(ours[k], start[k]) for k in ours)


def test_padding_and_batches_change_no_word(folders: dict[str, Path]) -> None:
    def found(**options: Any) -> list[list[str]]:
        ready = Ready(Template(), folders["bert"], WordSearch(words=4), rows=MORE_ROWS, **options)
        return ready.run.cloze.words.texts

    rows = copy.deepcopy(MORE_ROWS)
    assert found() == found(max_length=40) == found(side="left")
    whole = Ready(Template(), folders["bert"], WordSearch(words=4), rows=rows)
    whole.run.config.evaluate.batch_size = 2
    assert WordSearch(words=4)._search(whole.run) == found()


def test_the_model_is_left_as_it_was(folders: dict[str, Path]) -> None:
    ready = Ready(Template(), folders["bert"], WordSearch())
    fresh = Ready(Template(VERBALIZER), folders["bert"])
    assert ready.run.model.training
    for name, value in fresh.run.model.state_dict().items():
        assert torch.equal(value, ready.run.model.state_dict()[name])


def test_words_of_a_file(folders: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "words.yaml"
    path.write_text("good: [great, excellent]\nbad: terrible\nmixed: [fine, qx]\n", encoding="utf-8")
    ready = Ready(Template(), folders["bert"], WordSearch(file=str(path)))
    words = {"good": ["great", "excellent"], "bad": "terrible", "mixed": ["fine", "qx"]}
    assert torch.equal(ready.logits(), Ready(Template(words), folders["bert"]).logits())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("good: [great]\nbad: [poor]\n", "no words for label 'mixed'; add them"),
        ("good: great\nbad: poor\nmixed: fine\nmixd: a\n", "'mixd', which is no label; remove them"),
        ("- great\n", "must map each label"),
        ("good: [great]\nbad: [no]\nmixed: [fine]\n", "quotes around words such as 'no'"),
        ("good: [great\n", "cannot be read"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(folders: dict[str, Path], tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "words.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        Ready(Template(), folders["bert"], WordSearch(file=str(path)))


def test_refusals(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"no row of class '\w+' .* raise `rows`"):
        Ready(Template(), folders["bert"], WordSearch(rows=2))
    with pytest.raises(ConfigError, match="whole word of one token; raise `candidates`"):
        Ready(Template(), folders["bert"], WordSearch(candidates=1), rows=MORE_ROWS)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ([{"template": {"verbalizer": VERBALIZER}}, "verbalizer"], "names its words already; remove `verbalizer`"),
        (["template"], "no words for the labels; add `verbalizer: {label: word}`"),
        (["verbalizer"], "'verbalizer' needs 'cloze'.* add `template"),
        (["template", {"verbalizer": {"file": "lost.yaml"}}], "lost.yaml cannot be read"),
    ],
)
def test_stacks_that_are_refused(folders: dict[str, Path], tmp_path: Path, methods: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Engine(run_config(folders["bert"], methods, tmp_path / "run")).validate()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_finished_run_predicts_with_the_words_it_found(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    config = run_config(folders[name], ["template", {"verbalizer": {"words": 2}}], tmp_path / "run")
    Engine(config).train()
    about = json.loads((tmp_path / "run/best/hybridengine.json").read_text(encoding="utf-8"))
    model = loaded_as_it_said(tmp_path / "run")
    assert model.run.cloze.words.texts == about["memory"]["verbalizer"]["words"]
