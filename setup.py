"""Build the native kernels. Everything else about the package is declared in pyproject.toml.

The extension is plain C++17 plus pybind11: no torch headers, no OpenMP, so an isolated build takes seconds, pulls no
torch, and one wheel serves every torch version. One generated `build.ninja` compiles it in parallel and incrementally.

A missing or failing compiler never fails the install: the package works without its native kernels, and the reason is
kept in `hybridengine/kernels/_native_missing.txt`, from where `hybridengine.kernels.explain()` reports it.

Environment variables:
    HYBRIDENGINE_NATIVE=0                     skip the extension on purpose
    HYBRIDENGINE_SANITIZE=address,undefined   build with sanitizers (run with libasan.so in LD_PRELOAD)
    CXX, CXXFLAGS, LDFLAGS                    as usual
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
REASON_FILE = Path("hybridengine", "kernels", "_native_missing.txt")


class BuildFailed(Exception):
    """The extension cannot be built here; the message is what the user will read."""


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


def ninja_path(path: Path | str) -> str:
    """Escape a path for ninja's syntax."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def write_build_file(folder: Path, sources: list[str], output: Path) -> None:
    """Write `folder/build.ninja`: one compile edge per source and one link edge."""

    def command(words: list[str]) -> str:
        return shlex.join(words).replace("$", "$$")

    compiler = find_compiler()
    lines = [
        "ninja_required_version = 1.5",
        f"compile = {command(compiler + compile_flags())}",
        f"link = {command(compiler)}",
        f"link_flags = {command(link_flags())}",
        "rule compile",
        "  command = $compile -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $in",
        "rule link",
        "  command = $link $in -o $out $link_flags",
        "  description = link $out",
    ]
    objects = []
    for source in sources:
        objects.append(ninja_path(Path(source).with_suffix(".o")))
        lines.append(f"build {objects[-1]}: compile {ninja_path(ROOT / source)}")
    lines += [f"build {ninja_path(output)}: link {' '.join(objects)}", f"default {ninja_path(output)}", ""]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join(lines), encoding="utf-8")


class BuildNative(build_ext):
    """Builds through ninja; on failure notes the reason and lets the install go on."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            if os.environ.get("HYBRIDENGINE_NATIVE") == "0":
                raise BuildFailed("left out on purpose at install time (HYBRIDENGINE_NATIVE=0)")
            self.run_ninja(ext, output)
        except BuildFailed as failure:
            output.unlink(missing_ok=True)  # a stale library must not outlive a failed build
            self.note_reason(str(failure))
            self.warn(f"hybridengine is installed without its native kernels: {failure}")
        else:
            self.note_reason(None)

    def run_ninja(self, ext: Extension, output: Path) -> None:
        """Compile and link `ext` into `output`."""
        folder = Path(self.build_temp).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_build_file(folder, list(ext.sources), output)
            command = [find_ninja(), "-C", str(folder)]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        except (OSError, ImportError) as error:
            raise BuildFailed(f"the build could not be started: {error}") from error
        print(done.stdout)
        if done.returncode != 0:
            errors = [line for line in done.stdout.splitlines() if "error" in line.lower() or "FAILED" in line]
            raise BuildFailed(
                f"the compiler failed: {(errors or done.stdout.splitlines() or ['no output'])[0].strip()}"
            )

    def note_reason(self, reason: str | None) -> None:
        """Keep why the library is missing beside where it would be."""
        path = Path(self.build_lib) / REASON_FILE
        path.unlink(missing_ok=True)
        if reason is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(reason + "\n", encoding="utf-8")

    def copy_extensions_to_source(self) -> None:
        """Give an editable checkout what a wheel would hold: the library or the reason, never a stale one."""
        super().copy_extensions_to_source()
        for ext in self.extensions:
            if not Path(self.get_ext_fullpath(ext.name)).exists():
                (ROOT / self.get_ext_filename(ext.name)).unlink(missing_ok=True)
        built_reason = Path(self.build_lib) / REASON_FILE
        (ROOT / REASON_FILE).unlink(missing_ok=True)
        if built_reason.exists():
            shutil.copyfile(built_reason, ROOT / REASON_FILE)


def relative_files(*patterns: str) -> list[str]:
    """Return the files under csrc/ that match, relative to the root and sorted, as setuptools wants them."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "csrc").rglob(pattern))


setup(
    ext_modules=[
        Extension(
            "hybridengine.kernels._native",
            sources=relative_files("*.cpp"),
            depends=relative_files("*.h", "*.inl"),  # part of the source distribution
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
