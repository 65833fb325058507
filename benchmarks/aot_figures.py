"""What the GPU kernels compile to, on a machine without a GPU: registers, spills and shared memory.

    python benchmarks/aot_figures.py                    # every kernel for every architecture; writes results/aot.json
    python benchmarks/aot_figures.py --only sm_90 bf16  # those whose line holds all the words; writes nothing

Triton kernels are those of `TRITON_KERNELS`, one entry each. CUDA kernels need no entry: the library is built as an
installation builds it, with ptxas asked to tell what it used. Without nvcc they are left out, and said to be.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("results") / "aot.json"
ARCHITECTURES = (80, 90, 100)
ELEMENTS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class TritonKernel:
    """A kernel and the ways it is compiled.

    Args:
        path: module:function.
        types: of the arguments that are no constants, in order; `*E` is replaced by each of `ELEMENTS`.
        variants: constants by the name of the variant; a pointer that is not given is a constant None.
        options: num_warps and the like.
    """

    path: str
    types: str
    variants: dict[str, dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)


_CE = {"BLOCK": 8192}
_CE_LABELS = _CE | {"TARGET": 0, "WEIGHTED": False, "CAPPED": False, "Z": False, "weight": None}
_CE_SMOOTHED = {"BLOCK": 2048, "TARGET": 1, "WEIGHTED": True, "CAPPED": True, "Z": True}
_CE_SOFT = _CE_SMOOTHED | {"TARGET": 2}
_CE_OPTIONS = {"num_warps": 32, "enable_fp_fusion": False}
_CE_DENSE_OPTIONS = _CE_OPTIONS | {"num_warps": 8}
_CE_FORWARD = "*E i32 *T i32 *fp32 *fp32 i32 *fp32 *fp32 *E i32 *i64 i32 i32 fp32 fp32 fp32 fp32 fp32 fp32 fp32"
_CE_BACKWARD = "*E i32 *T i32 *fp32 *fp32 i32 *fp32 *fp32 i32 *fp32 *E i32 i32 i32 fp32 fp32 fp32 fp32 fp32 fp32 fp32"
_BLOCK = {"TARGET": 0, "WEIGHTED": False, "CAPPED": False, "BLOCK": 1024, "weight": None}

_KL = {"CLASSES": 32000, "SYMMETRIC": True, "WANT_A": True, "WANT_B": True, "HAS_MASK": False, "BLOCK": 2048}
_STEP = {"WIDTH": 768, "BLOCK": 4096}

TRITON_KERNELS = (
    TritonKernel(
        "hybridengine.kernels.cross_entropy.triton_rows:forward_rows",
        _CE_FORWARD,
        {
            "labels": _CE_LABELS | {"GRADIENT": True, "FLAGGED": True},
            "labels, loss only": _CE_LABELS | {"GRADIENT": False, "FLAGGED": True, "gradient": None},
        },
        _CE_OPTIONS,
    ),
    TritonKernel(
        "hybridengine.kernels.cross_entropy.triton_rows:forward_rows",
        _CE_FORWARD,
        {
            "smoothed, everything on": _CE_SMOOTHED | {"GRADIENT": True, "FLAGGED": True},
            "soft, everything on": _CE_SOFT | {"GRADIENT": True, "FLAGGED": False, "flag": None},
        },
        _CE_DENSE_OPTIONS,
    ),
    TritonKernel(
        "hybridengine.kernels.cross_entropy.triton_rows:backward_rows",
        _CE_BACKWARD,
        {
            "labels": _CE_LABELS | {"LSE_GRADIENT": False, "grad_lse": None},
        },
        _CE_OPTIONS,
    ),
    TritonKernel(
        "hybridengine.kernels.cross_entropy.triton_rows:backward_rows",
        _CE_BACKWARD,
        {
            "smoothed, everything on": _CE_SMOOTHED | {"LSE_GRADIENT": True},
            "soft, everything on": _CE_SOFT | {"LSE_GRADIENT": True},
        },
        _CE_DENSE_OPTIONS,
    ),
    TritonKernel(
        "hybridengine.kernels.cross_entropy.triton_totals:_totals",
        "*i64 i32 *fp32 i32 i32 i32 *fp32 *fp64",
        {"weighted mean": {"WEIGHTED": True, "MEAN": True, "EMPTY_IS_ZERO": 0, "BLOCK": 2048}},
        {"num_warps": 8},
    ),
    TritonKernel(
        "hybridengine.kernels.linear_cross_entropy.triton_blocks:_sum_rows",
        "*fp32 i32 *T i32 *fp32 *fp32 *fp32 i32 i32 i32 fp32 fp32 fp32 fp32 fp32",
        {"labels": _BLOCK},
        {"num_warps": 4, "enable_fp_fusion": False},
    ),
    TritonKernel(
        "hybridengine.kernels.linear_cross_entropy.triton_blocks:_write_rows",
        "*fp32 i32 *T i32 *fp32 *E i32 *fp32 *fp32 *fp32 *fp32 i32 i32 fp32 fp32 fp32 fp32 fp32",
        {"labels": _BLOCK},
        {"num_warps": 4, "enable_fp_fusion": False},
    ),
    TritonKernel(
        "hybridengine.kernels.triton_scaling:_scale",
        "*E *fp32 i32 i32 i32 i32",
        {"one factor": {"BLOCK": 4096}},
        {"num_warps": 8},
    ),
    TritonKernel(
        "hybridengine.kernels.kl_pair.triton_rows:kl_rows",
        "*E *E *i1 *fp32 *fp32 *E *E i64 i64 fp32",
        {"both gradients": _KL, "one gradient, masked": _KL | {"WANT_B": False, "HAS_MASK": True}},
        {"num_warps": 8},
    ),
    TritonKernel(
        "hybridengine.kernels.perturb.triton_kernel:_whole",
        "*E *E *u8 *E i32 fp32 fp32",
        {"projected": _STEP | {"LINF": False, "PROJECT": True}},
        {"num_warps": 8},
    ),
    TritonKernel(
        "hybridengine.kernels.perturb.triton_kernel:_looped",
        "*E *E *u8 *E i32 fp32 fp32",
        {"projected": _STEP | {"LINF": False, "PROJECT": True}},
        {"num_warps": 16},
    ),
    TritonKernel(
        "hybridengine.kernels.perturb.triton_kernel:_measure_gradient",
        "*E *E *u8 *fp32 i32 i32 i32 i32",
        {"a chunk": _STEP},
        {"num_warps": 8},
    ),
    TritonKernel(
        "hybridengine.kernels.perturb.triton_kernel:_write",
        "*E *E *u8 *E *fp32 *fp32 i32 i32 i32 fp32 fp32",
        {"projected": _STEP | {"LINF": False, "PROJECT": True, "PARTS": 32}},
        {"num_warps": 8},
    ),
)


@dataclass(frozen=True)
class Figures:
    """One kernel compiled for one architecture."""

    implementation: str
    kernel: str
    variant: str
    architecture: str
    registers: int
    spill_bytes: int
    shared_bytes: int


def parse_usage(log: str) -> tuple[int, int, int]:
    """Return registers, bytes spilled and static shared memory from the words of ptxas about one kernel."""

    def number(pattern: str) -> int:
        return sum(map(int, re.findall(pattern, log)))

    used = re.search(r"Used (\d+) registers", log)
    assert used is not None, f"ptxas says nothing of registers:\n{log}"
    return int(used[1]), number(r"(\d+) bytes spill (?:stores|loads)"), number(r"(\d+) bytes smem")


def compile_triton(
    kernel: TritonKernel, variant: str, element: str, architecture: int
) -> tuple[Figures, dict[str, Any]]:
    """Compile one variant; return its figures and what the compiler made (`ptx`, `cubin`, ...)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = kernel.path.partition(":")
    function = getattr(importlib.import_module(module), name)
    constants = kernel.variants[variant]
    soft = "*fp32" if constants.get("TARGET") == 2 else "*i64"
    types = iter(kernel.types.replace("*E", f"*{element}").replace("*T", soft).split())
    signature = {argument: next(types, "constexpr") for argument in function.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    divisible = [
        index
        for index, (argument, kind) in enumerate(signature.items())
        if kind.startswith("*") or argument.endswith("stride") or argument in ("classes", "width", "count")
    ]
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs=constants,
        attrs={(index,): [["tt.divisibility", 16]] for index in divisible},
    )
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=kernel.options)
    registers, spilled, static = parse_usage(told.getvalue())
    label = f"{element} {variant}"
    shared = static + compiled.metadata.shared
    return Figures("triton", name, label, f"sm_{architecture}", registers, spilled, shared), compiled.asm


def triton_figures(words: list[str]) -> list[Figures]:
    """Compile every Triton kernel whose line holds all the words."""
    figures = []
    with tempfile.TemporaryDirectory() as cache:
        # ptxas is only run, and heard, where nothing is cached.
        os.environ |= {"TRITON_CACHE_DIR": cache, "TRITON_DUMP_PTXAS_LOG": "1"}
        for kernel, element, architecture in itertools.product(TRITON_KERNELS, ELEMENTS, ARCHITECTURES):
            if "*E" not in kernel.types and element != ELEMENTS[0]:
                continue  # the same kernel again
            for variant in kernel.variants:
                line = f"triton {kernel.path} {element} {variant} sm_{architecture}"
                if all(word in line for word in words):
                    figures.append(compile_triton(kernel, variant, element, architecture)[0])
    return figures


def cuda_figures(words: list[str]) -> list[Figures]:
    """Build the CUDA library and return what ptxas said of each kernel."""
    if shutil.which("nvcc") is None:
        print("nvcc was not found: the CUDA kernels are left out", file=sys.stderr)
        return []
    with tempfile.TemporaryDirectory() as folder:
        build = [sys.executable, "setup.py", "build_ext", "--build-lib", f"{folder}/lib", "--build-temp", folder]
        environment = os.environ | {"HYBRIDENGINE_NATIVE": "0", "HYBRIDENGINE_CUDA": "1"}
        environment["NVCC_APPEND_FLAGS"] = "-Xptxas -v"
        done = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    log = done.stdout + done.stderr
    parts = re.split(r"Compiling entry function '(\S+)' for '(\w+)'", log)[1:]
    if not parts:
        raise RuntimeError(f"the CUDA library could not be built:\n{log}")
    figures = []
    for mangled, architecture, told in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        name, variant = kernel_name(mangled)
        figures.append(Figures("cuda", name, variant, architecture, *parse_usage(told)))
    return [
        one for one in figures if all(word in f"cuda {one.kernel} {one.variant} {one.architecture}" for word in words)
    ]


def kernel_name(mangled: str) -> tuple[str, str]:
    """Return a kernel's plain name and its template's arguments."""
    plain = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    for noise in ("hybridengine::", "(anonymous namespace)::", "void ", "__nv_"):
        plain = plain.replace(noise, "")
    head = re.sub(r"\([^()]*\)$", "", plain)
    name, _, arguments = head.partition("<")
    return name, arguments.removesuffix(">").replace("__half", "half").strip()


def print_table(figures: list[Figures]) -> None:
    print(f"{'':7}{'kernel':16}{'variant':40}{'':8}{'registers':>10}{'spilled':>9}{'shared':>8}")
    for one in figures:
        print(
            f"{one.implementation:7}{one.kernel:16}{one.variant:40}{one.architecture:8}"
            f"{one.registers:>10}{one.spill_bytes:>9}{one.shared_bytes:>8}"
        )


def versions() -> dict[str, str]:
    """Return what compiled them."""
    import triton

    found = {"triton": triton.__version__}
    if shutil.which("nvcc"):
        told = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
        found["nvcc"] = told.rpartition("release ")[2].split(",")[0]
    return found


def main() -> int:
    """Print the table; exit with 1 if a kernel spills."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="compile what matches; write nothing")
    words = parser.parse_args().only
    figures = triton_figures(words) + ([] if "triton" in words else cuda_figures(words))
    print_table(figures)
    if not words:
        rows = [asdict(one) for one in figures]
        RESULTS.write_text(json.dumps({"versions": versions(), "kernels": rows}, indent=1) + "\n", encoding="utf-8")
    spilling = [one for one in figures if one.spill_bytes]
    print(f"{len(figures)} kernels, {len(spilling)} spill")
    return bool(spilling) or not figures


if __name__ == "__main__":
    sys.exit(main())
