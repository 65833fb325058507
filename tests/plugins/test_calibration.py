"""Contextual calibration: against the formula of the paper, and a text without content that tells nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from plain import apart
from prompted import MORE_ROWS, ROWS, VERBALIZER, Ready, checkpoints, loaded_as_it_said, run_config
from torch import Tensor
from torch.nn import functional

from hybridengine import Engine
from hybridengine.errors import ConfigError
from hybridengine.seams import Batch, Prediction, View
from hybridengine.testing import tiny_bert, tiny_tokenizer
from hybridengine.testing.tasks import set_up_task
from hybridengine_plugins.prompts.calibration import Calibration
from hybridengine_plugins.prompts.soft_verbalizer import SoftVerbalizer
from hybridengine_plugins.prompts.template import Template
from hybridengine_plugins.tasks.text_classification import TextClassification


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return checkpoints(tmp_path_factory.mktemp("models"))


def said(ready: Ready, text: str) -> Tensor:
    """Class probabilities of one text, from the model itself."""
    tokenizer = ready.run.tokenizer
    words = tokenizer.convert_tokens_to_ids([VERBALIZER[label] for label in ready.run.labels])
    if tokenizer.mask_token_id is None:
        ids, at = tokenizer(f"{text} It was", return_tensors="pt")["input_ids"], -1
    else:
        text = text.replace("[MASK]", "[UNK]")  # a mask that a text brings along is no place for a word
        ids = tokenizer(f"{text} It was [MASK].", return_tensors="pt")["input_ids"]
        at = int((ids[0] == tokenizer.mask_token_id).nonzero())
    with torch.no_grad():
        return ready.base.eval()(input_ids=ids).logits[0, at, words].softmax(-1)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("content", [["N/A"], ["N/A", "[MASK]", ""]])
def test_matches_the_paper(folders: dict[str, Path], name: str, side: str, content: list[str]) -> None:
    """Zhao et al., section 5: W = diag(p_cf)^-1, b = 0, then normalised."""
    ready = Ready(Template(VERBALIZER), folders[name], Calibration(content), side=side)
    prediction = ready.predict()
    prior = torch.stack([said(ready, text) for text in content]).mean(0)
    expected = torch.stack([said(ready, row["text"]) for row in ROWS]) @ prior.reciprocal().diag()
    expected = expected / expected.sum(1, keepdim=True)
    torch.testing.assert_close(prediction.scores, expected, rtol=1e-9, atol=1e-9)
    loss = functional.nll_loss(expected.log(), ready.batch.targets, reduction="sum")
    torch.testing.assert_close(prediction.terms["loss"][0], loss, rtol=1e-9, atol=1e-9)
    bias = ready.bench.hooks.transform("transform_metrics", ready.run, {})["content_free_bias"]
    assert bias == pytest.approx(float((prior - 1 / 3).abs().sum() / 2), abs=1e-9) and bias > 0


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_text_without_content_becomes_uniform(folders: dict[str, Path], name: str) -> None:
    rows = [*ROWS, {"text": "N/A", "label": "bad"}]
    for others in ([], [SoftVerbalizer()]):
        ready = Ready(Template(VERBALIZER), folders[name], Calibration(["N/A"]), *others, rows=rows)
        scores = ready.predict().scores
        # the same row padded in other company: fp64 sums in another order
        torch.testing.assert_close(scores[4], torch.full((3,), 1 / 3, dtype=torch.float64), rtol=1e-9, atol=1e-9)
        assert (scores[:4] - 1 / 3).abs().max() > 1e-3


def test_a_model_without_preference_is_left_alone(folders: dict[str, Path]) -> None:
    ready = Ready(Template(VERBALIZER), folders["bert"], method := Calibration())
    told = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [1.0, 0.0, 0.0], [0.3, 0.3, 0.4]], dtype=torch.float64)

    def inner(ctx: Any, batch: Batch, view: View) -> Prediction:
        return Prediction(told if batch.rows[0] >= 0 else torch.full((batch.size, 3), 1 / 3, dtype=torch.float64))

    made = method.wrap_predict(inner, ready.bench.ctx, ready.batch, View())
    torch.testing.assert_close(made.scores, told, rtol=1e-12, atol=1e-12)
    assert bool(made.scores.isfinite().all()) and bool(made.terms["loss"][0].isfinite())


def test_training_is_not_touched(folders: dict[str, Path]) -> None:
    calibrated = Ready(Template(VERBALIZER), folders["dropout"], Calibration(), rows=MORE_ROWS)
    plain = Ready(Template(VERBALIZER), folders["dropout"], rows=MORE_ROWS)
    ours, theirs = (x.bench.gradients([x.batch]) for x in (calibrated, plain))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    calibrated.predict()
    assert apart(calibrated.bench.parameters(), plain.bench.parameters()) == 0


def test_batches_and_relabelling(folders: dict[str, Path]) -> None:
    ready = Ready(Template(VERBALIZER), folders["bert"], Calibration())
    whole = ready.predict().scores
    for row in range(4):
        torch.testing.assert_close(ready.predict(ready.collate([row])).scores[0], whole[row], rtol=1e-9, atol=1e-9)
    turned = Template({"bad": "great", "good": "fine", "mixed": "terrible"})
    other = Ready(turned, folders["bert"], Calibration()).predict().scores
    torch.testing.assert_close(whole[:, [1, 2, 0]], other, rtol=1e-12, atol=1e-12)


def test_a_plain_classifier_of_texts_and_pairs() -> None:
    """Rows with a second text are compared with a pair that says nothing."""
    model, tokenizer = tiny_bert(num_labels=2).double(), tiny_tokenizer("encoder")
    rows = [
        {"text": "a good film", "label": "x"},
        {"text": "bad", "text_pair": "awful", "label": "y"},
        {"text": "N/A", "text_pair": "N/A", "label": "y"},
    ]
    bench = set_up_task(TextClassification(), model, tokenizer, rows, methods=[Calibration(["N/A"])])
    from hybridengine.plugin import Split

    bench.run.splits = {"test": Split("test", rows)}
    batch = bench.batch(rows, bench.run.splits["test"].ids(range(3)))
    scores = bench.predict(batch).scores

    def alone(*texts: str) -> Tensor:
        with torch.no_grad():
            return model(**tokenizer(*texts, return_tensors="pt")).logits[0].softmax(-1)

    for row, (given, nothing) in enumerate(
        [(("a good film",), ("N/A",)), (("bad", "awful"), ("N/A", "N/A")), (("N/A", "N/A"), ("N/A", "N/A"))]
    ):
        expected = alone(*given) / alone(*nothing)
        torch.testing.assert_close(scores[row], expected / expected.sum(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(scores[2], torch.full((2,), 0.5, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("task", "methods", "message"),
    [
        ({"text-classification": {"multi_label": True}}, ["calibration"], "one label for each row.*remove it"),
        ("text-classification", ["calibration", "episodes"], "belongs to no episode; remove one of the two"),
    ],
)
def test_refusals(folders: dict[str, Path], tmp_path: Path, task: Any, methods: list[str], message: str) -> None:
    config = run_config(folders["bert"], methods, tmp_path / "run")
    if isinstance(task, dict):
        rows = [{**row, "label": [row["label"]]} for row in MORE_ROWS]
        config["data"] = {"train": rows, "validation": rows[:4], "carve": {}}
    with pytest.raises(ConfigError, match=message):
        Engine({**config, "task": task}).validate()


@pytest.mark.parametrize("methods", [[{"template": {"verbalizer": VERBALIZER}}, "calibration"], ["calibration"]])
def test_a_finished_run_predicts_calibrated(folders: dict[str, Path], tmp_path: Path, methods: list[Any]) -> None:
    content: list[Any] = [{"calibration": {"content": ["N/A"]}} if m == "calibration" else m for m in methods]
    summary = Engine(run_config(folders["bert"], content, tmp_path / "run")).train()
    assert summary["metrics"]["validation"]["content_free_bias"] > 0
    (record,) = loaded_as_it_said(tmp_path / "run").predict(["N/A"])
    assert list(record["probabilities"].values()) == pytest.approx([1 / 3] * 3, abs=1e-5)
