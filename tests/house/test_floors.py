"""The floors of the house: imports go downward only, without circles; files stay small."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "hybridengine"
PLUGINS = ROOT / "plugins" / "hybridengine_plugins"

# From the ground up; a room may import from rooms below it and from itself.
FLOORS = [
    "errors",
    "kernels",
    "bench",
    "config",
    "seams",
    "data.rows",
    "run",
    "model",
    "text",
    "data",
    "plugin",
    "batches",
    "stack",
    "estimate",
    "evaluate",
    "building",
    "train.files",
    "folder",
    "train",
    "summary",
    "report",
    "predictor",
    "stages",
    "engine",
    "suggest",
    "testing",
    "cli",
]
PUBLIC = ("plugin", "seams", "kernels", "errors", "data", "evaluate", "model", "text")
EXEMPT_FROM_SIZE = {"plugin/hookspecs.py"}
CAP, MEDIAN = 300, 150


def room_of(module: str) -> str:
    """The longest floor name that the module lies in."""
    path = module.removeprefix("hybridengine").lstrip(".")
    matches = [floor for floor in FLOORS if path == floor or path.startswith(floor + ".")]
    return max(matches, key=len, default=path.split(".")[0])


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ["hybridengine", *path.relative_to(PACKAGE).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports when it runs; imports for type checkers alone do not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for node in ast.walk(branch)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    known = set(modules())
    return {name for name in found if name in known}


def test_every_module_is_on_a_floor() -> None:
    unknown = {name for name in modules() if name != "hybridengine" and room_of(name) not in FLOORS}
    assert not unknown


def test_imports_go_downward_only() -> None:
    wrong = []
    for name, path in modules().items():
        if name == "hybridengine":
            continue  # the façade loads names from the roof lazily
        own = FLOORS.index(room_of(name))
        for target in imports(path) - {"hybridengine"}:
            if FLOORS.index(room_of(target)) > own:
                wrong.append(f"{name} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_core_never_imports_a_plugin() -> None:
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.startswith("hybridengine_plugins") for name in names), path


def test_plugins_import_public_names_only_and_never_each_other() -> None:
    public = {"hybridengine"}
    public |= {f"hybridengine.{room}" for room in PUBLIC}
    for path in PLUGINS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("hybridengine"):
                assert node.module in public, f"{path.relative_to(ROOT)} imports {node.module}"


def test_modules_are_small() -> None:
    sizes = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    large = {str(p.relative_to(PACKAGE)): n for p, n in sizes.items() if n > CAP}
    assert set(large) <= EXEMPT_FROM_SIZE, large
    assert statistics.median(sizes.values()) <= MEDIAN
    methods = {p: len(p.read_text(encoding="utf-8").splitlines()) for p in PLUGINS.rglob("*.py")}
    assert not {str(p.relative_to(PLUGINS)): n for p, n in methods.items() if n > 200}


@pytest.mark.parametrize("module", ["hybridengine", "hybridengine.config", "hybridengine.report"])
def test_light_modules_import_no_torch(module: str) -> None:
    code = f"import sys, {module}; print('torch' in sys.modules or 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_no_call_that_loads_code() -> None:
    banned = {"pickle", "torch.load", "eval", "exec", "yaml.load", "extractall"}
    for base in (PACKAGE, PLUGINS):
        for path in base.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    name = ast.unparse(node.func)
                    assert name not in banned and not name.endswith(".extractall"), f"{path}: {name}"
                if isinstance(node, ast.Import):
                    assert not any(alias.name == "pickle" for alias in node.names), path
