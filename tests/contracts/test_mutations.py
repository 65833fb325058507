"""The mutation gate: each planted mistake must make its named test fail, or that test proves nothing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parents[2]
SOURCES = ("hybridengine", "plugins")


def copy_sources(folder: Path) -> Path:
    for name in SOURCES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def run_tests(copy: Path, *nodes: str) -> subprocess.CompletedProcess[str]:
    """Run test nodes of this repository against the sources in `copy`."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(copy), str(copy / "plugins")]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-x"]
    paths = [str(ROOT / node) for node in nodes]
    return subprocess.run(
        [*command, f"--rootdir={ROOT}", "-c", str(ROOT / "pyproject.toml"), *paths],
        cwd=copy, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_the_mistake_can_still_be_planted(mutation: Mutation) -> None:
    """The text it replaces stands exactly once, so the gate cannot rot silently."""
    assert (ROOT / mutation.file).read_text(encoding="utf-8").count(mutation.old) == 1
    assert mutation.old != mutation.new


@pytest.mark.parametrize(
    "mutation",
    [pytest.param(m, id=m.name, marks=() if m.fast else pytest.mark.slow) for m in MUTATIONS],
)
def test_the_mistake_is_caught(mutation: Mutation, tmp_path: Path) -> None:
    target = copy_sources(tmp_path) / mutation.file
    target.write_text(target.read_text(encoding="utf-8").replace(mutation.old, mutation.new), encoding="utf-8")
    result = run_tests(tmp_path, mutation.node)
    assert result.returncode == 1, result.stdout + result.stderr  # 1: tests ran and failed; not 2 to 5
    assert re.search(r"\b1 failed\b", result.stdout), result.stdout
    assert "error" not in result.stdout.splitlines()[-1], result.stdout


@pytest.mark.slow
def test_without_a_mistake_the_same_tests_pass(tmp_path: Path) -> None:
    """The control: a failure above is due to the mistake, not to the copy."""
    result = run_tests(copy_sources(tmp_path), *dict.fromkeys(m.node for m in MUTATIONS))
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
def test_the_copy_is_what_is_tested(tmp_path: Path) -> None:
    copy = copy_sources(tmp_path)
    probe = tmp_path / "test_probe.py"
    probe.write_text(
        "import hybridengine.seams, hybridengine_plugins.adversarial.fgm as fgm\n"
        "def test_paths():\n"
        f"    assert hybridengine.seams.__file__.startswith({str(copy)!r})\n"
        f"    assert fgm.__file__.startswith({str(copy)!r})\n"
    )
    result = run_tests(copy, str(probe))
    assert result.returncode == 0, result.stdout + result.stderr
