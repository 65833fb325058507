"""One tiny model for all broken inputs, and a workbench around it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from bench import Bench, write_rows

from hybridengine.testing import tiny_checkpoint


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from threads, and threads that wait for each other slow a busy machine down."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of checkpoints: `bert` with a classifier, `bare` without any head."""
    folder = tmp_path_factory.mktemp("models")
    tiny_checkpoint(folder / "bert", auto_class="AutoModelForSequenceClassification")
    tiny_checkpoint(folder / "bare", auto_class="AutoModel")
    return folder


@pytest.fixture
def bench(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A folder to stand in, with good rows and no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    write_rows(tmp_path / "rows.jsonl")
    write_rows(tmp_path / "held.jsonl", start=24, count=8)
    return Bench(tmp_path, models)
