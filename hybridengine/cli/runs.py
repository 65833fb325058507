"""Arguments that name a run folder or a config file."""

from __future__ import annotations

from pathlib import Path

from hybridengine.errors import ConfigError, OutputError

__all__ = ["config_of", "run_folder"]


def run_folder(path: Path) -> Path:
    """The folder of a run.

    Raises:
        OutputError: it does not exist or holds no run.
    """
    if not path.is_dir():
        raise OutputError(f"{path}: no such run folder; give the `output` of a run, e.g. runs/first")
    if path.name == "best" and (path.parent / "config.yaml").is_file():
        return path.parent
    if not (path / "config.yaml").is_file():
        raise OutputError(
            f"{path}: not a run folder, it has no config.yaml; give the `output` of a run, e.g. runs/first"
        )
    return path


def config_of(path: Path) -> tuple[Path, list[str]]:
    """The config file that a run folder or a config path stands for, and the overrides that keep it in its folder.

    Raises:
        ConfigError: nothing is there.
    """
    if path.is_dir():
        folder = run_folder(path)
        return folder / "config.yaml", [f"output={folder}"]
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder; give a run folder or the path of a YAML config")
    return path, []
