"""Build the compiled kernels. Everything else about the package is declared in pyproject.toml.

Two libraries: `_native`, plain C++17 plus pybind11 for CPUs, and `_cuda`, plain C functions for NVIDIA GPUs, where nvcc
is found. Neither sees a torch header nor OpenMP, so an isolated build takes seconds, pulls no torch, and one wheel
serves every torch version. One generated `build.ninja` compiles both in parallel and incrementally.

A missing or failing compiler never fails the install: the package works without its compiled kernels, and the reason is
kept beside where the library would be (`_native_missing.txt`, `_cuda_missing.txt`), from where
`hybridengine.kernels.explain()` reports it.

Environment variables:
    HYBRIDENGINE_NATIVE=0                     skip the CPU kernels on purpose
    HYBRIDENGINE_CUDA=0                       skip the CUDA kernels on purpose
    HYBRIDENGINE_CUDA=1                       call it a failure, not a matter of course, that nvcc is missing
    HYBRIDENGINE_SANITIZE=address,undefined   build the CPU kernels with sanitizers (run with libasan.so in LD_PRELOAD)
    CXX, CXXFLAGS, LDFLAGS                    as usual, for the CPU kernels
    NVCC, CUDA_HOME, NVCC_CCBIN               nvcc itself, where CUDA lies, the host compiler of nvcc
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NATIVE, CUDA = "hybridengine.kernels._native", "hybridengine.kernels._cuda"

# Machine code for these. All of it, and the PTX that drivers compile for what comes later, is made from one pass of the
# front end for the oldest: a pass for each would take twice the time, and no kernel uses what only newer ones have.
CUDA_ARCHITECTURES = ("80", "90", "100")


class BuildFailed(Exception):
    """A library cannot be built here; the message is what the user will read."""


@dataclass(frozen=True)
class Library:
    """How one library is built: commands up to the names of files."""

    compile: list[str]
    link: list[str]
    link_flags: list[str]
    sources: list[str]
    output: Path


def find_compiler() -> list[str]:
    """Return the C++ compiler command, `CXX` first."""
    if sys.platform == "win32":
        raise BuildFailed("the native kernels need GCC or Clang; Windows builds are not supported")
    if requested := os.environ.get("CXX"):
        command = shlex.split(requested)
        if shutil.which(command[0]) is None:
            raise BuildFailed(f"the C++ compiler CXX={requested!r} was not found at install time")
        return command
    for name in ("g++", "c++", "clang++"):
        if shutil.which(name):
            return [name]
    raise BuildFailed("no C++ compiler (g++, c++, clang++) was found at install time")


def find_ninja() -> str:
    """Return the ninja binary: the build requirement first, then the one on PATH."""
    try:
        import ninja
    except ImportError:
        found = shutil.which("ninja")
    else:
        found = shutil.which("ninja", path=ninja.BIN_DIR) or shutil.which("ninja")
    if found is None:
        raise BuildFailed("ninja was not found at install time (pip install ninja)")
    return found


def compile_flags() -> list[str]:
    """Return the flags of every translation unit."""
    import pybind11

    flags = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=fast"]
    # The ABI note concerns wide vectors passed between functions; here only always-inlined functions take them.
    flags += ["-Wall", "-Wextra", "-Wno-psabi"]
    if sanitizers := os.environ.get("HYBRIDENGINE_SANITIZE"):
        flags += [f"-fsanitize={sanitizers}", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all", "-g"]
    flags += [f"-I{ROOT / 'csrc'}", f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_paths()['include']}"]
    return flags + shlex.split(os.environ.get("CXXFLAGS", ""))


def link_flags() -> list[str]:
    """Return the flags of the link. Python's own symbols stay undefined; the interpreter provides them."""
    flags = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared", "-Wl,--as-needed"]
    if sanitizers := os.environ.get("HYBRIDENGINE_SANITIZE"):
        flags.append(f"-fsanitize={sanitizers}")
    flags += shlex.split(os.environ.get("LDFLAGS", ""))
    return [*flags, "-ldl"] if sys.platform.startswith("linux") else flags


def native_library(sources: list[str], output: Path) -> Library:
    """Return how the CPU kernels are built."""
    if os.environ.get("HYBRIDENGINE_NATIVE") == "0":
        raise BuildFailed("left out on purpose at install time (HYBRIDENGINE_NATIVE=0)")
    compiler = find_compiler()
    return Library(compiler + compile_flags(), compiler, link_flags(), sources, output)


def find_nvcc() -> str:
    """Return nvcc: `NVCC`, below `CUDA_HOME`, on PATH, or where CUDA's installer puts it."""
    requested = os.environ.get("HYBRIDENGINE_CUDA")
    if requested == "0":
        raise BuildFailed("left out on purpose at install time (HYBRIDENGINE_CUDA=0)")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    candidates = [os.environ.get("NVCC"), shutil.which("nvcc", path=f"{home}/bin"), shutil.which("nvcc")]
    for candidate in filter(None, candidates):
        if shutil.which(candidate):
            return candidate
    raise BuildFailed("nvcc was not found at install time" + (", as HYBRIDENGINE_CUDA=1 demands" if requested else ""))


def cuda_library(sources: list[str], output: Path) -> Library:
    """Return how the CUDA kernels are built."""
    nvcc = find_nvcc()
    try:
        listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildFailed(f"nvcc cannot be run: {error}") from error
    known = [number for number in CUDA_ARCHITECTURES if f"compute_{number}" in listed]
    if not known:
        raise BuildFailed(f"nvcc knows none of the architectures {', '.join(CUDA_ARCHITECTURES)}")
    codes = ",".join([f"sm_{number}" for number in known] + [f"compute_{known[0]}"])
    flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", f"-I{ROOT / 'csrc'}"]
    flags += ["-gencode", f"arch=compute_{known[0]},code=[{codes}]"]
    # The runtime inside must not be mistaken for the one of torch: none of its symbols is seen.
    link = ["-shared", "-cudart", "static", "-Xlinker", "--exclude-libs,ALL,-Bsymbolic"]
    return Library([nvcc, *flags], [nvcc], link, sources, output)


def ninja_path(path: Path | str) -> str:
    """Escape a path for ninja's syntax."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def write_build_file(folder: Path, libraries: list[Library]) -> None:
    """Write `folder/build.ninja`: for each library one compile edge per source and one link edge."""

    def command(words: list[str]) -> str:
        return shlex.join(words).replace("$", "$$")

    lines = ["ninja_required_version = 1.5"]
    for library in libraries:
        name = library.output.name.partition(".")[0]
        lines += [
            f"rule compile{name}",
            f"  command = {command(library.compile)} -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $in",
            f"rule link{name}",
            f"  command = {command(library.link)} $in -o $out {command(library.link_flags)}",
            "  description = link $out",
        ]
        objects = []
        for source in library.sources:
            objects.append(ninja_path(Path(source + ".o")))
            lines.append(f"build {objects[-1]}: compile{name} {ninja_path(ROOT / source)}")
        lines.append(f"build {ninja_path(library.output)}: link{name} {' '.join(objects)}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join([*lines, ""]), encoding="utf-8")


def run_ninja(folder: Path, outputs: list[Path]) -> str | None:
    """Build `outputs`, as many as can be; return why one failed."""
    command = [find_ninja(), "-C", str(folder), "-k", "0", *map(str, outputs)]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except OSError as error:
        raise BuildFailed(f"the build could not be started: {error}") from error
    print(done.stdout)
    if done.returncode == 0:
        return None
    told = done.stdout.splitlines()
    # The compiler's own words, not ninja's, where there are any.
    errors = [line for line in told if re.search(r"error\s*:", line)] + [line for line in told if "FAILED" in line]
    return f"the compiler failed: {(errors or told or ['no output'])[0].strip()}"


class BuildLibraries(build_ext):
    """Builds through ninja; on failure notes the reason and lets the install go on."""

    def get_ext_filename(self, fullname: str) -> str:
        """Name the CUDA library plainly: it is no Python module."""
        name: str = super().get_ext_filename(fullname)
        is_cuda = fullname.rpartition(".")[2] == CUDA.rpartition(".")[2]  # it is asked for with and without the package
        return str(Path(name).with_name("_cuda.so")) if is_cuda else name

    def build_extensions(self) -> None:
        libraries: dict[str, Library] = {}
        failures: dict[str, str] = {}
        for ext in self.extensions:
            output = Path(self.get_ext_fullpath(ext.name)).resolve()
            output.parent.mkdir(parents=True, exist_ok=True)
            try:
                make = cuda_library if ext.name == CUDA else native_library
                libraries[ext.name] = make(list(ext.sources), output)
            except (BuildFailed, ImportError) as failure:
                failures[ext.name] = str(failure)
        try:
            failures |= self.build_libraries(libraries)
        except BuildFailed as failure:
            failures |= dict.fromkeys(libraries, str(failure))
        for ext in self.extensions:
            self.note(ext, failures.get(ext.name))

    def build_libraries(self, libraries: dict[str, Library]) -> dict[str, str]:
        """Compile and link; return why, for each that could not be built."""
        folder = Path(self.build_temp).resolve()
        write_build_file(folder, list(libraries.values()))
        if not libraries or run_ninja(folder, [library.output for library in libraries.values()]) is None:
            return {}
        # Only now, one by one, whose failure it was: what was built is not built again.
        reasons = {name: run_ninja(folder, [library.output]) for name, library in libraries.items()}
        return {name: reason for name, reason in reasons.items() if reason is not None}

    def note(self, ext: Extension, failure: str | None) -> None:
        """Keep why the library is missing beside where it would be."""
        path = Path(self.build_lib) / reason_file(ext)
        path.unlink(missing_ok=True)
        if failure is None:
            return
        Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)  # a stale one must not outlive a failed build
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(failure + "\n", encoding="utf-8")
        kind = "CUDA" if ext.name == CUDA else "native"
        if ext.name != CUDA or os.environ.get("HYBRIDENGINE_CUDA") == "1":
            self.warn(f"hybridengine is installed without its {kind} kernels: {failure}")

    def copy_extensions_to_source(self) -> None:
        """Give an editable checkout what a wheel would hold: the library or the reason, never a stale one."""
        super().copy_extensions_to_source()
        for ext in self.extensions:
            file = self.get_ext_filename(ext.name)
            if not Path(self.build_lib, file).exists():
                (ROOT / file).unlink(missing_ok=True)
            built_reason = Path(self.build_lib) / reason_file(ext)
            (ROOT / reason_file(ext)).unlink(missing_ok=True)
            if built_reason.exists():
                shutil.copyfile(built_reason, ROOT / reason_file(ext))


def reason_file(ext: Extension) -> Path:
    """Return where it is kept why `ext` is missing."""
    return Path(*ext.name.split(".")[:-1], f"{ext.name.split('.')[-1]}_missing.txt")


def relative_files(*patterns: str) -> list[str]:
    """Return the files under csrc/ that match, relative to the root and sorted, as setuptools wants them."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "csrc").rglob(pattern))


setup(
    ext_modules=[
        Extension(
            NATIVE,
            sources=relative_files("*.cpp"),
            depends=relative_files("*.h", "*.inl"),  # part of the source distribution
            language="c++",
            optional=True,
        ),
        Extension(CUDA, sources=relative_files("cuda.cu"), depends=relative_files("*.cuh"), optional=True),
    ],
    cmdclass={"build_ext": BuildLibraries},
)
