"""Try a broken input on every road, and hold the engine to what it promises about errors."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridengine.cli.main import main
from hybridengine.engine import Engine
from hybridengine.errors import HybridEngineError


def good_rows(start: int = 0, count: int = 24) -> list[dict[str, Any]]:
    """Rows of two classes, all different."""
    words = {"negative": ("bad", "sad"), "positive": ("good", "great")}
    labels = list(words)
    return [
        {"text": f"the {words[labels[i % 2]][i % 3 % 2]} film {i}", "label": labels[i % 2]}
        for i in range(start, start + count)
    ]


def write_rows(path: Path, extra: Sequence[Any] = (), *, start: int = 0, count: int = 24) -> Path:
    """Good rows and then `extra`: mappings, or text and bytes as they are."""
    lines = [json.dumps(row).encode() for row in good_rows(start, count)]
    for item in extra:
        lines.append(item if isinstance(item, bytes) else item.encode() if isinstance(item, str) else _json(item))
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def _json(row: Any) -> bytes:
    return json.dumps(row).encode()


@dataclass
class Bench:
    """A folder with good rows and a good config, to be broken in one place.

    The good config takes lines 1 to 4 (task, model, data, output) and 5 (train); what is added starts at line 6.
    """

    folder: Path
    models: Path

    def text(self, **lines: str) -> str:
        """The good config, with whole lines replaced."""
        values = {
            "task": "task: text-classification",
            "model": f"model: {{name: {self.models / 'bert'}}}",
            "data": "data: {train: rows.jsonl, validation: held.jsonl}",
            "output": "output: run",
            "train": "train: {max_steps: 2, batch_size: 8, max_length: 16, precision: fp32, device: cpu}",
            **lines,
        }
        return "".join(f"{line}\n" for line in values.values())

    def write(self, text: str | bytes) -> Path:
        """`config.yaml` with this content."""
        path = self.folder / "config.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    def config(self, **sections: Any) -> dict[str, Any]:
        """The good config as a mapping; sections are merged key by key."""
        values: dict[str, Any] = {
            "task": "text-classification",
            "model": {"name": str(self.models / "bert")},
            "data": {"train": "rows.jsonl", "validation": "held.jsonl"},
            "train": {"max_steps": 2, "batch_size": 8, "max_length": 16, "precision": "fp32", "device": "cpu"},
            "output": "run",
            "evaluate": {"resamples": 20},
        }
        for name, value in sections.items():
            both = isinstance(value, dict) and isinstance(values.get(name), dict)
            values[name] = {**values[name], **value} if both else value
        return values

    def snapshot(self) -> dict[str, bytes]:
        """Every file of the folder, by name."""
        return {str(p): p.read_bytes() for p in sorted(self.folder.rglob("*")) if p.is_file()}

    def refused(self, make: Callable[[], Engine], *told: str, code: int = 2, roads: str = "validate train") -> str:
        """Each road refuses with one clear error that tells all of `told`, and leaves no file behind."""
        message = ""
        for road in roads.split():
            before = self.snapshot()
            try:
                getattr(make(), road)()
            except HybridEngineError as error:
                message = str(error)
                assert error.exit_code == code, f"{road}: {error.exit_code} {error}"
            else:
                raise AssertionError(f"{road} accepted it")
            for part in told:
                assert part in message, f"{road}: {part!r} is not in {message!r}"
            assert self.snapshot() == before, f"{road} wrote"
        return message


def call(*arguments: object) -> tuple[int, str, str]:
    """Run the command line in this process; exit code, standard output and standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as ended:
            code = int(ended.code or 0)
    assert "Traceback" not in err.getvalue() + out.getvalue()
    return code, out.getvalue(), err.getvalue()
