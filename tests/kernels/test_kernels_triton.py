"""The Triton kernels: their results in the interpreter, and what they compile to without a GPU.

Both run in processes of their own: Triton settles at import whether it interprets.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


def run(command: list[str], **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    path = os.pathsep.join([str(ROOT), str(ROOT / "plugins"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        cwd=ROOT,
        env=kept | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_agree_with_float64_in_the_interpreter(every: int) -> None:
    """The same cases as the CUDA kernels', all or every fifth."""
    script = str(ROOT / "tests" / "kernels" / "cross_entropy_edges.py")
    assert run([script, str(every)], TRITON_INTERPRET="1") == "all pass\n"


@pytest.mark.parametrize("examples", [pytest.param(100, marks=[pytest.mark.long, pytest.mark.slow]), 20])
def test_the_losses_from_end_to_end_in_the_interpreter(examples: int) -> None:
    script = str(ROOT / "tests" / "kernels" / "interpreted_losses.py")
    assert run([script, str(examples)], TRITON_INTERPRET="1") == "all pass\n"


COMPILE = """
import os, re, sys, tempfile
sys.path.insert(0, "benchmarks")
os.environ |= {"TRITON_CACHE_DIR": tempfile.mkdtemp(), "TRITON_DUMP_PTXAS_LOG": "1"}
from aot_figures import TRITON_KERNELS, compile_triton
for kernel in TRITON_KERNELS:
    variant = next(iter(kernel.variants))
    for architecture in (80, 90, 100):
        figures, made = compile_triton(kernel, variant, "bf16", architecture)
        assert figures.spill_bytes == 0, figures
        assert f".target sm_{architecture}" in made["ptx"] and made["cubin"][:4] == b"\\x7fELF"
        if "perturb" in kernel.path or "totals" in kernel.path:
            continue  # it reads only what its mask keeps; it reads labels, and writes a few numbers
        # Rows of 16-byte multiples are read and written 16 bytes at a time.
        assert "ld.global.v4.b32" in made["ptx"], kernel.path
        assert "st.global.v4.b32" in made["ptx"] or kernel.path.endswith(":_sum_rows"), kernel.path
print("compiled")
"""


def test_compile_for_every_architecture_without_a_gpu() -> None:
    assert run(["-c", COMPILE]) == "compiled\n"


@pytest.mark.slow
def test_nothing_spills() -> None:
    """Every kernel, Triton's and (where nvcc is) CUDA's, for every architecture."""
    told = run(["benchmarks/aot_figures.py", "--only", "sm_"])
    assert told.strip().endswith(" 0 spill"), told
