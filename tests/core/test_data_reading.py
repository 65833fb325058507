"""Every format gives back what was written, and every damaged file a message with its line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import random
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybridengine.data import read_rows
from hybridengine.errors import DataError

TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30)
TABLES = st.lists(st.fixed_dictionaries({"text": TEXTS, "label": TEXTS}), min_size=1, max_size=6)


def write(path: Path, rows: list[dict[str, str]]) -> None:
    name = path.name.removesuffix(".gz")
    if name.endswith(".jsonl"):
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    elif name.endswith(".json"):
        content = json.dumps(rows)
    elif name.endswith((".csv", ".tsv")):
        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, list(rows[0]), delimiter="," if name.endswith(".csv") else "\t")
        writer.writeheader()
        writer.writerows(rows)
        content = out.getvalue()
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
        return
    opened = gzip.open(path, "wb") if path.suffix == ".gz" else path.open("wb")
    with opened as file:
        file.write(content.encode())


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.tsv", "a.tsv.gz", "a.CSV", "a.parquet"]
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=TABLES)
def test_round_trip(tmp_path: Path, name: str, rows: list[dict[str, str]]) -> None:
    write(tmp_path / name.lower(), rows)
    if name != name.lower():
        (tmp_path / name.lower()).rename(tmp_path / name)
    assert [row for _, row in read_rows(tmp_path / name)] == rows


def test_lines_are_those_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    (tmp_path / "a.csv").write_text('text,label\n"a\nb",x\nc,y\n')
    assert [line for line, _ in read_rows(tmp_path / "a.jsonl")] == [1, 3]
    assert [line for line, _ in read_rows(tmp_path / "a.csv")] == [2, 4]


def test_byte_order_mark_columns_and_wide_fields(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext,label\n" + b"x" * 300_000 + b",1\n")
    (tmp_path / "a.json").write_text('{"text": ["a", "b"], "label": [0, 1]}')
    before = csv.field_size_limit()
    assert [len(row["text"]) for _, row in read_rows(tmp_path / "a.csv")] == [300_000]
    assert csv.field_size_limit() == before, "reading must not change a process-wide setting"
    assert [row for _, row in read_rows(tmp_path / "a.json")] == [{"text": "a", "label": 0}, {"text": "b", "label": 1}]


def test_unquoted_tsv(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('text\tlabel\n"so-called" art\t0\n" alone\t1\n')
    assert [row["text"] for _, row in read_rows(tmp_path / "a.tsv", quoted=False)] == ['"so-called" art', '" alone']
    with pytest.raises(DataError, match=r"a\.tsv:2: .*data\.quoted: false"):
        list(read_rows(tmp_path / "a.tsv"))


BROKEN = {
    "bad JSON": ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl:2: not valid JSON"),
    "cut JSON": ("a.jsonl", b'{"text": "a"}\n{"text": "b', r"a\.jsonl:2: not valid JSON"),
    "not an object": ("a.jsonl", b'{"text": "a"}\n["text"]\n', r"a\.jsonl:2: expected an object"),
    "null row": ("a.jsonl", b"null\n", r"a\.jsonl:1: expected an object.*null"),
    "key twice": ("a.jsonl", b'{"text": "a", "text": "b"}\n', r"a\.jsonl:1: key 'text' appears twice"),
    "deep nesting": ("a.jsonl", b"[" * 200_000 + b"\n", r"a\.jsonl:1: JSON that cannot be read"),
    "endless number": ("a.jsonl", b'{"label": ' + b"9" * 9000 + b"}\n", r"a\.jsonl:1: JSON that cannot be read"),
    "Latin-1": ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', r"a\.jsonl:2: not UTF-8 \(byte 0xe9"),
    "Latin-1 CSV": ("a.csv", b"text,label\na,1\ncaf\xe9,2\n", r"a\.csv:3: not UTF-8"),
    "UTF-16": ("a.csv", "text,label\na,1\n".encode("utf-16"), r"a\.csv:1: UTF-16"),
    "ragged": ("a.csv", b"text,label\na,1\nb,2,3\n", r"a\.csv:3: 3 fields, but the header names 2 columns"),
    "short": ("a.tsv", b"text\tlabel\na\t1\nb\n", r"a\.tsv:3: 1 fields"),
    "open quote": ("a.csv", b'text,label\n"a,1\nb,2\n', r"a\.csv:2: unexpected end of data"),
    "header twice": ("a.csv", b"text,text\na,b\n", r"a\.csv:1: the header names 'text' twice"),
    "header only": ("a.csv", b"text,label\n", r"a\.csv: holds no rows"),
    "empty": ("a.jsonl", b"", r"a\.jsonl: holds no rows"),
    "empty JSON": ("a.json", b"  ", r"a\.json: holds no rows"),
    "scalar JSON": ("a.json", b"3", r"a\.json: expected a list of objects.*int"),
    "uneven columns": ("a.json", b'{"text": ["a"], "label": []}', r"a\.json: columns of different lengths"),
    "not gzip": ("a.jsonl.gz", b'{"text": "a"}\n', r"a\.jsonl\.gz: damaged gzip"),
    "cut gzip": (
        "a.jsonl.gz",
        gzip.compress(random.Random(0).randbytes(4000).hex().encode())[:2000],
        "damaged gzip|long",
    ),
    "not Parquet": ("a.parquet", b"text,label\na,1\n", r"a\.parquet: not a readable Parquet file"),
    "unknown suffix": ("a.txt", b"text", r"a\.txt: unknown format '\.txt'; known are \.jsonl"),
    "no suffix": ("a", b"text", r"unknown format ''"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_say_where(tmp_path: Path, case: str) -> None:
    name, content, message = BROKEN[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_rows(tmp_path / name))


def test_missing_files(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match=r"no such file; did you mean 'train\.jsonl'"):
        list(read_rows(tmp_path / "trian.jsonl"))
    with pytest.raises(DataError, match="not a regular file"):
        list(read_rows(tmp_path / "folder.csv"))
    with pytest.raises(DataError, match=r"no such file|cannot be read"):
        list(read_rows(tmp_path / "train.jsonl" / "x.csv"))
    with pytest.raises(DataError, match=r"cannot be read|no such file"):
        list(read_rows(tmp_path / "a\0b.csv"))


def test_unreadable_file() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        path.write_text('{"text": "a"}\n')
        path.chmod(0)
        Path(folder).chmod(0o755)
        mine = os.geteuid()
        if mine == 0:  # the superuser may read everything
            os.seteuid(65534)
        try:
            with pytest.raises(DataError, match=r"a\.jsonl: cannot be read \(Permission denied\)"):
                list(read_rows(path))
        finally:
            os.seteuid(mine)
