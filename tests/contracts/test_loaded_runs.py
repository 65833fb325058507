"""Finished runs are loaded with what their methods need to predict, and without what only training needs."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tiny_runs import LABELS, checkpoint, run_config

import hybridengine
from hybridengine.engine import Engine
from hybridengine.errors import DataError, ModelError, OutputError
from hybridengine.plugin import Traits, hook


class Scale(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log = torch.nn.Parameter(torch.zeros(()))


@dataclass(eq=False)
class Temperature:
    """Multiplies the logits by one trained number."""

    traits: ClassVar[Traits] = Traits()

    @hook
    def on_run_start(self, run: Any) -> None:
        run.add_module("temperature", Scale())

    @hook
    def transform_outputs(self, ctx: Any, batch: Any, outputs: Any) -> Any:
        outputs.logits = outputs.logits * ctx.value("temperature/log", ctx.run.module("temperature").log).exp()
        return outputs


@dataclass(eq=False)
class Prepared:
    """Predicts only where it was prepared, and keeps what it saw there; it has no run module."""

    traits: ClassVar[Traits] = Traits()
    seen: list[tuple[bool, bool]] = field(default_factory=list)

    @hook
    def on_run_start(self, run: Any) -> None:
        if not run.dry:
            self.seen.append((run.predicting, "train" in run.splits))

    @hook
    def wrap_predict(self, inner: Any, ctx: Any, batch: Any, view: Any) -> Any:
        assert self.seen or ctx.run.dry
        return inner(ctx, batch, view)


TASKS: dict[str, tuple[tuple[str, str], Any]] = {
    "text-classification": (("bert", "AutoModelForSequenceClassification"), "a good movie"),
    "token-classification": (("bert", "AutoModelForTokenClassification"), {"tokens": ["mary", "visited"]}),
    "summarization": (("t5", "AutoModelForSeq2SeqLM"), "a good movie"),
}


def config_of(task: str, methods: list[Any], output: Path) -> dict[str, Any]:
    model = checkpoint(*TASKS[task][0])
    entry: Any = {task: {"max_new_tokens": 4}} if task == "summarization" else task
    return run_config(methods, output, model=model, task=entry, max_steps=1)


@pytest.mark.parametrize("task", TASKS)
def test_a_run_with_run_modules_is_loaded_for_every_kind_of_rows(task: str, tmp_path: Path) -> None:
    Engine(config_of(task, [], tmp_path / "run"), methods=[Temperature()]).train()
    loaded = hybridengine.load(tmp_path / "run", methods=[Temperature()])
    assert len(loaded.predict([TASKS[task][1]])) == 1


def test_methods_prepare_for_predictions_and_know_it(tmp_path: Path) -> None:
    trained, loaded = Prepared(), Prepared()
    Engine(config_of("text-classification", [], tmp_path / "run"), methods=[trained]).train()
    hybridengine.load(tmp_path / "run", methods=[loaded]).predict(["a good movie"])
    assert (trained.seen, loaded.seen) == ([(False, True)], [(True, False)])


def test_a_run_with_class_weights_needs_no_training_rows_to_predict(tmp_path: Path) -> None:
    Engine(run_config(["class-weights"], tmp_path / "run", max_steps=1), methods=[Temperature()]).train()
    assert len(hybridengine.load(tmp_path / "run", methods=[Temperature()]).predict(["a good movie"])) == 1


def test_a_distilled_run_needs_no_teacher_to_predict(tmp_path: Path) -> None:
    teacher = Path(shutil.copytree(checkpoint("bert", labels=tuple(sorted(LABELS))), tmp_path / "teacher"))
    config = run_config([{"distill": {"teacher": str(teacher)}}], tmp_path / "run", max_steps=1)
    Engine(config, methods=[Temperature()]).train()
    shutil.rmtree(teacher)
    assert len(hybridengine.load(tmp_path / "run", methods=[Temperature()]).predict(["a good movie"])) == 1


def test_rows_to_predict_are_checked_by_the_task(tmp_path: Path) -> None:
    Engine(config_of("token-classification", [], tmp_path / "run")).train()
    loaded = hybridengine.load(tmp_path / "run")
    with pytest.raises(DataError, match=r"input:2: tokens must be strings, not int"):
        loaded.predict([{"tokens": ["mary"]}, {"tokens": [1, 2]}])


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output: Path = tmp_path_factory.mktemp("adapted") / "run"
    Engine(run_config(["lora"], output, max_steps=1)).train()
    return output


def test_one_text_or_one_mapping_is_one_row(adapted: Path) -> None:
    loaded = hybridengine.load(adapted / "best")
    assert len(loaded.predict("great")) == len(loaded.predict({"text": "great"})) == 1
    assert len(loaded.predict(iter(["great", "poor"]))) == 2


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([3], r'input:1: expected a text or a mapping such as \{"text": "..."\}, not int'),
        (None, "expected texts, or mappings .*, not NoneType"),
        ([{"body": "great"}], r"input:1: there is no column 'text', only 'body'; rename"),
    ],
)
def test_what_is_no_row_is_refused_with_the_form_of_one(rows: Any, told: str, adapted: Path) -> None:
    with pytest.raises(DataError, match=told):
        hybridengine.load(adapted).predict(rows)


def test_a_run_stopped_before_its_first_evaluation_says_so(adapted: Path, tmp_path: Path) -> None:
    shutil.copy(adapted / "config.yaml", tmp_path)
    with pytest.raises(OutputError, match="stopped before its first evaluation"):
        hybridengine.load(tmp_path)


def test_the_card_of_an_adapter_loads_it_with_its_labels(adapted: Path) -> None:
    code = (adapted / "best" / "README.md").read_text(encoding="utf-8").split("```")[1].removeprefix("python")
    made: dict[str, Any] = {"FOLDER": str(adapted / "best")}
    exec(code, made)
    assert list(made["model"].config.id2label.values()) == sorted(LABELS)
    loaded = hybridengine.load(adapted)
    inputs = made["tokenizer"]("a good movie", return_tensors="pt")
    with torch.no_grad():
        best = made["model"].eval()(**inputs).logits.argmax().item()
    assert made["model"].config.id2label[best] == loaded.predict("a good movie")[0]["prediction"]


def test_files_of_best_follow_the_umask(adapted: Path) -> None:
    files = [p for p in (adapted / "best").iterdir() if p.is_file()]
    assert {p.stat().st_mode & 0o777 for p in files} == {(adapted / "best").stat().st_mode & 0o666}


def test_plan_refuses_the_output_and_start_that_validate_refuses(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for changed, told in (({"resume": "foo"}, "no checkpoint folder foo"), ({}, "is a file")):
        with pytest.raises(OutputError, match=told):
            Engine({**run_config([], tmp_path / "file"), **changed}).plan()


def test_validate_tells_an_occupied_output_together_with_bad_data(adapted: Path) -> None:
    config = run_config(["lora"], adapted, data={"columns": {"text": "body"}})
    with pytest.raises(OutputError, match=r"(?s)another config.*'body'"):
        Engine(config).validate()


def test_a_run_goes_on_for_longer_as_its_refusal_tells(adapted: Path, tmp_path: Path) -> None:
    config = run_config(["lora"], adapted, max_steps=2)
    with pytest.raises(OutputError) as refused:
        Engine(config).train()
    start = str(refused.value).rpartition("resume=")[2]
    assert Engine({**config, "output": str(tmp_path / "on"), "resume": start}).train()["steps"] == 2


def test_a_model_of_another_kind_is_told_in_a_line(tmp_path: Path) -> None:
    config = run_config([], tmp_path, model=checkpoint("gpt2"), task="summarization")
    with pytest.raises(ModelError, match=r"needs an encoder-decoder .* model, and GPT2 models are none") as refused:
        Engine(config).validate()
    assert "T5Config" not in str(refused.value)
