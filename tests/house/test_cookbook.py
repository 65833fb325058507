"""Every example of the cookbook runs: it is installed as a distribution, named in a config, and its hook is called."""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import re
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest

from hybridengine import Engine, load
from hybridengine.errors import StackError, Stopped
from hybridengine.plugin.calling import SPEC_NAMES
from hybridengine.testing import tiny_checkpoint

COOKBOOK = (Path(__file__).parents[2] / "plugins" / "README.md").read_text(encoding="utf-8")
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SECTION = re.compile(r"^### `(\w+)\(.*?\)`\n(.*?)(?=^##|\Z)", re.DOTALL | re.MULTILINE)
EXAMPLES = {name: PYTHON.findall(text) for name, text in SECTION.findall(COOKBOOK)}
FIRST = COOKBOOK[: COOKBOOK.index("## Every hook")]
LAST = COOKBOOK[COOKBOOK.index("## Testing a method") :]
IMPORTS, SMALLEST = PYTHON.findall(FIRST)
RESUMED = ("on_load",)

_numbers = itertools.count()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("cookbook") / "model", hidden_dropout_prob=0.1)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], tuple[str, type]]]:
    """Write code as the only module of a distribution on the path; give the name and class of the plugin in it."""
    modules: list[str] = []

    def made(code: str, hook_name: str) -> tuple[str, type]:
        module = f"cookbook_{next(_numbers)}"
        site = tmp_path / "site"
        (site / f"{module}-1.0.dist-info").mkdir(parents=True)
        (site / f"{module}.py").write_text(f"{IMPORTS}\n\n{code}", encoding="utf-8")
        monkeypatch.syspath_prepend(str(site))
        modules.append(module)
        cls = plugin_of(importlib.import_module(module), hook_name)
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", cls.__name__).lower()
        about = site / f"{module}-1.0.dist-info"
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n", encoding="utf-8")
        (about / "entry_points.txt").write_text(
            f"[hybridengine.plugins]\n{name} = {module}:{cls.__name__}\n", encoding="utf-8"
        )
        return name, cls

    yield made
    for module in modules:
        sys.modules.pop(module, None)


def plugin_of(module: types.ModuleType, hook_name: str) -> type:
    own = [value for value in vars(module).values() if getattr(value, "__module__", "") == module.__name__]
    (cls,) = [value for value in own if is_dataclass(value) and hasattr(value, hook_name)]
    assert isinstance(cls, type)
    return cls


def count_calls(cls: type, hook_name: str, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Every call of the hook on a run (not on the plan's dry one) is noted in the returned list."""
    function, calls = getattr(cls, hook_name), []

    @functools.wraps(function)
    def counted(self: Any, *args: Any) -> Any:
        runs = [getattr(argument, "run", argument) for argument in args]
        calls.append(any(getattr(run, "dry", False) for run in runs))
        return function(self, *args)

    # A wrapper must be introspectable as the function it stands for.
    counted.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    monkeypatch.setattr(cls, hook_name, counted)
    return calls


def config_for(name: str, cls: Any, checkpoint: Path, output: Path) -> dict[str, Any]:
    texts = [f"a {word} {thing}" for thing in ("movie", "book", "phone", "actor") for word in ("good", "bad", "great")]
    rows = [{"text": t, "label": "neg" if "bad" in t else "pos", "stars": 1 if "bad" in t else 5} for t in texts]
    config: dict[str, Any] = {
        "task": "text-classification",
        "model": {"name": str(checkpoint)},
        "data": {"train": rows, "validation": rows[:6], "carve": {}},
        "train": {"max_steps": 6, "batch_size": 4, "lr": 1e-3, "save_every": 2, "evaluate_every": 3, "device": "cpu"},
        "evaluate": {"resamples": 20},
        "output": str(output),
    }
    if cls.traits.kind == "task":
        config["task"] = name
    elif cls.traits.kind == "data":
        config["data"] = {"use": name, "carve": {"validation": 0.3}}
    else:
        config["methods"] = [name]
    return config


def test_every_hook_has_an_example() -> None:
    assert list(EXAMPLES) == list(SPEC_NAMES)
    assert all(len(blocks) == 1 for blocks in EXAMPLES.values())


@pytest.mark.parametrize("hook_name", SPEC_NAMES)
def test_example(
    hook_name: str, checkpoint: Path, tmp_path: Path, install: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name, cls = install(EXAMPLES[hook_name][0], hook_name)
    assert cls.__doc__ and is_dataclass(cls) and cls.__eq__ is object.__eq__
    calls = count_calls(cls, hook_name, monkeypatch)
    config = config_for(name, cls, checkpoint, tmp_path / "run")
    if hook_name in RESUMED:
        with pytest.raises(Stopped):
            Engine(config, cancel=lambda: True).train()
        assert not calls
    summary = Engine(config).train()
    assert summary["status"] == "finished" and summary["steps"] == 6
    assert False in calls, f"{hook_name} was never called on the real run"
    effect = cls.traits.effect  # type: ignore[attr-defined]
    assert effect is None or summary["methods"][name][effect]["mean"] != 0
    assert len(load(tmp_path / "run").predict(["a good film", "a bad book"])) == 2


def test_check_stack_example_refuses_what_it_says(checkpoint: Path, tmp_path: Path, install: Any) -> None:
    name, cls = install(EXAMPLES["check_stack"][0], "check_stack")
    config = config_for(name, cls, checkpoint, tmp_path / "run")
    config["train"]["max_steps"] = 2
    with pytest.raises(StackError, match="its 2 steps fill all 2 of the run"):
        Engine(config).validate()


def test_the_smallest_method(checkpoint: Path, tmp_path: Path, install: Any) -> None:
    name, cls = install(SMALLEST, "wrap_loss")
    summary = Engine(config_for(name, cls, checkpoint, tmp_path / "run")).train()
    assert summary["methods"]["confidence-penalty"]["entropy"]["mean"] > 0


def _author_tests() -> dict[str, Any]:
    module = types.ModuleType("cookbook_tests")
    sys.modules[module.__name__] = module  # dataclasses look their annotations up here
    for block in (IMPORTS, EXAMPLES["wrap_backward"][0], *PYTHON.findall(LAST)):
        exec(compile(block, "plugins/README.md", "exec"), vars(module))
    return {name: value for name, value in vars(module).items() if name.startswith("test_")}


AUTHOR_TESTS = _author_tests()


@pytest.mark.parametrize("name", AUTHOR_TESTS)
def test_tests_for_authors(name: str, tmp_path: Path) -> None:
    function = AUTHOR_TESTS[name]
    function(*[tmp_path] if inspect.signature(function).parameters else [])
