"""The CUDA library: found or missing with a reason, and what the built one shows to others."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hybridengine.errors import KernelUnavailable
from hybridengine.kernels import cuda_library, dispatch
from hybridengine.kernels.dispatch import Implementation, Operation

BUILT = Path(cuda_library.__file__).with_name("_cuda.so")
built_only = pytest.mark.skipif(not BUILT.exists(), reason="the CUDA library is not built here")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installation's folder, empty."""
    monkeypatch.setattr(cuda_library, "_FOLDER", tmp_path)
    for cached in (cuda_library._load, cuda_library._why_missing):
        cached.cache_clear()
    yield tmp_path
    for cached in (cuda_library._load, cuda_library._why_missing):
        cached.cache_clear()


def test_the_reason_of_the_build_is_told(folder: Path) -> None:
    (folder / "_cuda_missing.txt").write_text("nvcc was not found at install time\n")
    assert cuda_library.why_missing() == "the CUDA library is not built: nvcc was not found at install time"
    with pytest.raises(KernelUnavailable, match="nvcc was not found"):
        cuda_library.library()


def test_the_reason_stands_in_the_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "_cuda_missing.txt").write_text("nvcc was not found at install time\n")
    monkeypatch.setattr(dispatch, "_operations", {})
    Operation("probe", Implementation("cuda", print, cuda_library.why_missing), Implementation("reference", print))
    row = dispatch.explain()[0]
    assert row.impl == "cuda" and not row.available and "nvcc was not found" in row.reason


def test_an_installation_from_elsewhere(folder: Path) -> None:
    assert cuda_library.why_missing() == "the CUDA library is not built: this installation was made without it"


def test_a_broken_library_is_a_reason(folder: Path) -> None:
    (folder / "_cuda.so").write_bytes(b"no library")
    assert re.match("the CUDA library cannot be loaded: .*_cuda.so", cuda_library.why_missing() or "")


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_a_library_of_another_version_is_a_reason(folder: Path) -> None:
    subprocess.run(["g++", "-shared", "-x", "c++", "/dev/null", "-o", str(folder / "_cuda.so")], check=True)
    assert "undefined symbol: hybridengine_cross_entropy_forward" in (cuda_library.why_missing() or "")


@built_only
def test_why_it_cannot_run_here() -> None:
    if torch.cuda.is_available():
        assert cuda_library.why_missing() is None
    else:
        assert cuda_library.why_missing() == "there is no GPU"
        # Without a driver the library loads nevertheless, and says so in CUDA's words.
        assert re.search(r"\(CUDA error \d+\)", cuda_library.library().probe() or "")


@built_only
@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not installed")
def test_the_library_shows_nothing_but_its_functions() -> None:
    """The CUDA runtime inside could otherwise be mixed up with the one that torch brings."""
    listing = subprocess.run(["nm", "-D", "--defined-only", str(BUILT)], capture_output=True, text=True, check=True)
    names = [line.split()[-1] for line in listing.stdout.splitlines()]
    assert names and all(name.startswith("hybridengine_") for name in names)
    needed = subprocess.run(["readelf", "-d", str(BUILT)], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"NEEDED.*(cuda|torch|python)", needed)
