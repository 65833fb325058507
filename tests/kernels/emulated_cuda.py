"""Builds the CUDA kernels for the CPU (`emulation/`) and puts them in the place of the CUDA library."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch

from hybridengine.kernels.cuda_library import CudaLibrary

ROOT = Path(__file__).parents[2]
SOURCES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*/cuda.cu"))

# Contraction is on, as with nvcc: what must not be contracted has to say so.
COMMAND = [
    *("g++", "-std=c++17", "-O1", "-march=native", "-ffp-contract=fast", "-fPIC", "-shared", "-fvisibility=hidden"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-DHE_EMULATION"),
]


def build(output: Path, root: Path = ROOT, sources: Iterable[str] = SOURCES) -> Path:
    """Compile `sources` below `root` into `output` with the host's compiler."""
    emulation = Path(__file__).parent / "emulation"
    command = [*COMMAND, f"-I{emulation}", f"-I{root / 'csrc'}", "-x", "c++"]
    command += [str(root / source) for source in sources] + ["-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return output


def build_mutant(folder: Path, file: str, old: str, new: str) -> Path:
    """Compile a copy of the sources with `old` in csrc/`file` replaced by `new`."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    path = folder / "csrc" / file
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {file}"
    path.write_text(text.replace(old, new), encoding="utf-8")
    return build(folder / "mutant.so", folder)


class Emulation(CudaLibrary):
    """The library on CPU tensors."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._set_order = ctypes.CDLL(str(path)).emulation_set_order

    def launch(self, function: str, problem: ctypes.Structure, device: torch.device) -> None:
        assert device.type == "cpu"
        self._call(function, problem, 0)

    def set_order(self, order: int) -> None:
        """Let threads run by number (0), backwards (1) or in an order of this seed."""
        self._set_order(order)
