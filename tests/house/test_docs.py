"""The documents tell the truth: names, signatures, links, commands and code are checked against what is there."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import re
import shlex
import shutil
import sys
import types
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import typer

import hybridengine
from hybridengine import errors
from hybridengine.cli.main import app, main
from hybridengine.plugin import Catalogue, HookSpecs
from hybridengine.plugin.calling import SPEC_NAMES
from hybridengine.testing import tiny_checkpoint

ROOT = Path(__file__).parents[2]
ENGLISH = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")
COOKBOOK = (ROOT / "plugins" / "README.md").read_text(encoding="utf-8")
PAGES = [
    *(ROOT / name for name in ("README.md", "README.zh-CN.md", "CHANGELOG.md", "CONTRIBUTING.md", "plugins/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]
MODEL = "sentence-transformers/all-MiniLM-L6-v2"  # the model of the documents; a tiny one takes its place here


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def shell_lines(text: str) -> list[str]:
    return [line for block in blocks(text, "sh") for line in block.splitlines() if line.strip()]


# ---- names and links -----------------------------------------------------------------------------------------------


def test_every_hook_stands_in_the_cookbook_with_its_signature() -> None:
    found = re.findall(r"^### `(\w+)\((.*?)\)`$", COOKBOOK, re.MULTILINE)
    wanted = [(name, ", ".join(inspect.signature(vars(HookSpecs)[name]).parameters)) for name in SPEC_NAMES]
    assert found == wanted


def test_every_kernel_stands_on_its_page_whose_code_runs() -> None:
    from hybridengine import kernels

    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    told = set(re.findall(r"`(\w+)", page))
    helpers = {"Kept", "MovedWeights", "Row", "Rule", "explain", "read_environment", "reset_used", "set_isa", "used"}
    helpers |= {"tune_allocator", "why_not_patched"}
    told |= set(re.findall(r"kernels\.(\w+)\(", page))
    assert set(kernels.__all__) - helpers <= told
    exec(blocks(page, "python")[0], {})


def test_every_trait_and_band_stands_in_the_cookbook() -> None:
    from hybridengine.plugin import Band, Traits

    for name in inspect.signature(Traits).parameters:
        assert f"`{name}`" in COOKBOOK, f"trait {name}"
    for band in Band:
        assert re.search(rf"`(Band\.)?{band.name}` \({band.value}\)", COOKBOOK), band.name


def shipped(kind: str) -> set[str]:
    listings = [listing for listing in Catalogue().all() if listing.distribution == "hybridengine"]
    return {listing.name for listing in listings if listing.load().traits.kind == kind}


@pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=["english", "chinese"])
def test_the_tables_hold_every_shipped_method_and_task_and_no_stranger(text: str) -> None:
    tables = re.findall(r"^\| (?:method|task|方法|任务) \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    rows = re.findall(r"^\| `([a-z0-9-]+)` \|", "".join(tables), re.MULTILINE)
    assert len(rows) == len(set(rows))
    assert set(rows) == shipped("method") | shipped("task")
    for name in shipped("data"):
        assert f"`{name}`" in text


def test_task_metrics_in_the_table_are_the_tasks_own() -> None:
    for listing in Catalogue().all():
        if listing.distribution == "hybridengine" and (cls := listing.load()).traits.kind == "task":
            metric = getattr(cls, "metric", None) or cls().metric
            line = next(line for line in ENGLISH.splitlines() if line.startswith(f"| `{listing.name}` |"))
            assert f"`{metric}`" in line or f"span `{metric}`" in line


def test_the_current_version_is_in_the_changelog() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[{re.escape(hybridengine.__version__)}\]", changelog, re.MULTILINE)
    assert re.search(r"^## \[Unreleased\]", changelog, re.MULTILINE)
    assert version("hybridengine") == hybridengine.__version__


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_local_links_resolve(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(linked.read_text(encoding="utf-8")), f"{page.name}: {target}"


def anchors(text: str) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=["english", "chinese"])
def test_the_speeds_told_are_those_measured(text: str) -> None:
    results = ROOT / "benchmarks" / "results"
    for data in ("pros_cons", "sst2"):
        found = json.loads((results / f"engine-{data}-cpu.json").read_text(encoding="utf-8"))
        trainer, full = (found["results"][name]["samples_per_second"]["median"] for name in ("trainer", "full"))
        pair = found["full_against_trainer"]
        low, ratio, high = sorted(pair["speed_ratio"]["each"])
        points = [100 * pair["comparison"][key] for key in ("difference", "low", "high")]
        assert (
            f"| `{data}` | {trainer:.0f} | {full:.0f} | {ratio:.2f} ({low:.2f} to {high:.2f}) |"
            " {:+.1f} ({:+.1f} to {:+.1f}) |".format(*points)
        ) in text
    methods = json.loads((results / "methods-cpu.json").read_text(encoding="utf-8"))["methods"]
    ratios = [entry["median"] for name, entry in methods["ratio_to_declared_passes"].items() if name != "plain"]
    assert re.search(rf"{min(ratios):.2f} (to|到) {max(ratios):.2f}", text)


def test_both_readmes_have_the_same_code() -> None:
    fenced = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
    assert fenced.findall(CHINESE) == fenced.findall(ENGLISH)
    assert len(re.findall(r"^## ", CHINESE, re.MULTILINE)) == len(re.findall(r"^## ", ENGLISH, re.MULTILINE))


# ---- commands ------------------------------------------------------------------------------------------------------


def commands() -> set[str]:
    group = typer.main.get_command(app)
    return set(group.commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_exists(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    text = page.read_text(encoding="utf-8")
    words = [*shell_lines(text), *re.findall(r"`((?:hybridengine|make) [^`]+)`", text)]
    for line in words:
        if found := re.search(r"(?:^|\| )hybridengine (?:--debug )?([a-z]+)", line):
            assert found[1] in commands(), line
        if found := re.match(r"make (.+)", line):
            assert set(found[1].split()) <= targets, line


def test_readme_names_every_command() -> None:
    named = set(re.findall(r"\bhybridengine ([a-z]+)", ENGLISH))
    assert commands() - named <= {"demo", "init", "version"}


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The examples, the README's config and a tiny model in place of the named one."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    model = tiny_checkpoint(tmp_path / "model", hidden_dropout_prob=0.1)
    for path in tmp_path.glob("examples/*.yaml"):
        path.write_text(path.read_text(encoding="utf-8").replace(MODEL, str(model)), encoding="utf-8")
    (config,) = blocks(ENGLISH, "yaml")
    (tmp_path / "reviews.yaml").write_text(config.replace(MODEL, str(model)), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def run_line(line: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Run one `hybridengine` line of a document in this process: `echo TEXT |` before it and `> FILE` after it."""
    before, _, command = line.rpartition(" | ")
    words = shlex.split(command)
    if ">" in words:
        words = words[: words.index(">")]
    text = f"{' '.join(shlex.split(before)[1:])}\n" if before else ""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output), pytest.raises(SystemExit) as end:
        main(words[1:])
    return int(end.value.code or 0), output.getvalue()


def test_readme_commands_and_code_run_in_order(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line for line in shell_lines(ENGLISH) if "hybridengine" in line]
    assert len(lines) >= 12
    refused = 0
    for line in lines:
        code, output = run_line(line, monkeypatch)
        if "methods=[lora, full" in line:
            assert code == 2
            refused += 1
            assert_shown(output, "error:")
        else:
            assert code == 0, f"{line}\n{output}"
        if line.endswith("plan examples/lora-fgm-rdrop.yaml"):
            assert_shown(output, "one training step")
    assert refused == 1
    assert_run_folder_as_described(workplace / "runs" / "first")
    namespace = types.ModuleType("readme")
    monkeypatch.setitem(sys.modules, namespace.__name__, namespace)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for code_block in blocks(ENGLISH, "python"):
        source = code_block.replace(MODEL, str(workplace / "model"))
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(source, "README.md", "exec"), vars(namespace))
    assert (workplace / "runs" / "library" / "report.html").is_file()


def assert_shown(output: str, start: str) -> None:
    """A block of the README that starts so stands in the output, word for word, apart from trailing blanks."""
    (shown,) = [block for block in blocks(ENGLISH, "text") if block.startswith(start)]
    lines = [line.rstrip() for line in output.splitlines()]
    for line in shown.splitlines():
        assert line.rstrip() in lines, f"{line!r} is not in the output:\n{output}"


def assert_run_folder_as_described(folder: Path) -> None:
    """The listing of the README is the folder, and every file and key of it stands in docs/run-folder.md."""
    (listing,) = [block for block in blocks(ENGLISH, "text") if block.startswith("runs/first/")]
    listed = {line.split()[0].rstrip("/") for line in listing.splitlines()[1:]}
    assert listed == {path.name for path in folder.iterdir()}
    page = (ROOT / "docs" / "run-folder.md").read_text(encoding="utf-8")
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    named = {key for line in lines for key in json.loads(line)}
    for name in ("summary.json", "plan.json", "data_card.json"):
        named |= set(json.loads((folder / name).read_text(encoding="utf-8")))
    named |= {path.name for path in folder.glob("checkpoints/*/*")}
    missing = sorted(key for key in named if f"`{key}`" not in page and f'"{key}"' not in page)
    assert not missing, f"docs/run-folder.md does not describe {missing}"


# ---- errors --------------------------------------------------------------------------------------------------------


def test_every_error_stands_in_its_page_with_its_exit_code() -> None:
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| ([\d, ]+) \|", page, re.MULTILINE))
    names = [name for name in errors.__all__ if isinstance(getattr(errors, name), type)]
    names.remove("HybridEngineError")
    assert set(rows) == set(names)
    for name in set(names) - {"Stopped"}:
        assert int(rows[name]) == getattr(errors, name).exit_code
    assert str(errors.Stopped("").exit_code) in rows["Stopped"]


@pytest.mark.parametrize(
    ("methods", "train", "said"),
    [
        (["full", "lora"], {}, "backbone"),
        (["fgm", "pgd"], {}, "embedding_attack"),
        (["maml"], {}, "add `episodes: {ways: N, shots: K}`"),
        (["rdrop"], {}, "the model has no dropout"),
        (["episodes", "reptile", "fgm"], {}, "never calls the layers inside"),
        (["episodes", "class-weights"], {}, "episodes renumber"),
        (["episodes"], {"checkpointing": True}, "checkpointing: false"),
        (["fgm", "fgm"], {}, "named twice"),
    ],
    ids=str,
)
def test_stacks_are_refused_as_described(
    methods: list[str], train: dict[str, bool], said: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("refused")
    config = {
        "task": "text-classification",
        "model": {"name": str(tiny_checkpoint(folder / "model"))},
        "data": {"train": str(ROOT / "examples" / "data" / "reviews.jsonl")},
        "train": train,
        "methods": methods,
        "output": str(folder / "run"),
    }
    with pytest.raises(errors.ConfigError, match=re.escape(said)):
        hybridengine.Engine(config).validate()
