"""Broken data: file and row, what is wrong with it, and the way out; skipped rows are counted."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bench import Bench, call, good_rows, write_rows

from hybridengine.engine import Engine

# One bad row after 24 good ones, and what the error must say of it.
ROWS: dict[str, tuple[Any, str]] = {
    "text missing": ({"label": "positive"}, "rows.jsonl:25: column 'text' is missing"),
    "label missing": ({"text": "a film"}, "rows.jsonl:25: column 'label' is missing"),
    "text null": ({"text": None, "label": "positive"}, "rows.jsonl:25: column 'text' is null"),
    "label null": ({"text": "a film", "label": None}, "rows.jsonl:25: column 'label' is null"),
    "text a number": ({"text": 3, "label": "positive"}, "rows.jsonl:25: column 'text' must be text, not int"),
    "text a list": ({"text": ["a"], "label": "positive"}, "rows.jsonl:25: column 'text' must be text, not list"),
    "label an object": ({"text": "a", "label": {}}, "rows.jsonl:25: column 'label' must be a label, not dict"),
    "label a list": ({"text": "a", "label": ["positive"]}, "rows.jsonl:25: label is a list; set `task:"),
    "label NaN": ({"text": "a", "label": float("nan")}, "rows.jsonl:25: column 'label' is nan"),
    "label between classes": ({"text": "a", "label": 0.5}, "rows.jsonl:25: label 0.5 is a number between classes"),
    "text empty": ({"text": "", "label": "positive"}, "rows.jsonl:25: column 'text' is empty"),
    "text blank": ({"text": " \t\n", "label": "positive"}, "rows.jsonl:25: column 'text' is empty"),
    "text invisible": ({"text": "\u200b\ufeff", "label": "positive"}, "rows.jsonl:25: column 'text' is empty"),
    "lone surrogate": ({"text": "a\ud800b", "label": "positive"}, "rows.jsonl:25: column 'text' has a lone surrogate"),
    "surrogate label": ({"text": "a", "label": "\udfff"}, "rows.jsonl:25: column 'label' has a lone surrogate"),
    "NUL": ({"text": "a\0b", "label": "positive"}, "rows.jsonl:25: column 'text' has a NUL character"),
    "10 MB": (
        {"text": "ab " * 3_500_000, "label": "positive"},
        "rows.jsonl:25: column 'text' is longer than 1,000,000",
    ),
}

# A line that is no row at all: no policy can skip what cannot be read.
LINES = {
    "not JSON": ('{"text": "a", "label": }', "rows.jsonl:25: not valid JSON: Expecting value at column 24"),
    "a list": ("[1, 2]", 'rows.jsonl:25: expected an object such as {"text": ...}, got a list'),
    "key twice": ('{"text": "a", "text": "b"}', "rows.jsonl:25: key 'text' appears twice in one object"),
    "not UTF-8": (
        b'{"text": "caf\xe9"}',
        "rows.jsonl:25: not UTF-8 (byte 0xe9 at position 14); save the file as UTF-8",
    ),
    "deep": ("[" * 100_000, "rows.jsonl:25: "),
}


def engine(bench: Bench, **data: Any) -> Callable[[], Engine]:
    return lambda: Engine(bench.config(data=data))


@pytest.mark.parametrize("name", ROWS)
def test_a_bad_row_is_named_and_can_be_skipped(name: str, bench: Bench) -> None:
    row, told = ROWS[name]
    write_rows(bench.folder / "rows.jsonl", [row])
    message = bench.refused(
        engine(bench), told, "1 of 25 train rows cannot be used", "data.on_bad_row: skip", roads="validate plan train"
    )
    assert len(message) < 400
    lines = engine(bench, on_bad_row="skip")().validate()
    assert "train: 24 rows of rows.jsonl" in lines[0]
    assert any(line.startswith("warning: skipped 1 train rows: ") for line in lines)


@pytest.mark.parametrize("name", LINES)
def test_a_line_that_is_no_row(name: str, bench: Bench) -> None:
    line, told = LINES[name]
    write_rows(bench.folder / "rows.jsonl", [line])
    for policy in ("error", "skip"):
        bench.refused(engine(bench, on_bad_row=policy), told, roads="validate")


def test_many_bad_rows_are_listed_and_counted(bench: Bench) -> None:
    write_rows(bench.folder / "rows.jsonl", [row for row, _ in ROWS.values()])
    message = bench.refused(engine(bench), f"{len(ROWS)} of {24 + len(ROWS)} train rows", f"and {len(ROWS) - 5} more")
    assert [f"rows.jsonl:{25 + i}: " in message for i in range(6)] == [True] * 5 + [False]


def test_skipped_rows_are_counted_in_summary_and_report(bench: Bench) -> None:
    write_rows(bench.folder / "rows.jsonl", [row for row, _ in ROWS.values()])
    summary = engine(bench, on_bad_row="skip")().train()
    assert summary["status"] == "finished"
    counted = summary["skipped_rows"]["train"]
    assert sum(counted.values()) == len(ROWS) and counted["column 'text' is empty"] == 3
    page = (bench.folder / "run" / "report.html").read_text(encoding="utf-8")
    assert "lone surrogate" in page and "skipped" in page.lower()
    card = json.loads((bench.folder / "run" / "data_card.json").read_text())
    assert card["splits"]["train"]["rows"] == 24


# ---- files -----------------------------------------------------------------------------------------------------------

FILES: dict[str, tuple[str, bytes, str]] = {
    "empty": ("a.jsonl", b"", "a.jsonl: holds no rows; fill it, or name another file"),
    "blank lines": ("a.jsonl", b"\n\n", "a.jsonl: holds no rows"),
    "only a header": ("a.csv", b"text,label\n", "a.csv: holds no rows"),
    "unknown format": ("a.txt", b"good\n", "a.txt: unknown format '.txt'; known are .jsonl"),
    "UTF-16": ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "a.jsonl:1: UTF-16 text; save it as UTF-8"),
    "not gzip": ("a.jsonl.gz", b"hello", "a.jsonl.gz: damaged gzip file"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99)[:40], "a.jsonl.gz: damaged gzip file"),
    "ragged": ("a.csv", b"text,label\na,b\nc, d,e\n", "a.csv:3: 3 fields, but the header names 2 columns"),
    "open quote": ("a.csv", b'text,label\n"a,b\n', "a.csv:2: unexpected end of data; double a quote"),
    "header twice": ("a.csv", b"text,text\na,b\n", "a.csv:1: the header names 'text' twice"),
    "not Parquet": ("a.parquet", b"PAR1....", "a.parquet: not a readable Parquet file"),
    "no header": ("a.csv", b"good film,pos\nbad film,neg\n", "Set data.columns: {text: COLUMN}"),
    "other columns": ("a.jsonl", b'{"n": 1, "m": 2}\n', "no column 'text' in the train rows; columns found: n, m"),
    "one class": (
        "a.jsonl",
        b'{"text": "a", "label": "x"}\n{"text": "b", "label": "x"}\n',
        "a.jsonl: all 2 training rows have the label 'x'; a classifier needs two classes",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file(name: str, bench: Bench) -> None:
    file, content, told = FILES[name]
    (bench.folder / file).write_bytes(content)
    bench.refused(engine(bench, train=file), told)


@pytest.mark.parametrize("split", ["validation", "test", "unlabelled"])
def test_an_empty_split(split: str, bench: Bench) -> None:
    (bench.folder / "none.jsonl").write_bytes(b"")
    bench.refused(engine(bench, **{split: "none.jsonl"}), "none.jsonl: holds no rows", roads="validate")


def test_paths_that_lead_nowhere(bench: Bench) -> None:
    (bench.folder / "empty").mkdir()
    (bench.folder / "folder.jsonl").mkdir()
    (bench.folder / "link.jsonl").symlink_to("nowhere.jsonl")
    cases = {
        "row.jsonl": "row.jsonl: no such file; did you mean 'rows.jsonl'?",
        "elsewhere/x.jsonl": "no such file; relative paths start at the working directory",
        "empty": "empty: the folder holds no .jsonl",
        "folder.jsonl": "folder.jsonl: the folder holds no .jsonl",
        "link.jsonl": "link.jsonl: a link to nowhere.jsonl, which does not exist",
        "a" * 5000 + ".jsonl": "cannot be read (File name too long)",
        "hf:": "is not hf:NAME[/CONFIG][:SPLIT]",
    }
    for path, told in cases.items():
        assert len(bench.refused(engine(bench, train=path), told, roads="validate")) < 500
    bench.refused(engine(bench, train=3), "data.train: cannot read rows from a int", roads="validate")
    bench.refused(engine(bench, train=[]), "data.train: the train split holds no rows", roads="validate")
    bench.refused(engine(bench, train=[good_rows()[0], 3]), "data.train:2: expected a mapping", roads="validate")


def test_a_hub_dataset_without_network(bench: Bench) -> None:
    bench.refused(
        engine(bench, train="hf:stanfordnlp/sst2"),
        "hf:stanfordnlp/sst2: cannot be loaded from the hub",
        "save_to_disk(FOLDER)",
        roads="validate",
    )


def test_a_label_that_training_lacks(bench: Bench) -> None:
    write_rows(bench.folder / "held.jsonl", [{"text": "so", "label": "postive"}], start=24, count=8)
    bench.refused(
        engine(bench), "held.jsonl:9: label 'postive' of the validation split does not occur in training", "on_bad_row"
    )
    lines = engine(bench, on_bad_row="skip")().validate()
    assert "warning: skipped 1 validation rows: label that training lacks (1)" in lines


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_split_too_small_for_episodes(split: str, bench: Bench) -> None:
    write_rows(bench.folder / "few.jsonl", start=24, count=4)
    methods = [{"episodes": {"ways": 2, "shots": 1, "queries": 2}}, "maml"]
    sections: dict[str, Any] = {"methods": methods, "data": {split: "few.jsonl"}}
    bench.refused(lambda: Engine(bench.config(**sections)), f"the {split} split has 2 classes, 0 of them with the 3")
    spared = bench.config(methods=methods, data={"test": "few.jsonl"}, evaluate={"test": False})
    Engine(spared).validate()  # what is never evaluated need not be large enough


def test_columns_labels_and_shares_that_do_not_fit(bench: Bench) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"columns": {"text": "txet"}},
            "data.columns.text names column 'txet', which the train rows lack. Did you mean",
        ),
        ({"labels": {"positive": "p"}}, "rows.jsonl:1: label 'negative' is not listed in data.labels"),
        ({"validation": None, "carve": {"validation": 0.6, "test": 0.6}}, "the shares must add up to less than 1"),
        ({"limit": 1}, "a classifier needs two classes. Raise data.limit."),
    ]
    for data, told in cases:
        bench.refused(engine(bench, **data), told, roads="validate")


@pytest.mark.parametrize("command", ["validate", "plan", "train"])
def test_the_command_line_names_file_and_row(command: str, bench: Bench) -> None:
    path = bench.write(bench.text())
    for row, told in list(ROWS.values())[:12]:
        write_rows(bench.folder / "rows.jsonl", [row])
        before = bench.snapshot()
        code, out, err = call(command, path)
        assert (code, out) == (2, "") and told in err
        assert bench.snapshot() == before
    code, _, err = call(command, path, f"data.train={Path('row.jsonl')}")
    assert code == 2 and "did you mean 'rows.jsonl'?" in err
