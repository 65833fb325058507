"""`hybridengine bench`: what it writes, prints and refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from hybridengine.bench import catalogue, runner
from hybridengine.bench.ops import cross_entropy, total_norm
from hybridengine.bench.timing import Effort
from hybridengine.cli.main import main

TINY = Effort(block=0.0, rounds=2, fewest=2, seconds=0.0, compile_seconds=0.0, slowest=math.inf, total=math.inf)


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return int(ended.value.code or 0), out, err


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two operations with one tiny case each, measured for next to no time."""
    single = torch.float32
    monkeypatch.setattr(runner, "EFFORTS", dict.fromkeys(("quick", "default", "full"), TINY))
    monkeypatch.setattr(total_norm, "cases", lambda device: [total_norm._case(16, 1, single, "quick")])
    monkeypatch.setattr(cross_entropy, "cases", lambda device: [cross_entropy._case(8, 5, single, tier="quick")])
    monkeypatch.setattr("hybridengine.bench.floor._COPIED", {"cpu": 1 << 16})


def bench(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    return call(capsys, "bench", "--quick", "--device", "cpu", *arguments)


@pytest.mark.usefixtures("tiny")
def test_a_quick_run_writes_figures_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bench.json"
    code, out, err = bench(capsys, "--op", "total_norm", "--output", path)
    assert code == 0 and "1/1 total_norm: fp32 16 wide, 1 layers" in err
    assert out.endswith(f"wrote {path}\nwrote {tmp_path / 'bench.html'}\n")
    assert "total_norm\n  case" in out and "torch takes" in out
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    (row,) = report["rows"]
    assert row["op"] == "total_norm" and row["variants"]["torch"]["median_ms"] > 0
    machine = report["machine"]
    assert machine["threads"] == torch.get_num_threads() and machine["versions"]["torch"] == torch.__version__
    for key in ("device", "isa", "load_average", "load_average_after", "allocator", "versions"):
        assert machine[key] is not None or key == "isa"
    assert "THP_MEM_ALLOC_ENABLE" in machine["allocator"] and "liger-kernel" in machine["versions"]
    assert (tmp_path / "bench.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


@pytest.mark.usefixtures("tiny")
def test_a_competitor_that_cannot_run_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from importlib.metadata import PackageNotFoundError

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("hybridengine.bench.competitors.version", missing)
    code, out, _ = bench(capsys, "--op", "cross_entropy", "--against", "torch, quack")
    assert code == 0
    assert [line for line in out.splitlines() if line.startswith("not run")] == [
        "not run: quack: quack-kernels is not installed"
    ]


@pytest.mark.usefixtures("tiny")
def test_json_is_all_that_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = bench(capsys, "--op", "total_norm", "--op", "cross_entropy", "--against", "torch", "--json")
    report = json.loads(out)
    assert code == 0 and [row["op"] for row in report["rows"]] == ["cross_entropy", "total_norm"]
    assert all(list(row["variants"]) == ["hybridengine", "torch"] for row in report["rows"])


@pytest.mark.usefixtures("tiny")
def test_the_page_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, _ = bench(capsys, "--op", "total_norm", "--html", tmp_path / "page.html")
    assert code == 0 and [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_operations_take_turns_and_quick_cases_come_first() -> None:
    plan = runner.Plan(ops=("perturb", "total_norm", "perturb"))
    selected = runner._selected(plan, torch.device("cpu"), {})
    assert [(name, case.tier) for name, case in selected] == [
        ("perturb", "quick"),
        ("total_norm", "quick"),
        ("perturb", "quick"),
        ("perturb", "default"),
        ("total_norm", "default"),
        ("perturb", "default"),
    ]


@pytest.mark.usefixtures("tiny")
def test_when_the_time_is_over_the_rest_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dataclasses import replace

    monkeypatch.setattr(runner, "EFFORTS", {"quick": replace(TINY, total=-1.0)})
    code, out, _ = bench(capsys)
    assert code == 0 and "not run: the quick run ends after" in out and "name operations with --op" in out
    code, out, _ = bench(capsys, "--op", "total_norm")
    assert code == 0 and "ends after" not in out, "what is named is measured"


@pytest.mark.usefixtures("tiny")
def test_ctrl_c_keeps_what_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure = runner.measure

    def stopped(case: Any, bench: Any) -> dict[str, Any]:
        if case.label.startswith("fp32 16 wide"):
            raise KeyboardInterrupt
        return measure(case, bench)

    monkeypatch.setattr(runner, "measure", stopped)
    path = tmp_path / "bench.json"
    code, out, err = bench(capsys, "--op", "cross_entropy", "--op", "total_norm", "--output", path)
    assert code == 130 and "stopped: interrupted" in err and "cross_entropy" in out
    assert [row["op"] for row in json.loads(path.read_text(encoding="utf-8"))["rows"]] == ["cross_entropy"]


@pytest.mark.usefixtures("tiny")
def test_what_is_measured_is_on_the_disk_before_the_next_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For a process that is killed, which no handler survives."""
    measure, path, found = runner.measure, tmp_path / "bench.json", []

    def looked_at(case: Any, bench: Any) -> dict[str, Any]:
        found.append(json.loads(path.read_text(encoding="utf-8")) if path.exists() else None)
        return measure(case, bench)

    monkeypatch.setattr(runner, "measure", looked_at)
    bench(capsys, "--op", "cross_entropy", "--op", "total_norm", "--output", path)
    assert found[0] is None
    assert found[1]["interrupted"] and len(found[1]["rows"]) == 1 and found[1]["floor"]
    assert not json.loads(path.read_text(encoding="utf-8"))["interrupted"]


@pytest.mark.usefixtures("tiny")
def test_an_operation_whose_kernel_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(total_norm, "KERNEL", "nothing")
    code, out, _ = bench(capsys, "--op", "total_norm")
    assert code == 0 and "not run: total_norm: hybridengine.kernels has no nothing" in out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--op", "cros_entropy"), "there is no operation 'cros_entropy'. Did you mean 'cross_entropy'?"),
        (("--op", "a", "--op", "b"), "there is no operation 'b'. Valid names: cross_entropy, "),
        (("--op", "gelu", "--against", "torch,ligr"), "there is no competitor 'ligr'. Did you mean 'liger'?"),
        (("--op", "gelu", "--full"), "--quick and --full exclude each other"),
        (("--op", "gelu", "--device", "tpu"), "--device is cpu or cuda, not 'tpu'"),
        (("--op", "gelu", "--output", "none/b.json"), "there is no folder none"),
        (("--op", "gelu", "--output", "."), "is a folder"),
        (("--op", "gelu", "--output", "b.html"), "cannot be one file"),
    ],
)
def test_bad_input_is_told_before_anything_is_measured(
    arguments: tuple[str, ...],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, "bench", "--quick", *arguments)
    assert (code, out) == (2, "") and err.startswith("error: ") and told in err
    assert not list(tmp_path.iterdir())


def test_an_operation_is_one_file() -> None:
    folder = Path(catalogue.__file__).with_name("ops")
    assert catalogue.names() == sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    assert all(isinstance(catalogue.load(name).KERNEL, str) for name in catalogue.names())
