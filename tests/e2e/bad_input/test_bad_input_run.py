"""What goes wrong while running: output folders, plugins, NaN, signals, a full disk. Nothing is lost."""

from __future__ import annotations

import inspect
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from bench import Bench, call

from hybridengine.cli.failures import report
from hybridengine.engine import Engine
from hybridengine.errors import NonFiniteError, PluginError
from hybridengine.plugin import Traits, hook

# ---- output folders --------------------------------------------------------------------------------------------------


def test_a_foreign_output_folder(bench: Bench) -> None:
    (bench.folder / "run").mkdir()
    (bench.folder / "run" / "thesis.txt").write_text("work of years")
    path = bench.write(bench.text())
    bench.refused(lambda: Engine(path), f"{path}:4: output run holds files that are no run of hybridengine")
    code, _, err = call("train", path)
    assert code == 2 and "choose another `output`" in err


def test_an_output_that_cannot_be_a_folder(bench: Bench) -> None:
    (bench.folder / "file").write_text("x")
    for output, told in {"file": "output file is a file", "file/run": "", "a" * 300: "File name too long"}.items():
        bench.refused(lambda output=output: Engine(bench.config(output=output)), told, "choose another", roads="train")


def test_the_folder_of_another_config_or_of_a_finished_run(bench: Bench) -> None:
    path = bench.write(bench.text())
    summary = Engine(path).train()
    before = bench.snapshot()
    bench.refused(lambda: Engine(path, ["train.lr=1e-3", "methods=[fgm]"]), "changed: methods, train.lr")
    bench.refused(lambda: Engine(path, ["resume=never"]), "`resume` is never; choose another `output`", roads="train")
    assert Engine(path).train()["metrics"] == summary["metrics"]
    code, out, _ = call("train", path)
    assert code == 0 and "finished already" in out
    assert bench.snapshot() == before


def test_predicting_without_a_run_or_from_bad_rows(bench: Bench) -> None:
    assert call("predict", "nowhere", "rows.jsonl")[0] == 2
    code, _, err = call("predict", bench.models, "rows.jsonl")
    assert code == 2 and "not a run folder" in err
    Engine(bench.config()).train()
    (bench.folder / "in.jsonl").write_text('{"text": "good"}\n{"text": null}\n')
    code, out, err = call("predict", "run", "in.jsonl")
    assert (code, out) == (2, "") and "in.jsonl:2: column 'text' is null" in err
    assert "none.jsonl" in call("predict", "run", "none.jsonl")[2]


def test_a_run_that_failed_before_its_first_checkpoint_keeps_no_folder_occupied(bench: Bench) -> None:
    with pytest.raises(NonFiniteError):
        Engine(bench.config(), methods=[NotANumber(at=0)]).train()
    assert json.loads((bench.folder / "run" / "summary.json").read_text())["status"] == "failed"
    assert Engine(bench.config(train={"lr": 1e-3})).train()["status"] == "finished"


# ---- losses that are no numbers --------------------------------------------------------------------------------------


@dataclass(eq=False)
class NotANumber:
    """Makes the loss of one step no number."""

    traits: ClassVar[Traits] = Traits()
    cured: ClassVar[bool] = False
    at: int = 1
    value: str = "nan"

    @hook
    def wrap_loss(self, inner: Any, ctx: Any, batch: Any, view: Any) -> Any:
        out = inner(ctx, batch, view)
        if ctx.run.dry or self.cured or ctx.run.step != self.at:
            return out
        broken = {name: (total * float(self.value), unit) for name, (total, unit) in out.terms.items()}
        return replace(out, terms=broken)


@dataclass(eq=False)
class BrokenGradient:
    """Makes one gradient infinite in one step."""

    traits: ClassVar[Traits] = Traits()
    cured: ClassVar[bool] = False

    @hook
    def wrap_backward(self, inner: Any, ctx: Any, work: Any) -> Any:
        terms = inner(ctx, work)
        if not ctx.run.dry and not self.cured and ctx.run.step == 1:
            next(iter(ctx.run.optimised().values())).grad.fill_(float("inf"))
        return terms


@dataclass(eq=False)
class Spy:
    """Keeps the run, to look at its weights after a failure."""

    traits: ClassVar[Traits] = Traits()

    @hook
    def on_run_start(self, run: Any) -> None:
        if not run.dry:
            self.run = run

    @hook
    def on_step_end(self, run: Any, metrics: Mapping[str, Any]) -> None:
        self.weights = {name: value.detach().clone() for name, value in run.may_optimise.items()}


@pytest.mark.parametrize("cause", [NotANumber(), NotANumber(value="inf"), BrokenGradient()])
def test_no_number_stops_before_the_update(cause: Any, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy()
    config = bench.config(train={"max_steps": 3, "save_every": 1})
    with pytest.raises(NonFiniteError) as caught:
        Engine(config, methods=[cause, spy]).train()
    told = str(caught.value)
    assert told.startswith("step 2: ") and "rows.jsonl:" in told
    assert "weights are unchanged" in told and caught.value.exit_code == 1
    assert all(spy.weights[name].equal(value.detach()) for name, value in spy.run.may_optimise.items())
    assert [p.name for p in (bench.folder / "run" / "checkpoints").iterdir()] == ["step-00000001"]
    summary = json.loads((bench.folder / "run" / "summary.json").read_text())
    assert summary["status"] == "failed" and "step 2" in summary["error"]
    monkeypatch.setattr(type(cause), "cured", True)
    assert Engine(config, methods=[cause, spy]).train()["steps"] == 3


# ---- plugins ---------------------------------------------------------------------------------------------------------

SIGNATURES = {
    "transform_data": "run, splits",
    "transform_batch": "run, batch",
    "build_tokenizer": "run",
    "build_model": "run",
    "build_features": "run, rows",
    "build_sampler": "run, split",
    "transform_model": "run, model",
    "transform_param_groups": "run, groups",
    "wrap_loss": "inner, ctx, batch, view",
    "transform_outputs": "ctx, batch, outputs",
    "wrap_backward": "inner, ctx, work",
    "wrap_gradient": "inner, ctx, works",
    "build_optimizer": "run, groups",
    "build_scheduler": "run, optimizer",
    "wrap_step": "inner, ctx, works",
    "wrap_predict": "inner, ctx, batch, view",
    "wrap_evaluation": "ctx",
    "transform_metrics": "run, metrics",
    "check_stack": "stack",
    "on_run_start": "run",
    "on_step_end": "run, metrics",
    "on_evaluate": "run, metrics",
    "on_save": "run, folder",
    "on_run_end": "run",
}


def plugin(name: str, arguments: str, does: Callable[[], Any], decorated: bool = True) -> Any:
    """A method object with one function of this name and these arguments."""

    def function(*_: Any) -> Any:
        return does()

    names = ["self", *filter(None, arguments.split(", "))]
    parameters = [inspect.Parameter(each, inspect.Parameter.POSITIONAL_OR_KEYWORD) for each in names]
    function.__name__, function.__signature__ = name, inspect.Signature(parameters)  # type: ignore[attr-defined]
    function = hook(function) if decorated else function
    return dataclass(eq=False)(type("Broken", (), {name: function, "__annotations__": {}}))()


def fail() -> None:
    raise KeyError("its own mistake")


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_hook_that_raises_is_blamed_and_keeps_its_type(name: str, bench: Bench, capsys: Any) -> None:
    method = plugin(name, SIGNATURES[name], fail)
    with pytest.raises(KeyError) as caught:
        Engine(bench.config(), methods=[method]).train()
    assert caught.value.__notes__ == [f"raised by plugin 'broken' (test_bad_input_run) in hook {name}"]
    assert report(caught.value) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "'broken'" in err and name in err and "internal" not in err
    assert not list(bench.folder.rglob(".staging*"))


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_hook_that_returns_the_wrong_type_is_told_what_to_return(name: str, bench: Bench) -> None:
    method = plugin(name, SIGNATURES[name], lambda: 3)
    with pytest.raises(
        PluginError, match=rf"plugin 'broken' \(test_bad_input_run\): {name} (must return|only observes)"
    ):
        Engine(bench.config(), methods=[method]).train()


def test_hooks_that_would_never_be_called(bench: Bench) -> None:
    arguments = SIGNATURES["wrap_loss"]
    cases = [
        (
            plugin("wrap_loss", arguments, fail, decorated=False),
            "wrap_loss is a hook but lacks its decorator; add @hook",
        ),
        (plugin("wrap_los", arguments, fail, decorated=False), "looks like a misspelt hook. Did you mean 'wrap_loss'?"),
        (plugin("wrap_los", arguments, fail), "no such hook exists. Did you mean 'wrap_loss'?"),
        (
            plugin("wrap_loss", "inner, ctx, batch", fail),
            "takes (inner, ctx, batch), expected (inner, ctx, batch, view)",
        ),
        (plugin("active", "", fail, decorated=False), "active takes (self, step)"),
        (dataclass(eq=False)(type("Broken", (), {"traits": {"order": 3}}))(), "traits must be Traits(...)"),
    ]
    for method, told in cases:
        bench.refused(lambda method=method: Engine(bench.config(), methods=[method]), told, code=1, roads="validate")


def test_objects_that_are_no_methods(bench: Bench) -> None:
    cases = [
        ([Spy], "pass an instance, not the class Spy; write Spy()"),
        ([object()], "is not a dataclass; decorate its class with @dataclass(eq=False)"),
        ([Spy(), Spy()], "two method objects are named 'spy'"),
    ]
    for methods, told in cases:
        bench.refused(lambda methods=methods: Engine(bench.config(), methods=methods), told, roads="validate")


def distribution(folder: Path, name: str, entry: str, code: str = "") -> None:
    """An installed distribution, as `importlib.metadata` sees it."""
    info = folder / f"{name}-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[hybridengine.plugins]\n{entry}\n")
    (folder / f"{name}_module.py").write_text(code)


def test_distributions_that_clash_or_cannot_be_imported(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    site = bench.folder / "site"
    distribution(site, "acme", "fgm = acme_module:FGM")
    distribution(site, "broken", "shaky = broken_module:Shaky", "import nothing_of_this_name\n")
    distribution(site, "leaving", "exits = leaving_module:Exits", "import sys\nsys.exit(0)\n")
    distribution(site, "odd", "odd = odd_module:thing", "thing = 3\n")
    monkeypatch.syspath_prepend(str(site))
    assert Engine(bench.config()).validate()  # installed is not active
    path = bench.write(bench.text() + "methods:\n  - fgm\n")
    bench.refused(
        lambda: Engine(path), f"{path}:7: method 'fgm' is claimed by", "acme 1.2", "hybridengine", "to choose"
    )
    assert Engine(bench.config(methods=["hybridengine:fgm"])).plan()
    for name, told in {
        "shaky": "plugin 'shaky' of broken 1.2 (broken_module:Shaky) cannot be imported: ModuleNotFoundError",
        "exits": "plugin 'exits' of leaving 1.2 (leaving_module:Exits) cannot be imported: SystemExit",
        "odd": "plugin 'odd' of odd 1.2 (odd_module:thing) must name a class, not 3",
    }.items():
        bench.refused(lambda name=name: Engine(bench.config(methods=[name])), told, code=1, roads="validate")


# ---- stages ----------------------------------------------------------------------------------------------------------


def test_problems_of_a_later_stage_are_told_before_the_first_one_trains(bench: Bench) -> None:
    (bench.folder / "none.jsonl").write_bytes(b"")
    stages = "stages:\n  - train: {max_steps: 1}\n  - data: {train: none.jsonl}\n"
    path = bench.write(bench.text() + stages)
    bench.refused(lambda: Engine(path), "none.jsonl: holds no rows", roads="validate")
    stages = "stages:\n  - train: {max_steps: 1}\n  - methods: [maml]\n"
    path = bench.write(bench.text() + stages)
    bench.refused(lambda: Engine(path), "'maml' needs 'episodes'", roads="validate")


# ---- signals and a full disk -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_with_a_checkpoint_and_the_same_command_goes_on(number: int, code: int, bench: Bench) -> None:
    path = bench.write(bench.text() + "log: {every: 1}\nevaluate: {resamples: 20}\n")
    command = ("train", path, "train.max_steps=300", "train.save_every=300", "train.evaluate_every=300")
    steps = bench.folder / "run" / "metrics.jsonl"

    def send() -> None:
        while not steps.is_file() or not steps.stat().st_size:
            time.sleep(0.005)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    stopped, _, err = call(*command)
    assert stopped == code and "stopped at step" in err
    summary = json.loads((bench.folder / "run" / "summary.json").read_text())
    (checkpoint,) = (bench.folder / "run" / "checkpoints").iterdir()
    assert summary["status"] == "stopped" and 0 < summary["steps"] < 300
    assert checkpoint.name == f"step-{summary['steps']:08d}"
    assert call(*command)[0] == 0
    lines = [json.loads(line) for line in steps.read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 301))


def test_a_full_disk(bench: Bench) -> None:
    """A child process may write no file larger than 60 kB: less than a checkpoint, more than everything before."""
    path = bench.write(bench.text() + "evaluate: {resamples: 20}\n")
    small = (60_000, 60_000)
    done = subprocess.run(
        [sys.executable, "-m", "hybridengine.cli.main", "train", str(path)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, small),
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr  # an `OutputError`
    assert "disk" in done.stderr and "run" in done.stderr and "free" in done.stderr, done.stderr
    assert not [p for p in (bench.folder / "run").rglob(".*") if p.is_dir()]
    assert json.loads((bench.folder / "run" / "summary.json").read_text())["status"] == "failed"
    assert Engine(path).train()["status"] == "finished"
