"""Train, stop, go on, evaluate, predict and report through the command line."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from hybridengine.cli.main import main
from hybridengine.testing import tiny_checkpoint

GOOD, BAD = "good great fine happy excellent".split(), "bad awful poor sad terrible".split()
NOUNS = "movie film book food phone plot actor story".split()


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return int(ended.value.code or 0), out, err


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, rows that it can learn, and a config of 20 steps."""
    folder = tmp_path_factory.mktemp("place")
    tiny_checkpoint(folder / "model", auto_class="AutoModelForSequenceClassification")
    rows = [
        {"text": f"the {noun} was {word}", "label": label}
        for label, words in (("negative", BAD), ("positive", GOOD))
        for word in words
        for noun in NOUNS
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "task": "text-classification",
        "model": {"name": str(folder / "model")},
        "data": {"train": str(folder / "rows.jsonl"), "carve": {"validation": 0.2, "test": 0.2}},
        "train": {"max_steps": 20, "batch_size": 16, "lr": 1e-2, "max_length": 16, "precision": "fp32"},
        "methods": [{"fgm": {"epsilon": 0.1}}],
        "output": str(folder / "run"),
        "evaluate": {"resamples": 50},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def trained(place: Path) -> Path:
    """The folder of a finished run."""
    with pytest.raises(SystemExit) as ended:
        main(["train", str(place / "config.yaml")])
    assert ended.value.code == 0
    return place / "run"


def test_train_tells_size_plan_eta_and_result(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "train", place / "config.yaml", f"output={place / 'told'}")
    assert (code, err) == (0, "")
    assert "F16 b F16 B S" in out
    assert re.search(r"26,\d\d\d of 26,\d\d\d parameters are trained, 20 steps", out)
    assert re.search(r"step 1/20 .*ETA", out) and re.search(r"step 20/20 +loss", out)
    assert re.search(r"validation +accuracy [\d.]+% \(95% interval [\d.]+% to [\d.]+%\)", out)
    assert re.search(r"test +accuracy", out) and "delta norm 0.1" in out
    assert str(place / "told" / "report.html") in out and "\x1b" not in out
    assert json.loads((place / "told" / "summary.json").read_text())["status"] == "finished"


def test_a_finished_run_shows_its_result_again(place: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (trained / "summary.json").read_bytes()
    code, out, _ = call(capsys, "train", place / "config.yaml")
    assert code == 0 and "finished already" in out and "accuracy" in out
    assert (trained / "summary.json").read_bytes() == before


def test_another_config_in_the_same_folder(place: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "train", place / "config.yaml", "train.lr=1e-3")
    assert code == 2 and "train.lr" in err


def test_evaluate_agrees_with_the_run(place: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = json.loads((trained / "summary.json").read_text())["metrics"]
    for target in (trained, place / "config.yaml"):
        code, out, _ = call(capsys, "evaluate", target, "--json")
        assert code == 0
        again = json.loads(out)
        assert {split: again[split]["accuracy"] for split in again} == {s: metrics[s]["accuracy"] for s in metrics}
    assert "accuracy" in call(capsys, "evaluate", trained)[1]


def test_predict_writes_one_object_a_row_in_order(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["the film was good", "the book was awful", "the plot was great"]
    (tmp_path / "rows.txt").write_text("\n".join(texts))
    code, out, err = call(capsys, "predict", trained, tmp_path / "rows.txt", "--batch-size", 1)
    assert (code, err) == (0, "")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["text"] for row in rows] == texts
    assert all(sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-4) for row in rows)
    lines = "".join(json.dumps({"text": text, "label": "unused"}) + "\n" for text in texts)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    assert call(capsys, "predict", trained)[1] == out


def test_predict_names_the_line_of_a_bad_row(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "good"}\n{"text": "bad"}\n{"text": 5}\n')
    code, out, err = call(capsys, "predict", trained, tmp_path / "rows.jsonl", "--batch-size", 1)
    assert code == 2 and out == "" and "rows.jsonl:3: " in err


def test_report_is_written_again(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (trained / "report.html").unlink()
    code, out, _ = call(capsys, "report", trained)
    assert code == 0 and Path(out.strip()) == trained / "report.html" and (trained / "report.html").is_file()


def test_an_output_folder_with_foreign_files(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").touch()
    code, _, err = call(capsys, "train", place / "config.yaml", f"output={tmp_path}")
    assert code == 2 and str(tmp_path) in err and [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def weights(folder: Path) -> bytes:
    return (folder / "best" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_writes_a_checkpoint_and_the_same_command_goes_on(
    number: signal.Signals, code: int, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Enough steps that the signal, sent when the first is told, meets a run that is not over.
    long = ("train.max_steps=150", "train.evaluate_every=150", "train.save_every=150")
    output = place / f"stopped-{code}"
    command = ("train", str(place / "config.yaml"), *long, f"output={output}")
    process = subprocess.Popen(
        [sys.executable, "-m", "hybridengine.cli.main", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},  # which the order of sums depends on
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 1/"):
            process.send_signal(number)
            break
    _, err = process.communicate()
    assert process.returncode == code, err
    assert "stopped at step" in err and "Traceback" not in err
    summary = json.loads((output / "summary.json").read_text())
    assert summary["status"] == "stopped" and 0 < summary["steps"] < 150
    assert call(capsys, *command)[0] == 0
    whole = place / "whole"
    assert call(capsys, *command[:-1], f"output={whole}")[0] == 0
    assert weights(output) == weights(whole)
