"""Somebody else's distribution: installed, listed without an import, composed, removed; and the ways it can break."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hybridengine.engine import Engine
from hybridengine.errors import ConfigError, PluginError
from hybridengine.plugin import hook
from hybridengine.seams import Batch, Context, Out, View, Work
from hybridengine.testing import tiny_checkpoint

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ROWS = [{"text": f"{word} movie {i}", "label": word} for i in range(12) for word in ("good", "bad")]


def config_of(methods: list[Any], folder: Path, **train: Any) -> dict[str, Any]:
    model = folder / "model"
    if not model.exists():
        tiny_checkpoint(model)
    options = {"max_steps": 2, "batch_size": 4, "precision": "fp32", "device": "cpu", **train}
    splits = {"train": ROWS[:16], "validation": ROWS[16:]}
    config = {"task": "text-classification", "model": {"name": str(model)}, "data": splits, "train": options}
    return {**config, "methods": methods, "output": str(folder / "run")}


class House:
    """A virtual environment that sees this project's own packages, and into which others are really installed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.canary = folder / "imported"
        venv.create(folder / "venv", with_pip=False)
        self.python = folder / "venv" / "bin" / "python"
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        seen = [
            sysconfig.get_path("purelib"),
            *os.environ.get("PYTHONPATH", "").split(os.pathsep),
            ROOT,
            ROOT / "plugins",
        ]
        lines = "".join(f"{path}\n" for path in seen if str(path))
        (folder / "venv" / "lib" / version / "site-packages" / "project.pth").write_text(lines, encoding="utf-8")

    def pip(self, *arguments: str) -> None:
        quiet = ["--disable-pip-version-check", "--quiet", "--no-input"]
        command = [sys.executable, "-m", "pip", "--python", str(self.python), *arguments, *quiet]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def install(self, name: str) -> None:
        """Install a distribution of this folder from a copy: building leaves files beside the sources."""
        source = shutil.copytree(HERE / name, self.folder / "sources" / name)
        self.pip("install", "--no-deps", "--no-build-isolation", "--no-index", str(source))

    def run(self, code: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "ACME_IMPORTED": str(self.canary), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        return subprocess.run(
            [str(self.python), "-c", code], env=environment, capture_output=True, text=True, check=False
        )

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run(
            f"import sys; sys.argv[1:] = {list(arguments)!r}; from hybridengine.cli.main import main; main()"
        )

    def results(self, folder: Path, *configs: dict[str, Any]) -> list[dict[str, Any]]:
        """Train configs one after the other: effects or the error of each, and whether acme was imported by then."""
        (folder / "configs.json").write_text(json.dumps(configs), encoding="utf-8")
        done = self.run(_TRAIN.format(configs=folder / "configs.json"))
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]


_TRAIN = """
import json, sys
import hybridengine, hybridengine.errors
for config in json.load(open("{configs}")):
    result = {{}}
    try:
        result["effects"] = hybridengine.Engine(config).train()["methods"]
    except hybridengine.errors.HybridEngineError as error:
        result["error"] = str(error)
    print(json.dumps({{**result, "imported": "acme_methods" in sys.modules}}))
"""


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    return House(tmp_path_factory.mktemp("house"))


def listed(house: House) -> dict[str, list[str]]:
    shown = house.cli("plugins", "list", "--json")
    assert shown.returncode == 0, shown.stderr
    found: dict[str, list[str]] = {}
    for entry in json.loads(shown.stdout):
        found.setdefault(entry["name"], []).append(entry["distribution"])
    return found


def test_the_life_of_a_distribution(house: House, tmp_path: Path) -> None:
    assert "gradient-noise" not in listed(house)
    house.install("acme_methods")
    assert listed(house)["gradient-noise"] == ["acme-methods"]
    assert not house.canary.exists(), "listing imported it"

    lora = {"lora": {"r": 2}}
    composed = config_of([lora, {"gradient-noise": {"eta": 0.1}}], tmp_path)
    plain, wrong, broken, named = house.results(
        tmp_path,
        {**config_of([lora], tmp_path), "output": str(tmp_path / "plain")},
        config_of([{"gradient-noise": {"etta": 0.1}}], tmp_path),
        config_of(["acme-absent"], tmp_path),
        composed,
    )
    assert "effects" in plain and not plain["imported"], "a run that does not name it imported it"
    assert "unknown key" in wrong["error"] and "Did you mean 'eta'?" in wrong["error"]
    assert "plugin 'acme-absent' of acme-methods 1.2.0" in broken["error"] and "cannot be imported" in broken["error"]
    assert named["imported"] and house.canary.exists()
    assert named["effects"]["gradient-noise"]["noise_norm"]["mean"] > 0
    plan = json.loads((tmp_path / "run" / "plan.json").read_text(encoding="utf-8"))
    assert "gradient-noise" in plan["layers"]["gradient"]
    (member,) = [m for m in plan["members"] if m["name"] == "gradient-noise"]
    assert (member["distribution"], member["version"]) == ("acme-methods", "1.2.0")

    house.pip("uninstall", "--yes", "acme-methods")
    assert "gradient-noise" not in listed(house)
    (gone,) = house.results(tmp_path, composed)
    assert "unknown method 'gradient-noise'" in gone["error"]


def test_two_distributions_that_claim_one_name_are_told_apart_by_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("acme_methods", "acme_clash"):
        source = shutil.copytree(HERE / name, tmp_path / "sources" / name)
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
        subprocess.run([*command, "--target", str(tmp_path / "installed" / name), str(source)], check=True)
        monkeypatch.syspath_prepend(str(tmp_path / "installed" / name))
    with pytest.raises(ConfigError, match=r"is claimed by .*; write '.*:gradient-noise' to choose") as caught:
        Engine(config_of(["gradient-noise"], tmp_path))
    assert "acme-methods 1.2.0" in str(caught.value) and "acme-clash 0.3.0" in str(caught.value)
    for chosen, parameter in (("acme-methods", "eta"), ("acme-clash", "level")):
        plan = Engine(config_of([{f"{chosen}:gradient-noise": {}}], tmp_path)).plan()
        (member,) = [m for m in plan.members if m["distribution"] == chosen]
        assert parameter in member["parameters"]


# ---- plugins that break the contract ---------------------------------------------------------------------------------

Inner = Callable[..., Any]


@dataclass(eq=False)
class Misspelt:
    @hook
    def wrap_lose(self, inner: Inner, ctx: Context, batch: Batch, view: View) -> Out:
        raise NotImplementedError


@dataclass(eq=False)
class Undecorated:
    def wrap_loss(self, inner: Inner, ctx: Context, batch: Batch, view: View) -> Out:
        raise NotImplementedError


@dataclass(eq=False)
class Nearly:
    def wrap_los(self, inner: Inner, ctx: Context, batch: Batch, view: View) -> Out:
        raise NotImplementedError


@dataclass(eq=False)
class WrongSignature:
    @hook
    def wrap_loss(self, ctx: Context, batch: Batch, view: View) -> Out:
        raise NotImplementedError


@dataclass(eq=False)
class WrongReturn:
    @hook
    def wrap_backward(self, inner: Inner, ctx: Context, work: Work) -> Any:
        inner(ctx, work)
        return 0.5


@dataclass(eq=False)
class Nothing:
    @hook
    def wrap_loss(self, inner: Inner, ctx: Context, batch: Batch, view: View) -> Any:
        inner(ctx, batch, view)


@dataclass(eq=False)
class Talkative:
    @hook
    def on_step_end(self, run: Any, metrics: Mapping[str, float]) -> Any:
        return metrics


@pytest.mark.parametrize(
    ("plugin", "told"),
    [
        (Misspelt(), ["'misspelt'", "'wrap_lose'", "no such hook", "Did you mean 'wrap_loss'?"]),
        (Undecorated(), ["'undecorated'", "wrap_loss", "lacks its decorator; add @hook"]),
        (Nearly(), ["'nearly'", "'wrap_los'", "misspelt hook", "Did you mean 'wrap_loss'?"]),
        (WrongSignature(), ["'wrong-signature'", "(ctx, batch, view), expected (inner, ctx, batch, view)"]),
        (WrongReturn(), ["'wrong-return'", "wrap_backward must return Mapping, got float"]),
        (Nothing(), ["'nothing'", "wrap_loss must return Out, got NoneType"]),
        (Talkative(), ["'talkative'", "on_step_end only observes and must return None"]),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, list) else "",
)
def test_a_broken_contract_is_one_clear_error(plugin: object, told: Sequence[str], tmp_path: Path) -> None:
    with pytest.raises(PluginError) as caught:
        Engine(config_of([], tmp_path), methods=[plugin]).train()
    for part in told:
        assert part in str(caught.value)


class OddError(Exception):
    """An error type of the plugin's own."""


@dataclass(eq=False)
class Raising:
    where: str = "wrap_loss"

    @hook
    def wrap_loss(self, inner: Inner, ctx: Context, batch: Batch, view: View) -> Out:
        if self.where == "wrap_loss":
            raise OddError("odd")
        return inner(ctx, batch, view)  # type: ignore[no-any-return]

    @hook
    def on_evaluate(self, run: Any, metrics: Mapping[str, Any]) -> None:
        if self.where == "on_evaluate":
            raise OddError("odd")


@pytest.mark.parametrize("where", ["wrap_loss", "on_evaluate"])
def test_a_raising_hook_keeps_its_type_and_is_named_once(where: str, tmp_path: Path) -> None:
    with pytest.raises(OddError, match="odd") as caught:
        Engine(config_of(["sam", "fgm", "ema"], tmp_path), methods=[Raising(where)]).train()
    notes = [note for note in caught.value.__notes__ if "raised by plugin" in note]
    assert len(notes) == 1, "the layers outside it are not to blame"
    assert "'raising'" in notes[0] and f"in hook {where}" in notes[0]
