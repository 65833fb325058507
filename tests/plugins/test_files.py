"""The data plugin `files`: every kind of source gives the same rows, every wrong one a clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hybridengine.errors import DataError
from hybridengine.plugin import Split
from hybridengine_plugins.data.files import Files

ROWS = [{"text": f"text {i}", "label": ["bad", "good"][i % 2]} for i in range(6)]


def read(source: Any, name: str = "train", **options: Any) -> Split:
    return Files(**{"train": ROWS, **options, name: source}).build_data(None)[name]  # type: ignore[arg-type]


def dataset() -> datasets.Dataset:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    return datasets.Dataset.from_list(ROWS, features=features)


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Any]:
    jsonl = tmp_path / "a.jsonl"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "b.csv").write_text("text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in ROWS))
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "1.tsv").write_text("text\tlabel\n" + "".join(f"{r['text']}\t{r['label']}\n" for r in ROWS[:4]))
    pq.write_table(pa.Table.from_pylist(ROWS[4:]), folder / "2.parquet")
    (folder / "README").write_text("not data")
    dataset().save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": dataset()}).save_to_disk(tmp_path / "saved_dict")
    return {
        "path": jsonl,
        "text path": str(jsonl),
        "csv": str(tmp_path / "b.csv"),
        "folder": str(folder),
        "list of files": [str(folder / "1.tsv"), str(folder / "2.parquet")],
        "saved dataset": str(tmp_path / "saved"),
        "saved splits": str(tmp_path / "saved_dict"),
        "dataset": dataset(),
        "dataset dict": datasets.DatasetDict({"train": dataset()}),
        "rows": ROWS,
        "columns": {"text": [r["text"] for r in ROWS], "label": [r["label"] for r in ROWS]},
        "split": Split("anything", ROWS, "mine"),
    }


def test_every_source_gives_the_same_rows(sources: dict[str, Any]) -> None:
    for kind, source in sources.items():
        split = read(source)
        assert list(split.rows) == ROWS, kind
        assert split.name == "train" and split.where(5), kind


def test_origins(sources: dict[str, Any]) -> None:
    assert read(sources["csv"]).where(0).endswith("b.csv:2")
    joined = read(sources["folder"])
    assert joined.where(0).endswith("1.tsv:2") and joined.where(4).endswith("2.parquet:1")
    assert read(ROWS, "test").where(0) == "data.test:1"


def test_only_given_splits() -> None:
    assert set(Files(train=ROWS).build_data(None)) == {"train"}  # type: ignore[arg-type]
    assert set(Files(train=ROWS, test=ROWS, unlabelled=ROWS).build_data(None)) == {"train", "test", "unlabelled"}  # type: ignore[arg-type]


def test_class_ids_become_names_also_in_lists() -> None:
    tags = datasets.ClassLabel(names=["O", "B-place"])
    features = datasets.Features({"tokens": datasets.List(datasets.Value("string")), "tags": datasets.List(tags)})
    rows = read(datasets.Dataset.from_dict({"tokens": [["in", "Rome"]], "tags": [[0, 1]]}, features=features)).rows
    assert list(rows) == [{"tokens": ["in", "Rome"], "tags": ["O", "B-place"]}]
    hidden = datasets.Dataset.from_dict({"label": [-1]}, features=datasets.Features({"label": tags}))
    assert list(read(hidden).rows) == [{"label": None}], "-1 is the hub's way to hide a test label"


def test_quoted_false_reads_bare_quotes(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('text\tlabel\n"odd\tx\n')
    assert list(read(tmp_path / "a.tsv", quoted=False).rows) == [{"text": '"odd', "label": "x"}]


def test_wrong_sources(sources: dict[str, Any], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "state.json").write_text("{")
    for source, message in [
        (3, r"data\.train: cannot read rows from a int"),
        ([{"text": "a"}, "b"], r"data\.train:2: expected a mapping"),
        ({"text": ["a"], "label": []}, r"data\.train: columns of different lengths"),
        (tmp_path / "absent.jsonl", "no such file"),
        (empty, "holds no .jsonl"),
        (broken, "not a readable saved dataset"),
        ("hf:", r"is not hf:NAME"),
        ("hf:a/b/c/d", r"is not hf:NAME"),
    ]:
        with pytest.raises(DataError, match=message):
            read(source)
    with pytest.raises(DataError, match=r"has no split 'test', only train"):
        read(sources["saved splits"], "test")


@pytest.mark.parametrize("source", ["hf:someone/nothing", "hf:someone/nothing/config:dev", "hf:nothing"])
def test_hub_without_network_tells_the_way_out(source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(DataError, match=r"cannot be loaded from the hub .*save_to_disk\(FOLDER\).*data\.train: FOLDER"):
        read(source)
