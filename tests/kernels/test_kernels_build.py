"""The build of the libraries: what is missing or failing becomes a reason, never a failed install."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="the sources are not here"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++"),
]


def build(folder: Path, root: Path = ROOT, more: str = "", **environment: str) -> Path:
    """Run build_ext into `folder`, without the CPU kernels unless told; return where the libraries lie."""
    path = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if not (Path(p) / "nvcc").exists())
    given = {"HYBRIDENGINE_NATIVE": "0", "CUDA_HOME": str(folder), "PATH": path} | environment
    kept = {k: v for k, v in os.environ.items() if k not in ("NVCC", "HYBRIDENGINE_CUDA", "HYBRIDENGINE_NATIVE")}
    command = [sys.executable, "setup.py", "build_ext", "-b", str(folder / "lib"), "-t", str(folder / "temp")]
    subprocess.run([*command, *more.split()], cwd=root, env=kept | given, capture_output=True, text=True, check=True)
    return folder / "lib" / "hybridengine" / "kernels"


def fake_nvcc(folder: Path, compiling: str) -> Path:
    """An nvcc that knows its architectures, and does `compiling` when it is to compile."""
    nvcc = folder / "nvcc"
    nvcc.write_text(f'#!/bin/sh\n[ "$1" = --list-gpu-arch ] && echo compute_80 compute_90 && exit 0\n{compiling}\n')
    nvcc.chmod(0o755)
    return nvcc


WRITES_ITS_OUTPUT = 'while [ "$1" != -o ]; do shift; done; : > "$2"; : > "$2.d"'


def test_no_nvcc(tmp_path: Path) -> None:
    libraries = build(tmp_path)
    assert (libraries / "_cuda_missing.txt").read_text() == "nvcc was not found at install time\n"
    assert (libraries / "_native_missing.txt").read_text().startswith("left out on purpose")
    assert not list(libraries.glob("*.so"))


def test_nvcc_demanded(tmp_path: Path) -> None:
    reason = (build(tmp_path, HYBRIDENGINE_CUDA="1") / "_cuda_missing.txt").read_text()
    assert reason == "nvcc was not found at install time, as HYBRIDENGINE_CUDA=1 demands\n"


def test_left_out_on_purpose(tmp_path: Path) -> None:
    nvcc = fake_nvcc(tmp_path, "exit 1")
    reason = (build(tmp_path, HYBRIDENGINE_CUDA="0", NVCC=str(nvcc)) / "_cuda_missing.txt").read_text()
    assert "HYBRIDENGINE_CUDA=0" in reason


def test_nvcc_that_fails_and_then_does_not(tmp_path: Path) -> None:
    nvcc = fake_nvcc(tmp_path, "echo 'cuda.cu(1): error: it is Monday' >&2; exit 2")
    libraries = build(tmp_path, NVCC=str(nvcc))
    reason = (libraries / "_cuda_missing.txt").read_text()
    assert reason == "the compiler failed: cuda.cu(1): error: it is Monday\n"
    assert not (libraries / "_cuda.so").exists()

    fake_nvcc(tmp_path, WRITES_ITS_OUTPUT)
    libraries = build(tmp_path, NVCC=str(nvcc))
    assert (libraries / "_cuda.so").exists() and not (libraries / "_cuda_missing.txt").exists()

    fake_nvcc(tmp_path, "exit 2")
    libraries = build(tmp_path, NVCC=str(nvcc))
    assert (libraries / "_cuda.so").exists(), "ninja builds nothing that is up to date"


def test_an_editable_checkout_keeps_no_stale_library(tmp_path: Path) -> None:
    root = tmp_path / "checkout"
    shutil.copytree(ROOT / "csrc", root / "csrc")
    shutil.copy(ROOT / "setup.py", root)
    kernels = root / "hybridengine" / "kernels"
    kernels.mkdir(parents=True)
    nvcc = str(fake_nvcc(tmp_path, WRITES_ITS_OUTPUT))
    build(tmp_path, root, "--inplace", NVCC=nvcc)
    assert (kernels / "_cuda.so").exists() and not (kernels / "_cuda_missing.txt").exists()
    build(tmp_path, root, "--inplace", NVCC=nvcc, HYBRIDENGINE_CUDA="0")
    assert not (kernels / "_cuda.so").exists() and (kernels / "_cuda_missing.txt").exists()


@pytest.mark.slow
def test_a_failing_nvcc_leaves_the_cpu_kernels_alone(tmp_path: Path) -> None:
    nvcc = fake_nvcc(tmp_path, "exit 2")
    libraries = build(tmp_path, NVCC=str(nvcc), HYBRIDENGINE_NATIVE="1")
    assert list(libraries.glob("_native*.so")) and not (libraries / "_native_missing.txt").exists()
    assert "the compiler failed" in (libraries / "_cuda_missing.txt").read_text()
