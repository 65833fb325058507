"""Rows for `predict`: plain lines, JSON lines, data files; every bad line is named."""

from __future__ import annotations

import gzip
import io
import sys
from pathlib import Path

import pytest

from hybridengine.cli.inputs import Form, read_inputs
from hybridengine.errors import DataError


def write(folder: Path, name: str, content: bytes) -> str:
    (folder / name).write_bytes(content)
    return str(folder / name)


def values(file: str, form: Form = Form.auto) -> list[object]:
    return [row for _, row in read_inputs(file, form)]


@pytest.mark.parametrize(
    ("content", "form", "rows"),
    [
        (b"good film\nbad film\n", Form.auto, ["good film", "bad film"]),
        (b"good film\r\nbad film", Form.auto, ["good film", "bad film"]),
        (b"\xef\xbb\xbf\n\ngood\n\n", Form.auto, ["good"]),
        (b'{"text": "a"}\n{"text": "b"}\n', Form.auto, [{"text": "a"}, {"text": "b"}]),
        (b'{"text": "a"}\n', Form.text, ['{"text": "a"}']),
        (b"[1]\n", Form.auto, ["[1]"]),
        (b"{not json\n", Form.auto, ["{not json"]),
        ("电影很好\n".encode(), Form.auto, ["电影很好"]),
    ],
)
def test_lines(content: bytes, form: Form, rows: list[object], tmp_path: Path) -> None:
    assert values(write(tmp_path, "rows.txt", content), form) == rows


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\ntwo\n")))
    assert list(read_inputs("-")) == [("standard input:1", "one"), ("standard input:2", "two")]


def test_data_files_are_read_by_their_suffix(tmp_path: Path) -> None:
    packed = write(tmp_path, "a.jsonl.gz", gzip.compress(b'{"text": "a", "n": 1}\n'))
    assert values(packed) == [{"text": "a", "n": 1}]
    assert values(write(tmp_path, "a.csv", b"text,x\nhello,1\n")) == [{"text": "hello", "x": "1"}]


def test_each_row_knows_its_line(tmp_path: Path) -> None:
    file = write(tmp_path, "rows.txt", b"\none\n\ntwo\n")
    assert [place for place, _ in read_inputs(file)] == [f"{file}:2", f"{file}:4"]


@pytest.mark.parametrize(
    ("content", "form", "told"),
    [
        (b"", Form.auto, "holds no rows"),
        (b"\n \n", Form.auto, "holds no rows"),
        (b'{"text": "a"}\nplain\n', Form.auto, "rows.txt:2: not valid JSON"),
        (b"[1]\n", Form.jsonl, "rows.txt:1: expected a JSON object"),
        (b"ok\n\xff\n", Form.auto, "rows.txt:2: not UTF-8"),
        (b"[" * 100_000, Form.jsonl, "rows.txt:1: not valid JSON"),
    ],
)
def test_bad_lines_are_named(content: bytes, form: Form, told: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=told):
        list(read_inputs(write(tmp_path, "rows.txt", content), form))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        list(read_inputs(str(tmp_path / "none.txt")))
