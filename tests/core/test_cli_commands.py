"""The commands that train nothing: right output, right exit codes, nothing written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from hybridengine.cli.demonstration import BUNDLED, bundled_model, data_section, demo_config, make_room
from hybridengine.cli.main import main
from hybridengine.config import load_config
from hybridengine.errors import DataError, OutputError
from hybridengine.kernels import native
from hybridengine.plugin import Catalogue
from hybridengine.testing import tiny_checkpoint


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return int(ended.value.code or 0), out, err


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, rows and a valid config."""
    folder = tmp_path_factory.mktemp("place")
    tiny_checkpoint(folder / "model", auto_class="AutoModelForSequenceClassification")
    words = {"a": "good great fine", "b": "bad poor sad"}
    rows = [{"text": f"the {word} film", "label": label} for label in words for word in words[label].split()]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
    config = {
        "task": "text-classification",
        "model": {"name": str(folder / "model")},
        "data": {"train": str(folder / "rows.jsonl"), "validation": str(folder / "rows.jsonl")},
        "train": {"max_length": 32},
        "methods": ["fgm"],
        "output": str(folder / "run"),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


# ---- validate and plan -------------------------------------------------------------------------------------------


def test_validate_shows_the_data_and_writes_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "validate", place / "config.yaml")
    assert (code, err) == (0, "")
    assert "24 rows" in out and out.endswith("is valid\n")
    assert not (place / "run").exists()


def test_validate_tells_every_problem_at_once(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "validate", place / "config.yaml", "train.epochs=-1", "train.bach_size=8", "optput=x")
    assert (code, out) == (2, "")
    lines = err.splitlines()
    assert len(lines) == 3 and all(line.startswith("error: ") for line in lines)
    assert "Did you mean 'batch_size'?" in err and "Did you mean 'output'?" in err


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("methods=[fmg]", "Did you mean 'fgm'?"),
        ("methods=[fgm,pgd]", "'fgm' and 'pgd' cannot be combined"),
        ("methods=[{fgm: {epsilonn: 1}}]", "Did you mean 'epsilon'?"),
        ("data.train=none.jsonl", "none.jsonl: no such file"),
        ("model.name=./none", "does not exist"),
        ("train.lr", "write it as key.subkey=value"),
    ],
)
def test_bad_input_exits_with_2(override: str, told: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "validate", place / "config.yaml", override)
    assert code == 2 and err.startswith("error: ") and told in err


@pytest.mark.parametrize("command", ["validate", "plan", "train"])
def test_a_missing_config(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, command, tmp_path / "none.yaml")
    assert code == 2 and "none.yaml: cannot be read" in err


def test_plan_draws_the_stack_and_its_cost(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "plan", place / "config.yaml")
    assert (code, err) == (0, "")
    assert "fgm > backward pass of one micro-batch" in out
    assert "F24 b F24 B S" in out or "F32 b F32 B S" in out
    assert "2.00x" in out and "epsilon=0.1" in out and "cross_entropy: " in out and "parameters are trained" in out
    assert not (place / "run").exists()


def test_plan_as_json(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "plan", place / "config.yaml", "--json")
    plan = json.loads(out)
    assert code == 0 and plan["layers"] == {"backward": ["fgm"]}
    assert plan["phases"][0]["relative_cost"] == 2.0 and plan["kernels"]


# ---- init ----------------------------------------------------------------------------------------------------------


def test_init_writes_a_config_that_validates(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "config.yaml"
    options = ("--task", "text-classification", "--model", place / "model", "--data", place / "rows.jsonl")
    code, out, _ = call(capsys, "init", path, *options, "--method", "fgm", "--method", "rdrop", "--output", "r")
    assert code == 0 and str(path) in out
    config, _ = load_config(path)
    assert config.methods == ["fgm", "rdrop"] and config.output == "r"
    defaults = load_config({"task": "t", "model": {"name": "m"}, "data": {}})[0]
    assert config.train == defaults.train  # also that YAML reads the written learning rate as a number
    assert call(capsys, "validate", path, "methods=[fgm]")[0] == 0


def test_init_comments_are_valid_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.yaml"
    code, *_ = call(capsys, "init", path, "--task", "text-classification", "--model", "a: b #c", "--data", "-")
    config, _ = load_config(yaml.safe_load(re.sub(r"(?m)^( *)# (\w+:)", r"\1\2", path.read_text())))
    assert code == 0 and config.model.name == "a: b #c"
    assert config.resume == "auto" and config.evaluate.resamples == 2000 and config.data.carve == {"validation": 0.1}


def test_init_never_overwrites_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("mine")
    options = ("--task", "text-classification", "--model", "m", "--data", "d")
    code, _, err = call(capsys, "init", path, *options)
    assert code == 2 and "--force" in err and path.read_text() == "mine"
    assert call(capsys, "init", path, *options, "--force")[0] == 0 and path.read_text() != "mine"


def test_init_names_what_is_missing_or_unknown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "init", tmp_path / "c.yaml", "--model", "m")
    assert code == 2 and "missing --task, --data" in err
    options = ("--task", "text-clasification", "--model", "m", "--data", "d", "--method", "fmg")
    code, _, err = call(capsys, "init", tmp_path / "c.yaml", *options)
    assert code == 2 and "'text-classification'" in err and "'fgm'" in err
    assert not (tmp_path / "c.yaml").exists()


# ---- plugins, kernels, schema, doctor ---------------------------------------------------------------------------


def test_plugins_list_as_json_names_everything_installed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "plugins", "list", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert code == 0 and sorted(rows) == Catalogue().names()
    fgm = rows["fgm"]
    assert (fgm["family"], fgm["kind"], fgm["distribution"]) == ("adversarial", "method", "hybridengine")
    assert fgm["hooks"] == ["wrap_backward", "check_stack"]
    assert fgm["summary"] and fgm["version"] and "pass" in fgm["cost"]


def test_plugins_list_groups_by_family(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = call(capsys, "plugins", "list")
    lines = out.splitlines()
    titles = [line for line in lines if line and not line.startswith(" ")]
    assert titles == sorted(set(titles)) and {"adversarial methods", "data sources", "meta methods", "tasks"} <= set(
        titles
    )
    found = lines.index("adversarial methods")
    group = lines[found + 1 : lines.index("", found)]
    assert group[0].split()[0] == "name" and group[0].endswith("cost")
    names = [line.split()[0] for line in group[1:]]
    assert names == sorted(names) and {"fgm", "freelb", "sam"} <= set(names)


def test_plugins_info(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "plugins", "info", "fgm")
    assert code == 0
    for part in (
        "Miyato",
        "wrap_backward",
        "epsilon",
        "≥0",
        "embedding_attack",
        "cost",
        "combines",
        "methods:\n- fgm:",
    ):
        assert part in out
    info = json.loads(call(capsys, "plugins", "info", "hybridengine:fgm", "--json")[1])
    assert info["schema"]["properties"]["epsilon"]["minimum"] == 0
    entry = yaml.safe_load(info["example"])["methods"][0]
    assert set(entry["fgm"]) == {row["name"] for row in info["parameters"]}


def test_plugins_info_of_an_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "plugins", "info", "fmg")
    assert code == 2 and "Did you mean 'fgm'?" in err


ACME = '''
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from hybridengine.plugin import Traits, hook
Path(__file__).with_name("imported").touch()

@dataclass(eq=False)
class Mine:
    """Raise in the loss."""
    traits: ClassVar[Traits] = Traits(family="acme")

    @hook
    def wrap_loss(self, inner, ctx, batch, view):
        raise ValueError("bad day")
'''


@pytest.fixture(scope="module")
def acme(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder on the path that holds a third-party distribution with one good and one broken plugin."""
    folder = tmp_path_factory.mktemp("acme")
    (folder / "acme_methods.py").write_text(ACME)
    info = folder / "acme_methods-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-methods\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(
        "[hybridengine.plugins]\nmine = acme_methods:Mine\nlost = acme_methods:Lost\n"
    )
    return folder


def run_with(acme: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hybridengine.cli.main", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(acme), "OMP_NUM_THREADS": "1"},
    )


def test_third_party_plugins_are_listed_without_importing_them(acme: Path) -> None:
    listed = run_with(acme, "plugins", "list", "--json")
    mine = next(row for row in json.loads(listed.stdout) if row["name"] == "mine")
    assert (mine["distribution"], mine["version"], mine["family"]) == ("acme-methods", "1.2", None)
    assert not (acme / "imported").exists()
    imported = run_with(acme, "plugins", "list", "--json", "--import")
    rows = {row["name"]: row for row in json.loads(imported.stdout)}
    assert rows["mine"]["family"] == "acme" and rows["mine"]["hooks"] == ["wrap_loss"]
    assert "acme-methods 1.2" in rows["lost"]["error"] and imported.returncode == 0


def test_a_plugin_that_raises_is_blamed_by_name_and_exits_with_1(acme: Path, place: Path) -> None:
    done = run_with(acme, "plan", place / "config.yaml", "methods=[mine]")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "ValueError: bad day (raised by plugin 'mine' (acme-methods 1.2) in hook wrap_loss)" in done.stderr
    assert "Traceback" in run_with(acme, "plan", place / "config.yaml", "methods=[mine]", "--debug").stderr


def test_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "kernels")
    assert code == 0 and "cross_entropy" in out and "default" in out
    assert native.why_missing() is not None or f"cpu: {native.module().isa()} (of baseline" in out
    rows = json.loads(call(capsys, "kernels", "--json")[1])
    assert {row["impl"] for row in rows} >= {"reference"}
    assert all(row["available"] or row["reason"] for row in rows)


def test_schema_holds_every_plugin(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "schema")
    schema: dict[str, Any] = json.loads(out)
    assert code == 0
    names = schema["properties"]["methods"]["items"]["anyOf"][0]["enum"]
    assert {"fgm", "lora", "adamw"} <= set(names) and "files" not in names
    assert "text-classification" in schema["properties"]["task"]["anyOf"][0]["enum"]
    assert schema["$defs"]["method:fgm"]["properties"]["epsilon"]["minimum"] == 0
    text = json.dumps(schema)
    references = {part.split('"')[0] for part in text.split('"$ref": "#/$defs/')[1:]}
    assert references <= set(schema["$defs"])


def test_the_schema_judges_as_the_engine_does(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    check = jsonschema.Draft202012Validator(json.loads(call(capsys, "schema")[1]))
    good = yaml.safe_load((place / "config.yaml").read_text())
    for methods in (["fgm"], [{"fgm": {"epsilon": 2.0, "order": 5}}], [{"fgm": None}], ["acme:mine"], []):
        assert check.is_valid({**good, "methods": methods})
    for methods in (["fmg"], [{"fgm": {"epsilonn": 2.0}}], [{"fgm": {"epsilon": -1}}], [{"fgm": {}, "lora": {}}]):
        assert not check.is_valid({**good, "methods": methods})
    assert not check.is_valid({**good, "train": {"lr": 0}})
    assert check.is_valid({**good, "data": {"use": "vader-reviews", "archive": "a.zip"}})
    assert not check.is_valid({**good, "data": {"use": "vader-reviews"}})


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "doctor", "--json")
    findings = {finding["name"]: finding for finding in json.loads(out)}
    assert code == 0
    for name in ("python", "torch", "transformers", "peft", "device", "precision", "compiler", "kernels", "disk"):
        assert name in findings
    assert "training, evaluation and prediction work here" in call(capsys, "doctor")[1]


def test_doctor_fails_on_a_broken_library(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)  # what an import then meets is an ImportError
    code, out, _ = call(capsys, "doctor")
    assert code == 1 and "broken: peft" in out and "pip install --upgrade peft" in out


# ---- runs and demo -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["evaluate", "predict", "report"])
def test_a_folder_that_is_no_run(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        code, out, err = call(capsys, command, folder)
        assert (code, out) == (2, "") and str(folder) in err and "run" in err


def test_the_demo_data_is_named_archive_then_environment_then_cache_then_bundled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data, source = data_section(None, {})
    assert data["train"] == str(BUNDLED) and "bundled" in source and "pip download" in source
    cached = Path(".cache/vaderSentiment-0.5.zip")
    for path in (cached, Path("env.zip"), Path("given.zip")):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    environment = {"HYBRIDENGINE_REVIEWS": "env.zip"}
    assert data_section(None, {})[0]["archive"] == str(cached)
    assert data_section(None, environment)[0]["archive"] == "env.zip"
    assert data_section(Path("given.zip"), environment)[0] == {"use": "vader-reviews", "archive": "given.zip"}
    with pytest.raises(DataError, match="no such archive"):
        data_section(Path("none.zip"), {})


def test_the_demo_config_is_valid() -> None:
    config, _ = load_config(demo_config(bundled_model(), data_section(None, {})[0], Path("runs/demo")))
    assert [name for name, _ in config.method_entries] == ["full", "llrd", "fgm"]
    assert (bundled_model() / "model.safetensors").is_file()


def test_the_demo_moves_an_earlier_run_away_and_leaves_other_folders_alone(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    make_room(output)
    for mark in ("first", "second", "third"):
        output.mkdir()
        (output / "config.yaml").write_text(mark)
        (output / "summary.json").touch()
        make_room(output)
        assert not output.exists() and (tmp_path / "demo.previous" / "config.yaml").read_text() == mark
    output.mkdir()
    make_room(output)
    (output / "thesis.txt").touch()
    with pytest.raises(OutputError, match="left alone"):
        make_room(output)
    assert (output / "thesis.txt").exists()


def test_small_truths_of_the_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from hybridengine.cli.result import _metrics
    from hybridengine.config import load_config
    from hybridengine.data import read_rows
    from hybridengine.errors import ConfigError, DataError
    from hybridengine.report.charts import Series, line_chart

    shown = _metrics({"main": "accuracy", "accuracy": 0.5, "f1_micro": 0.5, "f1_macro": 0.4})
    assert "micro" not in shown and "macro" in shown
    with pytest.raises(ConfigError, match=r"unknown key 'lr'. Did you mean 'train.lr'\?"):
        load_config({"lr": 1e-4})
    (tmp_path / "a.jsonl").write_text('{"text": "a\n', encoding="utf-8")
    with pytest.raises(DataError, match="control character at column 12"):
        list(read_rows(tmp_path / "a.jsonl"))
    chart = line_chart("k", "t", [Series("s", [(1, 0.1), (2, 0.1 - 1e-8), (3, 0.1)])])
    assert chart is not None and len({tick.label for tick in chart.y_ticks}) == len(chart.y_ticks)
    assert len({point.split(",")[1] for point in chart.lines[0].paths[0].split()}) == 1
    assert "rows.jsonl" in call(capsys, "plugins", "info", "files")[1]
    assert "REQUIRED" not in call(capsys, "plugins", "info", "template")[1]


def test_a_mistyped_config_is_told_before_torch_is_imported() -> None:
    code = "import sys; from hybridengine.cli.main import main\ntry: main(sys.argv[1:])\n"
    code += "finally: print('torch' in sys.modules)"
    for command in ("train", "plan", "validate"):
        done = subprocess.run([sys.executable, "-c", code, command, "lost.yaml"], capture_output=True, text=True)
        assert "lost.yaml: cannot be read" in done.stderr and done.stdout.strip() == "False", command
