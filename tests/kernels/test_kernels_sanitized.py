"""The libraries under sanitizers and valgrind."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hybridengine.kernels import cuda_library, native

ROOT = Path(__file__).parents[2]
KERNELS = Path(native.__file__).parent


def asked_of_compiler(name: str) -> str | None:
    """The path of one of the compiler's libraries; the bare name comes back where it has none."""
    if shutil.which("g++") is None:
        return None
    told = subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return told if told != name else None


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "plugins"), os.environ.get("PYTHONPATH", "")])
    given = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, check=False)


def exercise(root: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Build the native library of `root` with sanitizers and call all its functions."""
    build = [sys.executable, "setup.py", "build_ext", "-b", str(folder / "lib"), "-t", str(folder / "temp")]
    given = {"HYBRIDENGINE_SANITIZE": "address,undefined", "HYBRIDENGINE_CUDA": "0", "CXX": "g++", "CXXFLAGS": "-O1"}
    done = subprocess.run(build, cwd=root, env=os.environ | given, capture_output=True, text=True, check=False)
    built = list((folder / "lib").rglob("_native*.so"))
    assert built, done.stdout + done.stderr
    # The interpreter is not instrumented: the sanitizer must come first, with the library whose exceptions it follows.
    preloaded = f"{asked_of_compiler('libasan.so')} {asked_of_compiler('libstdc++.so')}"
    script = str(ROOT / "tests" / "kernels" / "sanitized_exercise.py")
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return run([sys.executable, script, str(built[0])], LD_PRELOAD=preloaded, **options)


@pytest.mark.slow
@pytest.mark.skipif(asked_of_compiler("libasan.so") is None, reason="g++ has no address sanitizer")
def test_no_finding_of_the_sanitizers(tmp_path: Path) -> None:
    """Memory and arithmetic of every native function; then the same with a mistake planted, which must be found."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "csrc", copy / "csrc")
    shutil.copy(ROOT / "setup.py", copy)
    done = exercise(copy, tmp_path)
    assert done.returncode == 0 and "no finding" in done.stdout, done.stdout + done.stderr

    source = copy / "csrc" / "embedding" / "cpu.cpp"
    text = source.read_text(encoding="utf-8")
    assert "column < width" in text
    source.write_text(text.replace("column < width", "column <= width"), encoding="utf-8")
    done = exercise(copy, tmp_path)
    assert done.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in done.stderr, done.stdout + done.stderr


needs_valgrind = pytest.mark.skipif(
    shutil.which("valgrind") is None or shutil.which("gcc") is None, reason="there is no valgrind or no gcc"
)


def load_under_valgrind(folder: Path, library: Path, preloaded: str, *function: str) -> str:
    program = folder / "load_unload"
    source = str(ROOT / "tests" / "kernels" / "load_unload.c")
    subprocess.run(["gcc", "-g", source, "-o", str(program), "-ldl"], check=True)
    checks = ["--leak-check=full", "--errors-for-leak-kinds=definite,indirect", "--error-exitcode=9", "--quiet"]
    done = run(["valgrind", *checks, str(program), str(library), *function], LD_PRELOAD=preloaded)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_valgrind
@pytest.mark.skipif(native.why_missing() is not None, reason=native.why_missing() or "")
def test_the_native_library_loads_and_unloads(tmp_path: Path) -> None:
    """Without Python: its symbols are stood for by as many bytes each, which nothing touches before PyInit."""
    library = next(KERNELS.glob("_native*.so"))
    listing = subprocess.run(["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True)
    names = re.findall(r"\b(_?Py\w+)", listing.stdout)
    assert names
    stand_ins = tmp_path / "python.c"
    stand_ins.write_text("".join(f"char {name}[64];\n" for name in sorted(set(names))))
    subprocess.run(["gcc", "-shared", "-fPIC", str(stand_ins), "-o", str(tmp_path / "python.so")], check=True)
    load_under_valgrind(tmp_path, library, str(tmp_path / "python.so"))


@needs_valgrind
@pytest.mark.skipif(not (KERNELS / "_cuda.so").exists(), reason="the CUDA library is not built here")
@pytest.mark.skipif(cuda_library.why_missing() is None, reason="valgrind cannot follow a driver")
def test_the_cuda_library_loads_and_unloads(tmp_path: Path) -> None:
    codes = load_under_valgrind(tmp_path, KERNELS / "_cuda.so", "", "hybridengine_cuda_probe").split()
    assert len(codes) == 3 and len(set(codes)) == 1 and codes[0] != "0"
