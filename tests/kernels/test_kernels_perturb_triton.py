"""The perturbation step in Triton: interpreted on the CPU against the exact step, and compiled without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from hybridengine import kernels
from hybridengine.kernels import triton_runtime

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
SCRIPT = Path(__file__).with_name("perturb_triton.py")


def run_script(folder: Path, *arguments: str, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env={**kept, "TRITON_CACHE_DIR": str(folder), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]


@needs_triton
def test_interpreted_it_is_the_exact_step(tmp_path: Path) -> None:
    # Few: the interpreter takes some 100 ms a step.
    assert int(run_script(tmp_path, "interpret", "40", TRITON_INTERPRET="1")) >= 40


@needs_triton
@pytest.mark.long
@pytest.mark.slow
def test_interpreted_it_is_the_exact_step_often(tmp_path: Path) -> None:
    assert int(run_script(tmp_path, "interpret", "1000", TRITON_INTERPRET="1")) >= 1000


@needs_triton
def test_it_compiles_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    assert int(run_script(tmp_path, "compile", "80", "90")) == 28


def test_where_it_cannot_run_it_says_why() -> None:
    rows = {row.impl: row for row in kernels.explain() if row.op == "perturb"}
    assert list(rows) == ["triton", "cpu", "reference"]
    if not torch.cuda.is_available() and not triton_runtime.INTERPRETED:
        assert rows["triton"].reason in ("there is no GPU", "triton is not installed")
        assert not rows["triton"].chosen


def test_its_kernels_are_not_loaded_unasked() -> None:
    code = "import sys, hybridengine.kernels; print(*(name for name in sys.modules if 'triton_kernel' in name))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
