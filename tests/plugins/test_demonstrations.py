"""Demonstrations: which rows are shown, where they stand, and training on them against a reference."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from plain import EXACT, LR, apart, key
from prompted import MORE_ROWS, ROWS, VERBALIZER, Ready, checkpoints, loaded_as_it_said, run_config
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor
from torch.nn import functional

from hybridengine import Engine, load
from hybridengine.errors import ConfigError, DataError
from hybridengine.plugin import Split
from hybridengine.seams import Batch
from hybridengine.testing import WORDS
from hybridengine_plugins.adversarial.fgm import FGM
from hybridengine_plugins.prompts.calibration import Calibration
from hybridengine_plugins.prompts.demonstrations import Demonstrations
from hybridengine_plugins.prompts.template import Template

LABELS = ("bad", "good", "mixed")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return checkpoints(tmp_path_factory.mktemp("models"))


def ready(folders: dict[str, Path], name: str = "bert", method: Demonstrations | None = None, **options: Any) -> Ready:
    options = {"rows": MORE_ROWS, **options}
    others = options.pop("others", [])
    return Ready(Template(VERBALIZER), folders[name], method or Demonstrations(), *others, **options)


def eligible(query: str, nearest: float) -> dict[str, list[tuple[float, str]]]:
    """LM-BFF, section 6.2: of each class the most similar rows, nearest first; similarity by scikit-learn's TF-IDF."""
    texts = {label: [row["text"] for row in MORE_ROWS if row["label"] == label] for label in LABELS}
    vectors = TfidfVectorizer(token_pattern=r"\w+").fit([text for group in texts.values() for text in group])
    own = vectors.transform([query])
    found = {}
    for label, group in texts.items():
        others = [(float((own @ vectors.transform([t]).T).toarray()[0, 0]), t) for t in group if t != query]
        others.sort(key=lambda pair: -pair[0])
        found[label] = others[: math.ceil(nearest * len(others))]
    return found


def written(made: Ready, batch: Batch) -> list[str]:
    """The rows of a batch as text."""
    rows = zip(batch.inputs["input_ids"], batch.inputs["attention_mask"], strict=True)
    return [made.run.tokenizer.decode(ids[mask == 1]) for ids, mask in rows]


def prompts(made: Ready, query: str, nearest: float) -> list[str]:
    """Every prompt that a query may become, as text."""
    tokenizer, found = made.run.tokenizer, eligible(query, nearest)
    masked, wanted = tokenizer.mask_token is not None, []
    query = query.replace("[MASK]", "[UNK]") if masked else query
    for bad in found["bad"]:
        for good in found["good"]:
            for mixed in found["mixed"]:
                trio = sorted(zip((bad, good, mixed), LABELS, strict=True), key=lambda pair: -pair[0][0])
                solved = [f"{text} It was {VERBALIZER[label]}." for (_, text), label in trio]
                if masked:
                    solved = [text.replace("[MASK]", "[UNK]") for text in solved]
                    whole = "[SEP] ".join([f"{query} It was [MASK].", *solved])
                else:
                    whole = "\n\n".join([*reversed(solved), f"{query} It was"])
                wanted.append(tokenizer.decode(tokenizer(whole)["input_ids"]))
    return wanted


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("nearest", [0.5, 1.0])
def test_rows_stand_beside_one_similar_row_of_each_class(
    folders: dict[str, Path], name: str, side: str, nearest: float
) -> None:
    made = ready(folders, name, Demonstrations(nearest=nearest, share=0.8), side=side)
    seen: set[str] = set()
    for step in range(12):
        made.run.step = step
        for text, row in zip(written(made, made.transformed()), MORE_ROWS, strict=True):
            assert text in prompts(made, row["text"], nearest)
            seen.add(text)
    possible = {text for row in MORE_ROWS for text in prompts(made, row["text"], nearest)}
    assert len(seen) > len(MORE_ROWS)  # steps differ
    assert seen <= possible


def test_the_choice_follows_seed_text_and_step_alone(folders: dict[str, Path]) -> None:
    made = ready(folders, method=Demonstrations(nearest=1.0))
    whole = written(made, made.transformed())
    assert whole == written(made, made.transformed())
    for i in range(len(MORE_ROWS)):
        assert written(made, made.transformed(made.collate([i]))) == whole[i : i + 1]
    for seed in (0, 1):
        other = ready(folders, method=Demonstrations(nearest=1.0), seed=seed)
        assert (whole == written(other, other.transformed())) == (seed == 0)
    made.run.step = 1
    assert whole != written(made, made.transformed())


def test_never_the_query_itself_nor_its_double(folders: dict[str, Path]) -> None:
    rows = [{"text": WORDS[i % 6] + " film", "label": LABELS[i % 3]} for i in range(18)]  # six texts, thrice each
    made = ready(folders, method=Demonstrations(nearest=1.0, share=0.8), rows=rows)
    for step in range(20):
        made.run.step = step
        for text, row in zip(written(made, made.transformed()), rows, strict=True):
            assert text.count(f" {row['text']} ") == 1, text


def reference(model: Any, tokenizer: Any, texts: list[str], targets: Tensor, seed: int) -> dict[str, Tensor]:
    """Cross-entropy of the label words at the mask of written-out prompts."""
    inputs = tokenizer([text.replace("[CLS] ", "").removesuffix(" [SEP]") for text in texts], padding=True)
    inputs = {k: torch.tensor(v) for k, v in inputs.items()}
    words = tokenizer.convert_tokens_to_ids([VERBALIZER[label] for label in LABELS])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        logits = model(**inputs).logits
    at = (inputs["input_ids"] == tokenizer.mask_token_id).nonzero()
    loss = functional.cross_entropy(logits[at[:, 0], at[:, 1]][:, words], targets)
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {k: g for k, g in zip(parameters, found, strict=True) if g is not None}


def test_three_steps_match_training_on_the_written_prompts(folders: dict[str, Path]) -> None:
    made = ready(folders, "dropout", lr=LR)
    plain = Ready(Template(VERBALIZER), folders["dropout"], rows=MORE_ROWS)
    model, start = plain.base.train(), made.bench.parameters()
    for step in range(3):
        batch = made.transformed(made.collate(range(3 * step, 3 * step + 3)))
        made.bench.step([batch])
        texts = written(made, batch)
        assert all(text.count("[SEP]") == 4 and text.count("[MASK]") == 1 for text in texts)
        gradient = reference(model, plain.run.tokenizer, texts, batch.targets, key(step))
        with torch.no_grad():
            for name, g in gradient.items():
                model.get_parameter(name).sub_(LR * g)
        assert apart(made.bench.parameters(), {k: p.detach() for k, p in model.named_parameters()}) < EXACT, step
    assert apart(made.bench.parameters(), start) > 1e-3
    assert made.bench.effect("demonstrations", "shown") == 3


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("contexts", [1, 3])
def test_a_prediction_is_the_mean_over_contexts(folders: dict[str, Path], name: str, contexts: int) -> None:
    method = Demonstrations(contexts=contexts, nearest=1.0)
    made = ready(folders, name, method)
    scores = [made.logits(method._written(made.run, made.batch, "context", k)).softmax(-1) for k in range(contexts)]
    prediction = made.predict()
    torch.testing.assert_close(prediction.scores, torch.stack(scores).mean(0), rtol=1e-12, atol=1e-12)
    loss = functional.nll_loss(prediction.scores.log(), made.batch.targets, reduction="sum")
    torch.testing.assert_close(prediction.terms["loss"][0], loss)
    assert contexts == 1 or not torch.equal(scores[0], scores[1])


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("limit", [36, 40, 63])
def test_everything_fits_and_the_query_keeps_its_share(folders: dict[str, Path], name: str, limit: int) -> None:
    rows = [{"text": " ".join(WORDS[20 + (i + j) % 40] for j in range(50)), "label": LABELS[i % 3]} for i in range(9)]
    made = ready(folders, name, rows=rows, max_length=limit)
    batch = made.transformed()
    assert batch.inputs["input_ids"].shape[1] <= limit
    ids, template = batch.inputs["input_ids"], 6 if name == "bert" else 3  # [CLS] it was [MASK] . [SEP], <s> it was
    if name == "bert":
        assert ((ids == made.run.tokenizer.mask_token_id).sum(1) == 1).all()
    for text, row in zip(written(made, batch), rows, strict=True):
        parts = text.split("[SEP]") if name == "bert" else text.removeprefix("<s> ").split(". ")
        query = parts[0].removeprefix("[CLS] ") if name == "bert" else parts[-1]
        kept = query.split(" it was")[0].split()
        assert kept == row["text"].split()[: len(kept)]
        assert len(kept) >= min(50, math.floor(limit / 2) - template)
        assert len(parts) == (5 if name == "bert" else 4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_splits_padding_and_loss_scale_change_nothing(folders: dict[str, Path], side: str) -> None:
    def gradients(sizes: list[list[int]], **options: Any) -> dict[str, Tensor]:
        made = ready(folders, "gpt2", side=side, **options)
        return made.bench.gradients([made.transformed(made.collate(part)) for part in sizes])

    whole = gradients([list(range(8))])
    assert apart(gradients([[i] for i in range(8)]), whole) < EXACT
    assert apart(gradients([[0, 1], [2, 3], [4, 5], [6, 7]]), whole) < EXACT
    assert apart(gradients([list(range(8))], loss_scale=1024.0), whole) < EXACT


def test_unlabelled_rows_get_demonstrations_and_an_attack_finds_the_texts(folders: dict[str, Path]) -> None:
    unlabelled = [{"text": "a dull story"}, {"text": "i love it"}]
    made = ready(folders, unlabelled=unlabelled, others=[FGM(epsilon=0.1)])
    split = made.run.splits["unlabelled"]
    features = made.run.cloze.features(made.run, unlabelled)
    part = made.task.collate(made.run, features, split.ids(range(2)), made.run.random)
    batch = made.transformed(Batch(**{**vars(made.batch), "parts": {"unlabelled": part}}))
    assert [text.count("[SEP]") for text in written(made, batch.parts["unlabelled"])] == [4, 4]
    assert torch.equal(batch.targets, made.batch.targets) and batch.rows == made.batch.rows
    made.bench.step([made.transformed()])
    assert made.bench.effect("fgm", "delta_norm") > 0


def test_a_text_without_content_is_calibrated_beside_demonstrations(folders: dict[str, Path]) -> None:
    made = ready(folders, method=Demonstrations(contexts=3), others=[Calibration(["N/A"])])
    made.run.splits["test"] = Split("test", [{"text": "N/A"}])
    feature = made.run.cloze.features(made.run, [{"text": "N/A"}])
    batch = made.task.collate(made.run, feature, made.run.splits["test"].ids([0]), made.run.random)
    expected = torch.full((1, 3), 1 / 3, dtype=torch.float64)
    torch.testing.assert_close(made.predict(batch).scores, expected, rtol=1e-9, atol=1e-9)


def test_refusals(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"class 'mixed' has a single training text.*; add rows"):
        ready(folders, rows=[*ROWS, {"text": "fine", "label": "mixed"}, {"text": "awful", "label": "bad"}])
    with pytest.raises(ConfigError, match=r"do not fit into 50% of 20 tokens; raise `train.max_length`"):
        ready(folders, max_length=20)
    config = run_config(folders["bert"], ["template", "soft-verbalizer", "demonstrations"], tmp_path / "run")
    with pytest.raises(ConfigError, match="no label words to fill in; add `verbalizer` to template"):
        Engine(config).validate()


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_finished_run_shows_the_rows_that_it_kept(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    methods: list[Any] = ["template", {"verbalizer": {"words": 1}}, {"demonstrations": {"contexts": 2, "pool": 2}}]
    Engine(run_config(folders[name], methods, tmp_path / "run")).train()
    loaded_as_it_said(tmp_path / "run")
    texts = [row["text"] for row in MORE_ROWS[4:]]
    together = load(tmp_path / "run").predict(texts)
    for text, record in zip(texts, together, strict=True):  # whatever stands beside it
        (alone,) = load(tmp_path / "run").predict([text])
        assert alone["probabilities"] == pytest.approx(record["probabilities"], abs=5e-6)
