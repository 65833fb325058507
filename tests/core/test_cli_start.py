"""The command line starts without the heavy libraries, explains itself, and refuses wrong words."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hybridengine.cli.main import main

COMMANDS = (
    *"demo init validate plan train evaluate predict report kernels bench schema doctor version".split(),
    "plugins list",
    "plugins info",
)
HEAVY = ("torch", "transformers", "peft", "datasets", "rich", "pydantic", "yaml", "numpy")


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def loaded_after(statements: str) -> set[str]:
    code = f"import sys\n{statements}\nprint('\\n'.join(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def test_help_loads_none_of_the_heavy_libraries() -> None:
    modules = loaded_after(
        "from hybridengine.cli.main import main\ntry: main(['--help'])\nexcept SystemExit as e: assert e.code == 0"
    )
    assert "typer" in modules
    assert not modules.intersection(HEAVY)


def test_importing_the_package_loads_no_torch() -> None:
    modules = loaded_after("import hybridengine")
    assert "hybridengine" in modules
    assert not modules.intersection({"torch", "transformers", "peft", "datasets"})


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_a_short_description(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, *command.split(), "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"Usage: hybridengine {command}")
    overview = call(capsys, *command.split()[:-1], "--help")[1]
    entry = next(line for line in overview.splitlines() if line.split()[:1] == command.split()[-1:])
    assert not entry.endswith("...")  # cut off: the first sentence of the docstring is too long


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "version")
    assert (code, out.split()[0]) == (0, "hybridengine")
    assert call(capsys, "--version") == (0, out, "")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("trian",), "No such command 'trian'. Did you mean 'train'?"),
        (("train",), "Missing argument 'CONFIG'."),
        (("train", "c.yaml", "--nope"), "No such option: --nope"),
        (("predict", "run", "--batch-size", "0"), "--batch-size"),
        (("predict", "run", "--format", "xml"), "xml"),
    ],
)
def test_wrong_words_exit_with_2(arguments: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and told in err.splitlines()[0]
    assert "Traceback" not in err


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys)
    assert code == 2
    assert err.startswith("Usage:") and "error:" not in err


def test_the_console_script_runs_main() -> None:
    done = subprocess.run([sys.executable, "-m", "hybridengine.cli.main", "version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("hybridengine ")
