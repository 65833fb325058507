"""The Triton kernel of the divergence: its results in the interpreter, and what it compiles to without a GPU.

Both run in processes of their own: Triton settles at import whether it interprets.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from kl_pair_cases import INTERPRETED

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs the interpreter itself")

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


def test_triton_in_the_interpreter() -> None:
    """The tests of this folder's two files that ask for an implementation, by Triton."""
    files = [str(Path(__file__).with_name(f"test_kernels_kl_pair{part}.py")) for part in ("", "_derivatives")]
    chosen = "triton and not 1.0 and not 2500"  # the interpreter is slow: one temperature, no third block
    told = run(["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *files], TRITON_INTERPRET="1")
    assert " passed" in told and "failed" not in told


COMPILE = """
import itertools, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hybridengine.kernels.kl_pair.triton_kernel import launch_options
from hybridengine.kernels.kl_pair.triton_rows import kl_rows
both = (True, False)
for architecture, dtype, masked, symmetric in itertools.product((80, 90), ("bf16", "fp32"), both, both):
    options = launch_options(32000)
    warps = options.pop("num_warps")
    constants = {"CLASSES": 32000, "SYMMETRIC": symmetric, "WANT_A": True, "WANT_B": not masked, "HAS_MASK": masked}
    types = dict.fromkeys(("a_logits", "b_logits", "by_a", "by_b"), f"*{dtype}") | {
        "mask": "*i1", "scale": "*fp32", "losses": "*fp32", "a_stride": "i64", "b_stride": "i64", "inverse": "fp32"}
    names = kl_rows.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    # What the launch sees: pointers and strides that are multiples of 16.
    aligned = [(names.index(n),) for n in ("a_logits", "b_logits", "by_a", "by_b", "a_stride", "b_stride")]
    source = ASTSource(fn=kl_rows, signature=signature, constexprs=constants | options,
                       attrs={place: [["tt.divisibility", 16]] for place in aligned})
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps})
    ptx = made.asm["ptx"]
    assert f".target sm_{architecture}" in ptx and made.asm["cubin"][:4] == b"\\x7fELF"
    assert ".local" not in ptx, "registers are spilled to memory"
    assert "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx, "rows are not read and written 16 bytes at a time"
print("compiled")
"""


def test_triton_compiles_for_every_architecture_without_a_gpu() -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert run(["-c", COMPILE], TRITON_CACHE_DIR=folder) == "compiled\n"
